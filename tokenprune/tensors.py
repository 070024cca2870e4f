"""The plain tensors that quantised ones consist of, and arithmetic in the dtypes that are written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
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
