"""The model's part of pruning: the encoder's rows are chosen and carry their positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import ConfigError
from tokenprune.models.base import Layout
from tokenprune.serving.vllm.ahead import check_decoder, decoder_states
from tokenprune.serving.vllm.choosing import choose_rows
from tokenprune.serving.vllm.cpu import mend_runner
from tokenprune.serving.vllm.layout import Pictures, structural
from tokenprune.serving.vllm.positions import first_positions, true_positions, with_channels
from tokenprune.serving.vllm.processing import KEPT, WHOLE
from tokenprune.serving.vllm.settings import read_settings
from tokenprune.tokens import VisionAttention


class PrunedImages:
    """In front of one of vLLM's models like LLaVA: a CLIP or SigLIP tower, a decoder with one axis of positions."""

    # vLLM's protocols by their marks, not as bases: a Protocol among them would have its own __init__ run.
    supports_mrope = True
    supports_multimodal_pruning = True
    supported_video_pruning_methods = ("evs",)
    config: Any
    language_model: Any
    vision_tower: Any
    pictures: Pictures

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        mend_runner()
        self.settings = read_settings(self.config.tokenprune)
        self.pictures = self.make_pictures(self.config)
        self._has_cls = self.config.vision_config.model_type != "siglip_vision_model"
        self._query = self._key = torch.empty(0)  # of the tower's last layer, (crops, m, heads * head_dim)
        if getattr(self.config, "vision_feature_select_strategy", "default") != "default" and self._has_cls:
            raise ConfigError(
                "vision_feature_select_strategy='full' keeps the CLS token; it is not served pruned"
            )
        needs = self.settings.method.needs()
        if needs.ahead is not None:
            check_decoder(self.language_model.model)
            if needs.ahead > len(self.language_model.model.layers):
                raise ConfigError(
                    f"the decoder has fewer than the {needs.ahead} layers that are looked ahead"
                )
        if needs.vision is not None:
            self.watch_tower()

    @staticmethod
    def make_pictures(config: Any) -> Pictures:
        """The family's arithmetic."""
        raise NotImplementedError

    @property
    def tower_attention(self) -> Any:
        """Of the tower's layer that yields the features: vLLM makes no later ones."""
        return getattr(self.vision_tower, "vision_model", self.vision_tower).encoder.layers[-1].self_attn

    def watch_tower(self) -> None:
        """Note queries and keys of that layer whenever it runs."""

        def note(_module: Any, _args: Any, output: Any) -> None:
            query, key, _ = output[0].chunk(3, dim=-1)
            self._query, self._key = self._of_all_heads(query), self._of_all_heads(key)

        self.tower_attention.qkv_proj.register_forward_hook(note)

    def _of_all_heads(self, x: Tensor) -> Tensor:
        """What every rank of a tensor-parallel tower has, so that all of them choose alike."""
        from vllm.distributed import tensor_model_parallel_all_gather

        module = self.tower_attention
        whole = module.num_heads * module.head_dim
        return x if x.shape[-1] == whole else tensor_model_parallel_all_gather(x.contiguous(), dim=-1)

    @property
    def placeholder(self) -> int:
        """The id that stands for a row of a picture."""
        return int(self.config.image_token_index)

    # -- pictures ---------------------------------------------------------------------------------------------------

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Rows of each picture that stay, with their channels."""
        kept: Any = kwargs.pop(KEPT, None)
        kwargs.pop(WHOLE, None)
        features = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        if kept is None:
            return features
        found, first = [], 0
        counts = torch.as_tensor(kept).flatten().tolist()
        for own, count, (layout, crops) in zip(
            features, counts, self.given(kwargs, len(counts)), strict=True
        ):
            found.append(self._pruned(own, count, layout, crops, first))
            first += len(crops)
        self._query = self._key = torch.empty(0)
        return tuple(found)

    def given(self, kwargs: Mapping[str, Any], count: int) -> Iterator[tuple[Layout, Tensor]]:
        """Of each picture the encoder is given, where its tokens stand, and its crops (c, 3, H, W)."""
        pixels, sizes = kwargs["pixel_values"], kwargs.get("image_sizes")
        for i in range(count):
            height, width = (0, 0) if sizes is None else torch.as_tensor(sizes[i]).flatten().tolist()
            yield self.pictures.layout(height, width), pixels[i] if pixels[i].ndim == 4 else pixels[i][None]

    def _pruned(self, features: Tensor, count: int, layout: Layout, crops: Tensor, first: int) -> Tensor:
        stays = structural(layout, features.device)
        rows, kept = choose_rows(
            self.settings.method,
            features[~stays],
            count,
            layout.grids,
            self._shown(features[~stays], layout, crops, first),
            self.config.text_config.num_attention_heads,
        )
        columns = (~stays).nonzero()[:, 0].index_select(0, kept)
        always = stays.nonzero()[:, 0]
        places, order = torch.cat([columns, always]).sort()
        return with_channels(torch.cat([rows, features[stays]])[order], places, layout.columns)

    def _shown(self, features: Tensor, layout: Layout, crops: Tensor, first: int) -> dict[str, Any]:
        """What the method wants to see of a picture."""
        needs = self.settings.method.needs()
        shown: dict[str, Any] = {}
        if needs.vision is not None:
            told = [needs.vision(self._attention(first + i)) for i in range(layout.items)]
            shown["vision"] = self._of_tokens(layout, told)
        if needs.pixels is not None:
            told = [needs.pixels(patches) for patches in self.pictures.eight_bit(crops[: layout.items])]
            shown["pixels"] = self._of_tokens(layout, told)
        if needs.ahead is not None:
            shown |= decoder_states(self.language_model.model, features, needs.ahead, needs.states)
        return shown

    def _of_tokens(self, layout: Layout, told: Sequence[Tensor]) -> Tensor:
        whole = torch.stack([own if own.ndim == 2 else own[:, None] for own in told])
        tokens = self.pictures.to_tokens(layout, whole)
        return tokens if told[0].ndim == 2 else tokens[:, 0]

    def _attention(self, crop: int) -> VisionAttention:
        module = self.tower_attention
        query, key = (
            x[crop].unflatten(-1, (-1, module.head_dim)).transpose(0, 1) for x in (self._query, self._key)
        )
        return VisionAttention(query, key, module.scale, self._has_cls)

    # -- positions --------------------------------------------------------------------------------------------------

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
        images = []
        for feature in mm_features:
            place, whole = feature.mm_position, torch.as_tensor(feature.data[WHOLE].data)
            mask = torch.ones(place.length, dtype=torch.bool) if place.is_embed is None else place.is_embed
            images.append(
                (place.offset + int(mask.long().argmax()), int(mask.sum()), int(whole.flatten()[0]))
            )
        return first_positions(input_tokens, sorted(images))

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        if not multimodal_embeddings:  # decoding, and chunks without images: all is known already
            return multimodal_embeddings, mrope_positions, int(mrope_positions[0, -1]) + 1 - len(input_ids)
        tokens = torch.as_tensor(input_ids)
        placeholder = self.placeholder
        rows, positions = true_positions(
            tokens, placeholder, multimodal_embeddings, mrope_positions, num_computed_tokens
        )
        return rows, positions, int(positions[0, -1]) + 1 - len(tokens)

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The decoder has one axis; the three are equal."""
        positions = positions[0] if positions.ndim == 2 else positions
        return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]
