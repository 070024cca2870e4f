"""Looking ahead: the first decoder layers run on an image's tokens alone, so that a cut before the LLM can score them.

The stock text model is called for it, as somebody else's call, and left as soon as the states are there. Nothing of it
is cached; what is kept goes through these layers again, with the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune.models.decoders import attention_backend
from tokenprune.runtime.call import Call
from tokenprune.runtime.flops import prefill_flops
from tokenprune.runtime.layer_states import Ahead, EnoughSeen, LayerStates
from tokenprune.runtime.plan import Key
from tokenprune.runtime.wrapped import Wrapped


def look_ahead(
    runtime: Wrapped, call: Call, hidden: Tensor, kwargs: Mapping[str, Any]
) -> tuple[Tensor, LayerStates | None]:
    """What the method's layer would see of each image if there were nothing else in the prompt.

    Args:
        runtime: whose text model it is.
        call: under way; its first cut is before the LLM.
        hidden: (B, L, D) what enters layer 0.
        kwargs: the text model's arguments, for the positions.

    Returns:
        (B, L, D) states entering layer `Needs.ahead`, and the states of the layer before it; both hold zeros where no
        image is. Without deep-stack features, and causal within an image.
    """
    needs, stages = call.config.needs_at(0), call.stages
    assert needs.ahead is not None and stages is not None
    ids = kwargs.get("position_ids")
    if "flash" in attention_backend(runtime.text_config):
        ids = None  # gaps in them would be read as packed sequences
    found: dict[Key, Ahead] = {}
    by_size: dict[int, list[Key]] = {}
    for key, image in stages.images.items():
        by_size.setdefault(image.n, []).append(key)
    for n, keys in by_size.items():
        states = torch.stack([stages.take(hidden, key) for key in keys])
        own = (
            None
            if ids is None
            else torch.cat([_columns(ids, key[0], stages.column_of(key)) for key in keys], -2)
        )
        seen = _run(runtime, needs.ahead, needs.projected, states, own)
        for i, key in enumerate(keys):
            found[key] = seen.row(i)
        call.flops_ahead += len(keys) * prefill_flops(runtime.costs, [n] * needs.ahead)
    return _spread(runtime, call, hidden, found)


def seen_ahead(ahead: Ahead, i: int, hidden: Tensor) -> None:
    """States that enter layer i while the text model runs on images alone: it is left where they are what is wanted."""
    if i == ahead.layer:
        ahead.hidden = hidden
        raise EnoughSeen


def _run(runtime: Wrapped, layer: int, states: tuple[str, ...], embeds: Tensor, ids: Tensor | None) -> Ahead:
    """The text model on embeddings (m, n, D), up to where a layer's states are known."""
    calls = runtime.calls
    ahead = calls.ahead = Ahead(layer, states)
    try:
        runtime.family.text_model()(
            inputs_embeds=embeds, position_ids=ids, attention_mask=None, use_cache=False
        )
    except EnoughSeen:
        pass
    finally:
        calls.ahead = None
    return ahead


def _columns(ids: Tensor, row: int, columns: Tensor) -> Tensor:
    """Position ids (..., B | 1, L) of a row's columns: (..., 1, n)."""
    own = ids.select(-2, row if ids.shape[-2] > 1 else 0)
    return own.index_select(-1, columns.to(ids.device)).unsqueeze(-2)


def _spread(
    runtime: Wrapped, call: Call, hidden: Tensor, found: Mapping[Key, Ahead]
) -> tuple[Tensor, LayerStates | None]:
    """What was seen image by image, at the images' columns of the whole batch."""
    stages = call.stages
    assert stages is not None

    def whole(parts: Mapping[Key, Tensor]) -> Tensor:
        first = next(iter(parts.values()))
        out = first.new_zeros(call.batch, call.length, *first.shape[1:])
        for key, part in parts.items():
            out[key[0]].index_copy_(0, stages.column_of(key).to(part.device), part)
        return out

    entering = {key: own.hidden for key, own in found.items() if own.hidden is not None}
    states = whole(entering) if entering else hidden
    caught = {key: own.caught for key, own in found.items() if own.caught is not None}
    if not caught:
        return states, None
    first = next(iter(caught.values()))
    ropes = [_parts(runtime, own.rope) for own in caught.values()]
    spread = iter([whole(dict(zip(caught, parts, strict=True))) for parts in zip(*ropes, strict=True)])
    rope = runtime.decoder.rope_of(first.rope, lambda _: next(spread))
    raw = {name: whole({key: own.raw[name] for key, own in caught.items()}) for name in first.raw}
    return states, LayerStates(runtime.decoder, first.module, rope, raw)


def _parts(runtime: Wrapped, rope: Any) -> list[Tensor]:
    """The tensors of a rotary embedding, each (n, ...)."""
    parts: list[Tensor] = []
    runtime.decoder.rope_of(rope, lambda part: parts.append(part) or part)  # type: ignore[func-returns-value]
    return parts
