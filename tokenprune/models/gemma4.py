"""Gemma 4: pictures of any shape, patches pooled 3 x 3; a picture is seen both ways in the layers with windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.hashing import digest, mix
from tokenprune.models.base import Layout, VisionCall, runs_of
from tokenprune.models.packed import Packed
from tokenprune.releases import frames_per_video
from tokenprune.tokens import Grid, IntArray, VisionAttention

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class Gemma4(Packed):
    """The tower gets patches and their places, padded to the largest picture; a video's frames are pictures to it."""

    name = "gemma4"
    model_types = ("gemma4",)
    examples = ("google/gemma-4-26B-A4B-it", "google/gemma-4-31B-it")
    mrope = False
    sizes_ahead = True  # its tower does not know videos
    block_kinds = ("sliding_attention",)

    def check_model(self) -> None:
        text: Any = self.text_model().config
        if text.hidden_size_per_layer_input or text.num_kv_shared_layers:
            raise UnsupportedModelError(
                "Gemma 4 E2B and E4B are not supported: their layers get an input of their own for every token, and "
                "the last ones borrow keys of earlier ones, which nobody here shortens; 26B-A4B and 31B are"
            )

    def vision_tower(self) -> nn.Module:
        return self.base().vision_tower  # type: ignore[return-value]

    def tower_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        places = args[1] if len(args) > 1 else kwargs["pixel_position_ids"]
        return args[0] if args else kwargs["pixel_values"], _sizes(places)

    def sizes(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        kinds = [kind for kind, pixels in _PIXELS.items() if inputs.get(pixels) is not None]
        found = {kind: _sizes(inputs[f"{kind}_position_ids"].flatten(0, -3)) for kind in kinds}
        if "video" in found:
            frames = frames_per_video(inputs, inputs["video_position_ids"])
            first = found["video"][frames.cumsum(0) - frames]
            found["video"] = torch.cat([frames[:, None], first[:, 1:]], dim=1)
        return found

    def layouts(self, kind: str, sizes: IntArray) -> list[Layout]:
        merge = self.config.vision_config.pooling_kernel_size
        return [Layout((Grid(t, h // merge, w // merge, merge),), items=t) for t, h, w in sizes.tolist()]

    def blocks(self, inputs: Mapping[str, Any], total: int) -> Tensor | None:
        types = inputs.get("mm_token_type_ids")
        return None if types is None else runs_of((types == 1) | (types == 2), total)

    def digests(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        place = torch.arange(pixels.shape[-2], device=pixels.device)
        real = place < sizes.to(pixels.device).prod(-1, keepdim=True)
        return (mix(digest(pixels.flatten(0, -3), 2) + place) * real).sum(-1)

    def vision_attentions(self, tower: Any) -> list[nn.Module]:
        return [layer.self_attn for layer in tower.encoder.layers]

    def vision_sources(self, attention: Any) -> tuple[nn.Module, nn.Module]:
        return attention.q_norm, attention.k_norm

    def attend_each(
        self, attention: Any, call: VisionCall, counts: Sequence[int]
    ) -> list[list[VisionAttention]]:
        from transformers.models.gemma4.modeling_gemma4 import apply_multidimensional_rope as turn

        rope, places = call.attention["position_embeddings"], call.attention["position_ids"]
        query, key = (turn(x, *rope, places).transpose(1, 2) for x in call.outputs)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        parts = ((q[:, :n], k[:, :n]) for q, k, n in zip(query, key, counts, strict=True))
        return [[VisionAttention(q, k, attention.scaling, has_cls=False)] for q, k in parts]

    def pixel_scale(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def patches(self, pixels: Tensor, sizes: IntArray | None) -> list[Tensor]:
        assert sizes is not None
        p = self.config.vision_config.patch_size
        whole = pixels.flatten(0, -3).unflatten(-1, (p, p, 3)).movedim(-1, 2)
        return [own[:n] for own, n in zip(whole, self.counts(sizes), strict=True)]


def _sizes(places: Tensor) -> Tensor:
    """(N, 3) frames (1), rows and columns of patches, from their places (N, m, 2), x before y, -1 behind the last."""
    width, height = (places.amax(1) + 1).unbind(-1)
    return torch.stack([torch.ones_like(width), height, width], dim=1)
