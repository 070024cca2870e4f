"""The mask each decoder layer needs in a call that prunes, or that continues a pruned conversation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.runtime import masks
from tokenprune.runtime.frame import Frame
from tokenprune.runtime.record import Columns, is_static


class LayerMasks:
    """Makes the masks of one model's layers.

    Args:
        text_config: of the text model.
        attention: the attention module of one of its layers.
    """

    def __init__(self, text_config: Any, attention: nn.Module) -> None:
        self.text_config = text_config
        self.is_causal = bool(getattr(attention, "is_causal", True))

    def of_layer(self, frame: Frame, i: int, hidden: Tensor, stock: Any) -> Any:
        """The mask of layer i, made once per call for all layers that share it.

        Args:
            frame: the call.
            i: decoder layer.
            hidden: states entering it.
            stock: the mask the model made for it.
        """
        columns = None if frame.record is None else frame.record.layers[i]
        key = (id(columns), frame.stage, id(stock), self.kind(i))
        if key not in frame.masks:
            frame.masks[key] = self._make(frame, i, hidden, stock)
        return frame.masks[key]

    def kind(self, i: int) -> str:
        """A layer's type of attention."""
        return masks.local_attention(self.text_config, i)[0]

    def looks_back(self, frame: Frame, i: int) -> bool:
        """Whether the conversation is longer than layer i looks back."""
        _, span = masks.local_attention(self.text_config, i)
        return span is not None and frame.past + frame.length > span

    def _make(self, frame: Frame, i: int, hidden: Tensor, stock: Any) -> Any:
        own, old = _new(frame), _cached(frame, i)
        fillers = any(c is not None and c.visible is not None for c in (own, old))
        if own is not None and frame.past == 0:
            if isinstance(stock, Tensor):
                entries = own.length
                if is_static(frame.cache):
                    entries, _ = frame.cache.get_mask_sizes(own.length, i)
                return masks.gather(stock, own.index.clamp(min=0), own.visible, entries)
            if stock is None and not is_static(frame.cache):
                if not fillers:
                    return None
                if not self.is_causal:
                    return masks.hide(torch.ones(1, 1, 1, own.length, dtype=torch.bool), own.visible)
        if stock is None and not self.looks_back(frame, i) and not fillers and hidden.shape[1] == 1:
            return None
        return self.rebuild(frame, i, hidden, all_visible=stock is None)

    def rebuild(self, frame: Frame, i: int, hidden: Tensor, all_visible: bool) -> Any:
        """Layer i's mask from scratch.

        Args:
            frame: the call.
            i: decoder layer.
            hidden: states entering it.
            all_visible: whether the conversation is known to have no padding.
        """
        open_everywhere = all_visible and not any(
            c is not None and c.visible is not None for c in (_new(frame), _cached(frame, i))
        )
        visible = None
        if is_static(frame.cache) or not open_everywhere:
            visible = self.entries(frame, i, hidden)
        within = self._within(frame, i, hidden) if self.looks_back(frame, i) else None
        blocks = None
        if frame.blocks is not None and hidden.shape[1] > 1:
            columns = self._columns(frame, i, hidden)
            own = frame.blocks.to(hidden.device)
            blocks = own.gather(1, columns.clamp(0, own.shape[1] - 1)).masked_fill(
                columns >= own.shape[1], -1
            )
        return masks.rebuild(self.text_config, hidden, visible, frame.cache, i, within, blocks)

    def entries(self, frame: Frame, i: int, hidden: Tensor) -> Tensor:
        """(B, entries + q) bool: which of layer i's cached entries and of the q new ones are real tokens."""
        old, own = _cached(frame, i), _new(frame)
        given = frame.attention
        if given is not None and given.shape[1] != frame.past + frame.length:
            given = None
        parts: list[Tensor | int] = []
        start = 0
        if old is not None and frame.record is not None:
            parts.append(old.length if old.visible is None else old.visible)
            start = frame.record.length
        end = frame.past if own is not None else frame.past + frame.length
        parts.append(max(0, end - start) if given is None else given[:, start:end] != 0)
        if own is not None:
            parts.append(own.length if own.visible is None else own.visible)
        if is_static(frame.cache):
            # Its masks span the whole allocation; what is not written yet, causality hides.
            used = sum(p if isinstance(p, int) else p.shape[1] for p in parts)
            parts.append(max(0, int(frame.cache.layers[i].get_max_length()) - used))
        device = hidden.device
        return torch.cat(
            [
                torch.ones(frame.batch, p, dtype=torch.bool, device=device)
                if isinstance(p, int)
                else p.to(device)
                for p in parts
            ],
            dim=1,
        )

    def _columns(self, frame: Frame, i: int, hidden: Tensor) -> Tensor:
        """(B, entries + q) as `columns` gives them; of a static cache's unwritten entries, the end."""
        known = columns(frame, i, hidden.device)
        if not is_static(frame.cache):
            return known
        total = frame.past + frame.length
        unwritten = max(total, int(frame.cache.layers[i].get_max_length()))
        return torch.cat([known, known.new_full((frame.batch, unwritten), total)], dim=1)

    def _within(self, frame: Frame, i: int, hidden: Tensor) -> Callable[..., Tensor]:
        """How far back layer i looks, in original columns."""
        kind, span = masks.local_attention(self.text_config, i)
        assert span is not None
        padding = _padding(frame)
        if padding is None:
            padding = torch.zeros(frame.batch, dtype=torch.long)
        return masks.reach(kind, span, self._columns(frame, i, hidden), padding.to(hidden.device))


def columns(frame: Frame, i: int, device: torch.device) -> Tensor:
    """(B, entries + q): the original columns of layer i's cached entries and of the q new ones."""
    old, own = _cached(frame, i), _new(frame)
    start = 0 if old is None or frame.record is None else frame.record.length
    end = frame.past + frame.length if own is None else frame.past
    parts = [] if old is None else [old.index.to(device)]
    parts.append(torch.arange(start, end, device=device).expand(frame.batch, -1))
    if own is not None:
        parts.append(own.index.to(device) + frame.past)
    return torch.cat(parts, dim=1)


def _padding(frame: Frame) -> Tensor | None:
    """(B,) columns of padding before each row's first token."""
    known = frame.visible if frame.attention is None else frame.attention != 0
    if known is not None:
        return known.long().argmax(1)
    return None if frame.record is None else frame.record.padding


def _new(frame: Frame) -> Columns | None:
    """Columns of this call that are left so far; None before its first cut."""
    return frame.pruning.stages[-1] if frame.pruning is not None and frame.stage else None


def _cached(frame: Frame, i: int) -> Columns | None:
    """What is recorded of layer i's cache; None when it holds every column."""
    return None if frame.record is None else frame.record.layers[i]
