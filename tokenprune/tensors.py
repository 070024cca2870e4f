"""The plain tensors that quantised ones consist of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


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
