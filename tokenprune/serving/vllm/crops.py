"""Models whose tower is given square crops (CLIP, SigLIP, InternViT), with one axis of positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import ConfigError
from tokenprune.models.base import Layout
from tokenprune.serving.vllm.ahead import check_decoder, decoder_states
from tokenprune.serving.vllm.model import PrunedModel
from tokenprune.tokens import VisionAttention


class PrunedCrops(PrunedModel):
    """In front of one of vLLM's models of the kind."""

    language_model: Any
    vision_tower: Any

    def check_served(self) -> None:
        self._has_cls = self.config.vision_config.model_type != "siglip_vision_model"
        self._query = self._key = torch.empty(0)  # of the tower's last layer, (crops, m, heads * head_dim)
        if getattr(self.config, "vision_feature_select_strategy", "default") != "default" and self._has_cls:
            raise ConfigError(
                "vision_feature_select_strategy='full' keeps the CLS token; it is not served pruned"
            )
        ahead = self.settings.method.needs().ahead
        if ahead is not None:
            check_decoder(self.language_model.model)
            if ahead > len(self.language_model.model.layers):
                raise ConfigError(f"the decoder has fewer than the {ahead} layers that are looked ahead")

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

    def crops_of(self, fields: Mapping[str, Any], layouts: Sequence[Layout]) -> Iterator[Tensor]:
        """The crops (c, 3, H, W) of each picture as the tower is given them, padding after them included."""
        for pixels in fields["pixel_values"]:
            yield pixels if pixels.ndim == 4 else pixels[None]

    def seen(
        self, fields: Mapping[str, Any], kind: str, layouts: Sequence[Layout], features: Sequence[Tensor]
    ) -> Iterator[dict[str, Any]]:
        needs, first = self.settings.method.needs(), 0
        for layout, crops, own in zip(layouts, self.crops_of(fields, layouts), features, strict=True):
            shown: dict[str, Any] = {}
            if needs.vision is not None:
                told = [needs.vision(self._attention(first + i)) for i in range(layout.items)]
                shown["vision"] = self.of_tokens(layout, told)
            if needs.pixels is not None:
                told = [needs.pixels(patches) for patches in self.pictures.eight_bit(crops[: layout.items])]
                shown["pixels"] = self.of_tokens(layout, told)
            if needs.ahead is not None:
                shown |= decoder_states(self.language_model.model, own, needs.ahead, needs.states)
            first += len(crops)
            yield shown
        self._query = self._key = torch.empty(0)

    def _attention(self, crop: int) -> VisionAttention:
        module = self.tower_attention
        query, key = (
            x[crop].unflatten(-1, (-1, module.head_dim)).transpose(0, 1) for x in (self._query, self._key)
        )
        return VisionAttention(query, key, module.scale, self._has_cls)

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The decoder has one axis; the three are equal."""
        positions = positions[0] if positions.ndim == 2 else positions
        return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]
