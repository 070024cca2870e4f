"""Qwen2-VL: native resolution, M-RoPE, images and videos."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenprune.errors import ConfigError
from tokenprune.hashing import digest, mix
from tokenprune.models.base import Family, Layout, VisionCall, VisionTap, turn
from tokenprune.models.crops import SCALES
from tokenprune.tokens import Grid, Image, IntArray, VisionAttention

_INPUTS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


class Qwen2VL(Family):
    """An image or video of (t, h, w) patches gives t x h/2 x w/2 tokens between vision start and end."""

    name = "qwen2_vl"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    examples: ClassVar[tuple[str, ...]] = ("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct")
    mrope = True

    def vision_tower(self) -> nn.Module:
        return self.base().visual  # type: ignore[return-value]

    def tower_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return args[0] if args else kwargs["hidden_states"], kwargs["grid_thw"] if len(args) < 2 else args[1]

    def sizes(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        found = {}
        for kind, (pixels, grid) in _INPUTS.items():
            if inputs.get(pixels) is None:
                continue
            if inputs.get(grid) is None:
                raise ConfigError(
                    f"{kind}s were given without {grid}; make the inputs with the model's own processor"
                )
            found[kind] = inputs[grid]
        return found

    def layouts(self, kind: str, sizes: IntArray) -> list[Layout]:
        merge = self.config.vision_config.spatial_merge_size
        return [Layout((Grid(int(t), int(h) // merge, int(w) // merge, merge),)) for t, h, w in sizes]

    def digests(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        # The patches of all images stand in one sequence.
        ends = sizes.to(pixels.device).prod(-1).cumsum(0)
        place = torch.arange(pixels.shape[0], device=pixels.device)
        image = torch.searchsorted(ends, place, right=True)
        starts = torch.nn.functional.pad(ends[:-1], (1, 0))
        hashes = mix(digest(pixels) + place - starts[image])
        return torch.zeros_like(ends).index_add_(0, image, hashes)

    def vision_tap(self) -> VisionTap:
        tower: Any = self.vision_tower()
        attention = tower.blocks[self.vision_layer(tower)].attn
        return VisionTap(attention, (attention.qkv,), partial(self.attend, tower, attention), packed=True)

    def vision_layer(self, tower: Any) -> int:
        """The last: its output becomes the features."""
        return -1

    def pixel_scale(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return SCALES["clip_vision_model"]

    def patches(self, pixels: Tensor, sizes: IntArray | None) -> list[Tensor]:
        vision = self.config.vision_config
        assert sizes is not None
        whole = pixels.unflatten(-1, (3, vision.temporal_patch_size, vision.patch_size, vision.patch_size))
        return list(whole.flatten(2, 3).split(sizes.prod(-1).tolist()))

    def attend(self, tower: Any, attention: Any, call: VisionCall) -> list[list[VisionAttention]]:
        """The attention of each frame, by image or video: a frame attends within itself."""
        assert call.sizes is not None
        query, key, _ = call.outputs[0].unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
        query, key = (turn(x, *call.attention["position_embeddings"]).transpose(0, 1) for x in (query, key))
        patches = [h * w for t, h, w in call.sizes.tolist() for _ in range(t)]
        frames = (
            VisionAttention(q, k, attention.scaling, has_cls=False)
            for q, k in zip(query.split(patches, dim=1), key.split(patches, dim=1), strict=True)
        )
        return [list(islice(frames, t)) for t in call.sizes[:, 0].tolist()]

    def to_tokens(self, patches: Tensor, image: Image) -> Tensor:
        # The patches of a token stand one after the other.
        return patches.reshape(-1, image.grids[0].merge ** 2, patches.shape[-1]).mean(1)
