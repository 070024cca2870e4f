"""The ideal a pruned prefill is measured against: stock layers, and nothing else but one gather.

It imports nothing from the runtime: index, positions, rotary embeddings and masks are made here from the keep
lists, before the clock starts. What is timed is layers[:K] at full length, one index_select, layers[K:] on the
shortened states with a cache, the norm and the head on the last position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from tokenprune.releases import cache_argument

KeepList = Sequence[int]
Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Ideal:
    """One prefill with known keep lists; call it to run it.

    Attributes:
        model: the stock model (LLaVA).
        layer: the decoder layer K the cut enters.
        embeds: (B, L, D) text and visual embeddings.
        index: (B * L') rows of the flattened states to keep.
        full, short: rotary cos and sin, position ids and mask before and after the cut.
    """

    model: Any
    layer: int
    embeds: Tensor
    index: Tensor
    full: tuple[Rope, Tensor, Tensor | None]
    short: tuple[Rope, Tensor, Tensor | None]

    def __call__(self) -> tuple[Tensor, DynamicCache]:
        """Logits of the last position, (B, vocabulary), and the cache."""
        text = self.model.model.language_model
        cache = DynamicCache(config=text.config)
        batch, _, width = self.embeds.shape
        hidden = self._layers(text.layers[: self.layer], self.embeds, self.full, cache)
        hidden = hidden.reshape(-1, width).index_select(0, self.index).view(batch, -1, width)
        hidden = self._layers(text.layers[self.layer :], hidden, self.short, cache)
        return self.model.lm_head(text.norm(hidden[:, -1])), cache

    @staticmethod
    def _layers(
        layers: Sequence[Any], hidden: Tensor, given: tuple[Rope, Tensor, Tensor | None], cache: DynamicCache
    ) -> Tensor:
        rope, position_ids, mask = given
        named: dict[str, Any] = {cache_argument(layers[0]): cache} if layers else {}
        for layer in layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rope,
                position_ids=position_ids,
                **named,
                use_cache=True,
            )
        return hidden


@torch.inference_mode()
def prepare(
    model: Any,
    inputs: dict[str, Tensor],
    features: Tensor,
    layer: int,
    keep_lists: Sequence[Sequence[KeepList]],
) -> Ideal:
    """Everything the ideal knows beforehand.

    Args:
        model: the stock model, not wrapped.
        inputs: input_ids, attention_mask and position_ids, (B, L) each.
        features: (images, n, D) projected visual features.
        layer: K.
        keep_lists: keep_lists[row][image] = kept raster indices.
    """
    text = model.model.language_model
    ids, mask, position_ids = inputs["input_ids"], inputs["attention_mask"] != 0, inputs["position_ids"]
    visual = ids == model.config.image_token_id
    embeds = text.embed_tokens(ids).masked_scatter(visual.unsqueeze(-1), features)

    rows = []
    for r in range(len(ids)):
        columns = visual[r].nonzero().flatten().split(features.shape[1])
        kept = [
            image[torch.as_tensor(k, device=ids.device)]
            for image, k in zip(columns, keep_lists[r], strict=True)
        ]
        rows.append(torch.cat([(mask[r] & ~visual[r]).nonzero().flatten(), *kept]).sort().values)
    longest = max(map(len, rows))
    index = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    visible = torch.stack([torch.arange(longest, device=ids.device) >= longest - len(row) for row in rows])
    short_ids = position_ids.gather(1, index)
    flat = index + torch.arange(len(ids), device=ids.device)[:, None] * ids.shape[1]
    return Ideal(
        model=model,
        layer=layer,
        embeds=embeds,
        index=flat.flatten(),
        full=(text.rotary_emb(embeds, position_ids), position_ids, _mask(text, embeds, mask)),
        short=(text.rotary_emb(embeds, short_ids), short_ids, _mask(text, embeds[:, :longest], visible)),
    )


def _mask(text: Any, states: Tensor, visible: Tensor) -> Tensor | None:
    """What the stock model makes for these states: None where nothing is padded and the backend needs no mask."""
    mask: Tensor | None = create_causal_mask(text.config, states, visible, None, position_ids=None)
    return mask
