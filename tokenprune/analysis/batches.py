"""Prompts put together into batches, whatever their model's processor makes of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def batched(calls: Sequence[Mapping[str, Any]], size: int, pad_id: int = 0) -> Iterator[dict[str, Any]]:
    """Consecutive prompts as batches of up to `size`, padded on the left; those that do not fit together start anew.

    Args:
        calls: inputs of one prompt each, as a processor makes them. Tensors that are as long as the prompt are padded
            (masks and kinds of tokens with 0), others are put one after the other along their first dimension.
        size: most prompts in a batch.
        pad_id: token in the padding, which is masked out.
    """
    group: list[Mapping[str, Any]] = []
    for call in calls:
        if group and (len(group) == size or not _fits(group[0], call)):
            yield _joined(group, pad_id)
            group = []
        group.append(call)
    if group:
        yield _joined(group, pad_id)


def _is_row(call: Mapping[str, Any], value: Any) -> bool:
    """Whether a tensor is as long as the prompt."""
    return isinstance(value, Tensor) and value.shape == call["input_ids"].shape


def _fits(first: Mapping[str, Any], call: Mapping[str, Any]) -> bool:
    if set(first) != set(call) or ("attention_mask" not in call and not _is_row(call, first["input_ids"])):
        return False
    for name, value in call.items():
        other = first[name]
        if _is_row(call, value) and _is_row(first, other):
            continue
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            if value.shape[1:] != other.shape[1:] or value.dtype != other.dtype:
                return False
        elif isinstance(value, Tensor) or isinstance(other, Tensor) or value != other:
            return False
    return True


def _joined(group: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Any]:
    longest = max(call["input_ids"].shape[1] for call in group)
    joined: dict[str, Any] = {}
    for name, value in group[0].items():
        if not isinstance(value, Tensor):
            joined[name] = value
            continue
        parts = [call[name] for call in group]
        if _is_row(group[0], value):
            fill = pad_id if name == "input_ids" else 0
            parts = [
                torch.nn.functional.pad(part, (longest - part.shape[1], 0), value=fill) for part in parts
            ]
        joined[name] = torch.cat(parts)
    return joined
