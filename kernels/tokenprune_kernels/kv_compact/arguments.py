"""What every backend shares: the argument checks, and which tensors one launch can serve."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_arguments(tensors: Sequence[Tensor], index: Tensor, inplace: bool) -> None:
    """Refuse what does not fit together. Only types and shapes are read, so a GPU is never waited for.

    Raises:
        TypeError, ValueError: The message says which argument and why.
    """
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        raise TypeError("index must be an int64 tensor")
    if index.ndim != 2:
        raise ValueError(f"index must have shape (B, M), got {tuple(index.shape)}")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"tensors[{i}] must be a floating tensor")
        if tensor.ndim != 4:
            raise ValueError(f"tensors[{i}] must have shape (B, H, N, D), got {tuple(tensor.shape)}")
        if (tensor.shape[0], tensor.shape[2]) != (index.shape[0], tensors[0].shape[2]):
            raise ValueError(
                f"tensors[{i}] of shape {tuple(tensor.shape)} does not fit an index for {index.shape[0]} rows and "
                f"{tensors[0].shape[2]} entries"
            )
        if index.shape[1] > tensor.shape[2]:
            raise ValueError(f"index keeps {index.shape[1]} of {tensor.shape[2]} entries")
        if inplace and any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ValueError(f"tensors[{i}] is expanded: its rows share memory and cannot be moved in place")


def groups(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of tensors that share device, dtype, shape and strides, group by group."""
    found: dict[object, list[int]] = {}
    for i, tensor in enumerate(tensors):
        key = (tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        found.setdefault(key, []).append(i)
    return list(found.values())
