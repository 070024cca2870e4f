"""Towers that are given pictures of any size in one sequence, or padded to the largest, patches row by row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tokenprune.models.base import Family, VisionCall, VisionTap, turn
from tokenprune.models.qwen2_vl import Qwen2VL
from tokenprune.tokens import Image, IntArray, VisionAttention


class Packed(Qwen2VL):
    """Qwen2-VL's inputs; but the patches of a token do not stand one after the other."""

    @abstractmethod
    def vision_attentions(self, tower: Any) -> list[nn.Module]:
        """The attention modules of the tower's layers, up to the one that yields the features."""

    def vision_sources(self, attention: Any) -> tuple[nn.Module, nn.Module]:
        """The modules whose outputs are the queries and keys."""
        return attention.q_proj, attention.k_proj

    def counts(self, sizes: IntArray) -> list[int]:
        """Patches of each picture."""
        return sizes.prod(-1).tolist()

    def tower_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        pixels = args[0] if args else kwargs["pixel_values"]
        return pixels.flatten(0, -4), kwargs["grid_thw"] if len(args) < 2 else args[1]

    def vision_tap(self) -> VisionTap:
        attention: Any = self.vision_attentions(self.vision_tower())[-1]

        def read(call: VisionCall) -> list[list[VisionAttention]]:
            assert call.sizes is not None
            return self.attend_each(attention, call, self.counts(call.sizes))

        return VisionTap(attention, self.vision_sources(attention), read, packed=True)

    def attend_each(
        self, attention: Any, call: VisionCall, counts: Sequence[int]
    ) -> list[list[VisionAttention]]:
        """The attention of each picture, which attends within itself."""
        cos, sin = (part.flatten(0, -2) for part in call.attention["position_embeddings"])
        query, key = (x.flatten(0, -2).unflatten(-1, (-1, attention.head_dim)) for x in call.outputs)
        query, key = (turn(x, cos, sin).transpose(0, 1) for x in (query, key))
        pairs = zip(query.split(counts, dim=1), key.split(counts, dim=1), strict=True)
        return [[VisionAttention(q, k, attention.scaling, has_cls=False)] for q, k in pairs]

    def patches(self, pixels: Tensor, sizes: IntArray | None) -> list[Tensor]:
        assert sizes is not None
        return list(pixels.split(sizes.prod(-1).tolist()))

    def to_tokens(self, patches: Tensor, image: Image) -> Tensor:
        return Family.to_tokens(self, patches, image)
