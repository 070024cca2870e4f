"""The plain tensors that quantised ones consist of, arithmetic in the dtypes that are written down, and the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@contextmanager
def as_written(device: torch.device, grad: bool = False) -> Iterator[None]:
    """Inside, every operation has the dtype of its operands, whatever `torch.autocast` the caller runs under.

    Args:
        device: of the operands.
        grad: whether gradients may flow.
    """
    with torch.autocast(device.type, enabled=False), torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        yield


def plain_tensors(held: Any) -> Iterator[Tensor]:
    """The tensors in `held`: itself, those of a tensor subclass (torchao, quanto), or of a tuple or dict (HQQ)."""
    if isinstance(held, Tensor):
        inner = getattr(held, "__tensor_flatten__", None)
        if inner is None:
            yield held
        else:
            for name in inner()[0]:
                yield from plain_tensors(getattr(held, name))
    elif isinstance(held, Mapping):
        yield from plain_tensors(list(held.values()))
    elif isinstance(held, list | tuple):
        for part in held:
            yield from plain_tensors(part)


def split_over(module: Any) -> Any:
    """The device mesh over which a linear module's outputs are split (tensor parallelism); None where they are not."""
    weight: Any = getattr(module, "weight", None)
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None or mesh.size() == 1:
        return None
    return mesh if any(place.is_shard(0) for place in weight.placements) else None


def gathered(x: Tensor, mesh: Any, dim: int) -> Tensor:
    """The parts of all ranks of a mesh, one behind the other along a dimension."""
    parts = [torch.empty_like(x) for _ in range(mesh.size())]
    torch.distributed.all_gather(parts, x.contiguous(), group=mesh.get_group())
    return torch.cat(parts, dim=dim)


def to_host(tensors: list[Tensor]) -> list[NDArray[np.int64]]:
    """Copy integer tensors to the host, those on a device in one transfer."""
    away = [t for t in tensors if t.device.type != "cpu"]
    if away:
        flat = torch.cat([t.reshape(-1).to(away[0].device, torch.int64) for t in away]).cpu()
        copies = iter(flat.split([t.numel() for t in away]))
    return [
        (t if t.device.type == "cpu" else next(copies).view(t.shape)).to(torch.int64).numpy() for t in tensors
    ]


def entropy_of(logits: Tensor) -> Tensor:
    """(..., V) logits -> (...) entropy of their distribution in nats, float32."""
    log = logits.float().log_softmax(-1)
    return -torch.special.xlogy(log.exp(), log.exp()).sum(-1)
