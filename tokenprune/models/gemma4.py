"""Gemma 4: pictures of any shape, patches pooled 3 x 3; a picture is seen both ways in the layers with windows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.hashing import digest, mix
from tokenprune.models.base import Family, Layout, VisionCall, VisionTap
from tokenprune.models.crops import checked_layer
from tokenprune.tokens import Grid, IntArray, VisionAttention

_INPUTS = {
    "image": ("pixel_values", "image_position_ids"),
    "video": ("pixel_values_videos", "video_position_ids"),
}


class Gemma4(Family):
    """The tower gets patches and their places, padded to the largest picture; a video's frames are pictures to it."""

    name = "gemma4"
    model_types = ("gemma4",)
    examples = ("google/gemma-4-26B-A4B-it", "google/gemma-4-31B-it")
    sizes_ahead = True  # its tower does not know videos
    block_kinds = ("sliding_attention",)

    def check_model(self, model: nn.Module) -> None:
        text: Any = self.text_model(model).config
        if text.hidden_size_per_layer_input or text.num_kv_shared_layers:
            raise UnsupportedModelError(
                "Gemma 4 E2B and E4B are not supported: their layers get an input of their own for every token, and "
                "the last ones borrow keys of earlier ones, which nobody here shortens; 26B-A4B and 31B are"
            )

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return self.base(model).vision_tower  # type: ignore[return-value]

    def tower_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        places = args[1] if len(args) > 1 else kwargs["pixel_position_ids"]
        return args[0] if args else kwargs["pixel_values"], _sizes(places)

    def sizes(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        found = {}
        for kind, (pixels, places) in _INPUTS.items():
            if inputs.get(pixels) is None:
                continue
            own = _sizes(inputs[places].flatten(0, -3))
            if kind == "video":  # frames of all, in order; before transformers 5.24 by video
                given = inputs.get("num_frames_per_video")
                frames = (
                    own.new_full(inputs[places].shape[:1], inputs[places].shape[1])
                    if given is None
                    else given
                )
                frames = torch.as_tensor(frames, device=own.device)
                own = own[frames.cumsum(0) - frames]
                own = torch.cat([frames[:, None], own[:, 1:]], dim=1)
            found[kind] = own
        return found

    def layouts(self, model: nn.Module, kind: str, sizes: IntArray) -> list[Layout]:
        config: Any = model.config
        merge = config.vision_config.pooling_kernel_size
        return [
            Layout((Grid(int(t), int(h) // merge, int(w) // merge, merge),), items=int(t))
            for t, h, w in sizes
        ]

    def blocks(self, inputs: Mapping[str, Any], total: int) -> Tensor | None:
        types = inputs.get("mm_token_type_ids")
        if types is None:
            return None
        vision = torch.nn.functional.pad((types == 1) | (types == 2), (total - types.shape[1], 0))
        first = vision & ~torch.nn.functional.pad(vision, (1, -1))
        return torch.where(vision, first.long().cumsum(1), -1)

    def digests(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        place = torch.arange(pixels.shape[-2], device=pixels.device)
        real = place < sizes.to(pixels.device).prod(-1, keepdim=True)
        hashes = mix(digest(pixels.flatten(0, -3), 2) + place)
        return (hashes * real).sum(-1)

    def vision_tap(self, model: nn.Module, layer: int | None = None) -> VisionTap:
        tower: Any = self.vision_tower(model)
        layers = tower.encoder.layers
        attention = layers[checked_layer(-1 if layer is None else layer, len(layers))].self_attn
        return VisionTap(
            attention, (attention.q_norm, attention.k_norm), partial(attend, attention), packed=True
        )

    def pixel_scale(self, model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def patches(self, model: nn.Module, pixels: Tensor, sizes: IntArray | None) -> list[Tensor]:
        assert sizes is not None
        config: Any = model.config
        p = config.vision_config.patch_size
        whole = pixels.flatten(0, -3).unflatten(-1, (p, p, 3)).movedim(-1, 2)
        return [own[:n] for own, n in zip(whole, sizes.prod(-1).tolist(), strict=True)]


def _sizes(places: Tensor) -> Tensor:
    """(N, 3) frames (1), rows and columns of patches, from their places (N, m, 2), x before y, -1 behind the last."""
    width, height = (places.amax(1) + 1).unbind(-1)
    return torch.stack([torch.ones_like(width), height, width], dim=1)


def attend(attention: Any, call: VisionCall) -> list[list[VisionAttention]]:
    """The attention of each picture, padding left out."""
    from transformers.models.gemma4.modeling_gemma4 import apply_multidimensional_rope

    assert call.sizes is not None
    places, rope = call.attention["position_ids"], call.attention["position_embeddings"]
    turned = [apply_multidimensional_rope(x, *rope, places) for x in call.outputs]
    # Fewer heads of keys than of queries: each serves several.
    query, key = (
        x.repeat_interleave(turned[0].shape[2] // x.shape[2], dim=2).transpose(1, 2) for x in turned
    )
    counts = call.sizes.prod(-1).tolist()
    return [
        [VisionAttention(q[:, :n], k[:, :n], attention.scaling, has_cls=False)]
        for q, k, n in zip(query, key, counts, strict=True)
    ]
