"""Attention masks for layers that hold fewer tokens than the model thinks.

Two rules, both needed. Fresh prefill: gather rows and columns of the mask the model built, which keeps whatever
structure it has. With a cache: rebuild it with transformers' own function, sized for the layer; where a layer looks
back only so far, distances are counted in original columns. Neither copies anything from the device to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from tokenprune.models.decoders import attention_backend


def local_attention(config: Any, layer: int) -> tuple[str, int | None]:
    """A layer's type of attention, and how many columns it spans (None: all of them)."""
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    types = getattr(config, "layer_types", None)
    kind = types[layer] if types else "sliding_attention" if window else "full_attention"
    return kind, {"sliding_attention": window, "chunked_attention": chunk}.get(kind)


def reach(kind: str, span: int, columns: Tensor, padding: Tensor) -> Callable[..., Tensor]:
    """Which entries a layer of local attention sees, as a mask function of transformers.

    Args:
        kind: "sliding_attention" or "chunked_attention".
        span: columns it spans.
        columns: (B, C) original column of each entry, those to come included.
        padding: (B,) columns of padding on the left, before the first chunk.
    """

    def window(batch: Tensor, head: Tensor, query: Tensor, entry: Tensor) -> Tensor:
        return columns[batch, query] - columns[batch, entry] < span

    def chunk(batch: Tensor, head: Tensor, query: Tensor, entry: Tensor) -> Tensor:
        first = padding[batch]
        return (columns[batch, query] - first) // span == (columns[batch, entry] - first) // span

    return chunk if kind == "chunked_attention" else window


def _same_block(blocks: Tensor) -> Callable[..., Tensor]:
    """Entries (B, C) of one block see each other, as a mask function of transformers.

    Not by `block_sequence_ids`: transformers lets these reach beyond a window, and Gemma 3 does not.
    """
    last = blocks.shape[1] - 1  # a static cache's unwritten entries come behind

    def both_ways(batch: Tensor, head: Tensor, query: Tensor, entry: Tensor) -> Tensor:
        own, other = (blocks[batch, at.clamp(max=last)] for at in (query, entry))
        return (own == other) & (own >= 0)

    return both_ways


def gather(mask: Tensor, index: Tensor, visible: Tensor | None, entries: int) -> Tensor:
    """Rows and columns `index` of a mask.

    Args:
        mask: (B | 1, heads | 1, L, L or more) bool or additive, or (B, L) as flash attention takes it.
        index: (B, L') columns, filler clamped to 0.
        visible: (B, L') False where the result must be masked; None for nowhere.
        entries: columns of the result, the ones behind L' masked: a static cache has more than it uses.
    """
    batch = index.shape[0]
    index = index.to(mask.device)
    if mask.ndim == 2:
        short = mask.expand(batch, -1).gather(1, index)
        return short if visible is None else short & visible.to(mask.device, short.dtype)
    mask = mask.expand(batch, -1, -1, -1)
    rows = index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    unused = entries - index.shape[1]
    if unused:
        used = torch.ones_like(index, dtype=torch.bool) if visible is None else visible.to(index.device)
        visible = torch.nn.functional.pad(used, (0, unused))
        index = torch.nn.functional.pad(index, (0, unused))
    columns = index[:, None, None, :].expand(-1, mask.shape[1], rows.shape[2], -1)
    return hide(mask.gather(2, rows).gather(3, columns), visible)


def hide(mask: Tensor, visible: Tensor | None) -> Tensor:
    """Mask the columns of a 4D mask that are not visible."""
    if visible is None:
        return mask
    keep = visible.to(mask.device)[:, None, None, :]
    if mask.dtype == torch.bool:
        return mask & keep
    return mask.masked_fill(~keep, torch.finfo(mask.dtype).min)


def add_bias(mask: Tensor, bias: Tensor, dtype: torch.dtype, gone: int = 0) -> Tensor:
    """A 4D mask, bool or additive, with a bias on its columns; additive, in the dtype of the queries.

    Args:
        mask: (B | 1, heads | 1, q, columns).
        bias: (B, entries) of all entries a layer was given.
        dtype: of the queries.
        gone: entries that the layer's cache has let go of, the mask's first column being the one behind them.
    """
    bias = bias[:, gone : gone + mask.shape[-1]]
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    given = torch.nn.functional.pad(bias, (0, mask.shape[-1] - bias.shape[1])).to(mask.device, dtype)
    # What is masked stays so: the least number and a bias may leave the dtype's range.
    return (mask + given[:, None, None, :]).clamp(min=torch.finfo(dtype).min)


def rebuild(
    config: Any,
    hidden: Tensor,
    visible: Tensor | None,
    cache: Any,
    layer: int,
    within: Callable[..., Tensor] | None = None,
    blocks: Tensor | None = None,
) -> Tensor | None:
    """A causal mask for `hidden` (B, q, D) entering `layer`, over its cached entries and the q new ones.

    Args:
        config: the text model's config.
        hidden: only its shape, dtype and device are read.
        visible: (B, entries + q) bool; None when all are visible (then backends that can do without a mask do).
        cache: the call's cache or None.
        layer: decoder layer index.
        within: see `reach`; None when the layer sees every entry there is.
        blocks: (B, entries + q) entries of one block attend to each other both ways, as far as a layer looks; -1 for no
            block.
    """
    if "flash" in attention_backend(config):
        return visible
    # With padding the function would look at the mask's values (a device-to-host copy) to see whether it can be
    # left out; we know it cannot.
    mask: Tensor | None = create_causal_mask(
        config,
        hidden,
        None if visible is None else visible.to(hidden.device),
        cache,
        position_ids=None,
        or_mask_function=None if blocks is None else _same_block(blocks),
        and_mask_function=within,
        layer_idx=layer,
        allow_is_causal_skip=visible is None,
    )
    return mask
