"""The mask each decoder layer needs in a call that prunes, or that continues a pruned conversation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.models.decoders import attends, attention_backend
from tokenprune.runtime import masks
from tokenprune.runtime.call import Call
from tokenprune.runtime.record import Columns

KEEP = object()  # of a layer whose mask of the model's own is right


class LayerMasks:
    """Makes the masks of one model's layers.

    Args:
        text_config: of the text model.
        attention: the attention module of one of its layers.
        block_kinds: see `Family`.
    """

    def __init__(self, text_config: Any, attention: nn.Module, block_kinds: tuple[str, ...] = ()) -> None:
        self.text_config, self._block_kinds = text_config, block_kinds
        self.is_causal = bool(getattr(attention, "is_causal", True))
        # Read once: looking into a config costs more than a hook should on a decoding step.
        self._local = [masks.local_attention(text_config, i) for i in range(text_config.num_hidden_layers)]
        self.kinds = [kind for kind, _ in self._local]
        self._attends = [attends(text_config, i) for i in range(text_config.num_hidden_layers)]
        self.shortest = min((span for _, span in self._local if span is not None), default=math.inf)

    def of_layer(self, call: Call, i: int, hidden: Tensor, stock: Any) -> Any:
        """The mask of layer i, made once per call for all layers that share it.

        Args:
            call: the call.
            i: decoder layer.
            hidden: states entering it.
            stock: the mask the model made for it.
        """
        if not self._attends[i]:
            return _of_recurrent(_new(call), hidden, stock)
        columns = None if call.record is None else call.record.layers[i]
        key = (id(columns), call.cuts_done, id(stock), self.kinds[i])
        if key not in call.masks:
            mask = self._make(call, i, hidden, stock)
            bias = self._bias(call, i, hidden.device)
            if bias is not None:
                gone = call.kv.gone(i, hidden.shape[1])
                mask = masks.add_bias(self._whole(call, i, hidden, mask), bias, hidden.dtype, gone)
            call.masks[key] = mask
        return call.masks[key]

    def _bias(self, call: Call, i: int, device: torch.device) -> Tensor | None:
        """(B, entries + q) what methods add to the attention logits of layer i's entries; None where nothing is."""
        pieces = _pieces(call, i, device)
        if all(piece.bias is None for piece in pieces):
            return None
        return torch.cat([piece.biases(device) for piece in pieces], dim=1)

    def _whole(self, call: Call, i: int, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """A mask to add biases to, where the backend would do without one."""
        if mask is not None:
            return mask
        if not self.is_causal and call.past == 0:
            return torch.ones(
                call.batch, 1, hidden.shape[1], hidden.shape[1], dtype=torch.bool, device=hidden.device
            )
        made = self.rebuild(call, i, hidden, all_visible=False)
        assert isinstance(made, Tensor)
        return made

    def looks_back(self, call: Call, i: int) -> bool:
        """Whether the conversation is longer than layer i looks back."""
        span = self._local[i][1]
        return span is not None and call.past + call.length > span

    # Decoding steps come by the hundred and cost a launch per operation: nothing here is called that need not be.

    def needs_none(self, call: Call, hidden: Tensor, stock: Any) -> bool:
        """Whether, in a decoding step, every layer does without a mask as layer 0 does."""
        if stock is not None or hidden.shape[1] != 1 or call.kv.spans_more:
            return False
        assert call.record is not None
        for own in call.record.layers:
            if own is not None and (own.visible is not None or own.bias is not None):
                return False
        return call.past + 1 <= self.shortest

    def of_step(self, call: Call, hidden: Tensor, stock: Any) -> list[Any] | None:
        """The masks of a decoding step by layer, made once for those that share it; `KEEP`: the model's own is right.

        A mask is a constant prefix, laid down with the record, and the columns since: an operation per group of layers.
        None where that is not all there is to it: windows that are exceeded, static caches, several devices, back ends
        that take no such masks.
        """
        record, total = call.record, call.past + 1
        backend = attention_backend(self.text_config)
        if hidden.shape[1] != 1 or call.kv.spans_more or total > self.shortest:
            return None
        assert record is not None
        given, since = call.attention, total - record.length
        if backend not in ("sdpa", "eager") or (
            stock is not None and (given is None or given.shape[1] != total)
        ):
            return None
        tails: dict[torch.dtype, Tensor] = {}
        made: dict[int, Any] = {}
        first, found = record.layers[record.first], []
        for own, has_mask in zip(record.layers, self._attends, strict=True):
            if not has_mask:
                found.append(KEEP)
                continue
            if id(own) not in made:
                if own is None or (
                    own.bias is None and (own is first or (stock is None and own.visible is None))
                ):
                    made[id(own)] = KEEP
                elif own.index.device != hidden.device:
                    return None
                else:
                    dtype = hidden.dtype if own.bias is not None or backend == "eager" else torch.bool
                    prefix = own.prefix(dtype)
                    if dtype not in tails:
                        tails[dtype] = _tail(given if stock is not None else None, prefix, since)
                    made[id(own)] = torch.cat([prefix, tails[dtype]], dim=-1)
            found.append(made[id(own)])
        return found

    def _make(self, call: Call, i: int, hidden: Tensor, stock: Any) -> Any:
        own, old = _new(call), _cached(call, i)
        fillers = any(c is not None and c.visible is not None for c in (own, old))
        if own is not None and call.past == 0:
            if isinstance(stock, Tensor):
                entries = own.length
                if call.kv.spans_more:
                    entries, _ = call.cache.get_mask_sizes(own.length, i)
                return masks.gather(stock, own.index.clamp(min=0), own.visible, entries)
            if stock is None and not call.kv.spans_more:
                if not fillers:
                    return None
                if not self.is_causal:
                    return masks.hide(torch.ones(1, 1, 1, own.length, dtype=torch.bool), own.visible)
        if stock is None and not self.looks_back(call, i) and not fillers and hidden.shape[1] == 1:
            return None
        return self.rebuild(call, i, hidden, all_visible=stock is None)

    def rebuild(self, call: Call, i: int, hidden: Tensor, all_visible: bool) -> Any:
        """Layer i's mask from scratch.

        Args:
            call: the call.
            i: decoder layer.
            hidden: states entering it.
            all_visible: whether the conversation is known to have no padding.
        """
        open_everywhere = all_visible and not any(
            c is not None and c.visible is not None for c in (_new(call), _cached(call, i))
        )
        visible = None
        if call.kv.spans_more or not open_everywhere:
            visible = self.entries(call, i, hidden)
        within = self._within(call, i, hidden) if self.looks_back(call, i) else None
        blocks = None
        seen_both_ways = not self._block_kinds or self.kinds[i] in self._block_kinds
        if call.blocks is not None and seen_both_ways and hidden.shape[1] > 1:
            columns = self._columns(call, i, hidden)
            own = call.blocks.to(hidden.device)
            blocks = own.gather(1, columns.clamp(0, own.shape[1] - 1)).masked_fill(
                columns >= own.shape[1], -1
            )
        return masks.rebuild(self.text_config, hidden, visible, call.cache, i, within, blocks)

    def entries(self, call: Call, i: int, hidden: Tensor) -> Tensor:
        """(B, entries + q) bool: which of layer i's cached entries and of the q new ones are real tokens."""
        old, own = _cached(call, i), _new(call)
        given = call.attention
        if given is not None and given.shape[1] != call.past + call.length:
            given = None
        parts: list[Tensor | int] = []
        start = 0
        if old is not None and call.record is not None:
            parts.append(old.length if old.visible is None else old.visible)
            start = call.record.length
        end = call.past if own is not None else call.past + call.length
        parts.append(max(0, end - start) if given is None else given[:, start:end] != 0)
        if own is not None:
            parts.append(own.length if own.visible is None else own.visible)
        # What is not written yet, causality hides.
        parts.append(call.kv.unwritten(i, sum(p if isinstance(p, int) else p.shape[1] for p in parts)))
        device = hidden.device
        return torch.cat(
            [
                torch.ones(call.batch, p, dtype=torch.bool, device=device)
                if isinstance(p, int)
                else p.to(device)
                for p in parts
            ],
            dim=1,
        )

    def _columns(self, call: Call, i: int, hidden: Tensor) -> Tensor:
        """(B, entries + q) as `columns` gives them; of a static cache's unwritten entries, the end."""
        known = columns(call, i, hidden.device)
        if not call.kv.spans_more:
            return known
        total = call.past + call.length
        unwritten = max(total, call.kv.unwritten(i, 0))
        return torch.cat([known, known.new_full((call.batch, unwritten), total)], dim=1)

    def _within(self, call: Call, i: int, hidden: Tensor) -> Callable[..., Tensor]:
        """How far back layer i looks, in original columns."""
        kind, span = self._local[i]
        assert span is not None
        padding = _padding(call)
        if padding is None:
            padding = torch.zeros(call.batch, dtype=torch.long)
        return masks.reach(kind, span, self._columns(call, i, hidden), padding.to(hidden.device))


def _of_recurrent(own: Columns | None, hidden: Tensor, stock: Any) -> Tensor | None:
    """(B, L') of a layer that folds its tokens into a state: those left, closed up; filler, leftmost, adds nothing."""
    if own is None or hidden.shape[1] == 1:
        return stock
    if isinstance(stock, Tensor):
        return masks.gather(stock, own.index.clamp(min=0), own.visible, own.length)
    return None if own.visible is None else own.visible.to(hidden.device)


def _tail(given: Tensor | None, prefix: Tensor, since: int) -> Tensor:
    """(B, 1, 1, since) of the columns behind a prefix (B, 1, 1, C): as a call's 2D mask says, or all seen."""
    if given is None:
        if prefix.dtype == torch.bool:
            return prefix.new_ones(*prefix.shape[:3], since)
        return prefix.new_zeros(*prefix.shape[:3], since)
    own = given[:, given.shape[1] - since :].view(-1, 1, 1, since)
    if own.device != prefix.device:
        own = own.to(prefix.device)
    if prefix.dtype == torch.bool:
        return own != 0
    made = (own == 0) * torch.finfo(prefix.dtype).min
    return made if made.dtype == prefix.dtype else made.to(prefix.dtype)


def columns(call: Call, i: int, device: torch.device) -> Tensor:
    """(B, entries + q): the original columns of layer i's cached entries and of the q new ones."""
    own = _new(call)
    parts = [
        piece.index.to(device) + (call.past if piece is own else 0) for piece in _pieces(call, i, device)
    ]
    return torch.cat(parts, dim=1)


def _pieces(call: Call, i: int, device: torch.device) -> list[Columns]:
    """Layer i's entries and the new ones, in order: what is recorded, columns of which all are there, this call's.

    The last one's are counted from this call's first column, as `Stages.done` has them.
    """
    old, own = _cached(call, i), _new(call)
    start = 0 if old is None or call.record is None else call.record.length
    end = call.past + call.length if own is None else call.past
    whole = Columns(torch.arange(start, end, device=device).expand(call.batch, -1), None)
    return [piece for piece in (old, whole, own) if piece is not None]


def _padding(call: Call) -> Tensor | None:
    """(B,) columns of padding before each row's first token."""
    known = call.visible if call.attention is None else call.attention != 0
    if known is not None:
        return known.long().argmax(1)
    return None if call.record is None else call.record.padding


def _new(call: Call) -> Columns | None:
    """Columns of this call that are left so far; None before its first cut."""
    return call.stages.done[-1] if call.stages is not None and call.cuts_done else None


def _cached(call: Call, i: int) -> Columns | None:
    """What is recorded of layer i's cache; None when it holds every column."""
    return None if call.record is None else call.record.layers[i]
