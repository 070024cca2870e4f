"""Qwen2.5-VL: native resolution, M-RoPE, images and videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import ConfigError
from tokenprune.hashing import digest, mix
from tokenprune.methods.base import Grid
from tokenprune.models.base import Family, Image, IntArray, locate

_KINDS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


class Qwen25VL(Family):
    name = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    examples = ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct")
    published_layer = 1
    mrope = True

    def host_tensors(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        return [inputs[grid] for _, grid in _given(inputs).values()]

    def images(
        self, model: nn.Module, ids: IntArray, inputs: Mapping[str, Any], host: list[IntArray]
    ) -> list[list[Image]]:
        if inputs.get("mm_encoder_outputs") is not None:
            raise ConfigError("precomputed image features cannot be pruned; pass pixel_values")
        config: Any = model.config
        merge = config.vision_config.spatial_merge_size
        rows: list[list[Image]] = [[] for _ in ids]
        for kind, thw in zip(_given(inputs), host, strict=True):
            token_id = config.image_token_id if kind == "image" else config.video_token_id
            grids = [Grid(int(t), int(h) // merge, int(w) // merge) for t, h, w in thw.reshape(-1, 3)]
            for row, found in zip(rows, locate(ids, token_id, grids, kind), strict=True):
                row.extend(found)
        return [sorted(row, key=lambda image: int(image.columns[0])) for row in rows]

    def pixel_digests(self, inputs: Mapping[str, Any], rows: list[list[Image]]) -> dict[tuple[str, int], Tensor]:
        found: dict[tuple[str, int], Tensor] = {}
        for kind, (pixels, _) in _given(inputs).items():
            patches = digest(inputs[pixels])
            images = sorted((i for row in rows for i in row if i.kind == kind), key=lambda i: i.order)
            per_token = len(patches) // max(1, sum(i.n for i in images))
            for image, own in zip(images, patches.split([i.n * per_token for i in images]), strict=True):
                found[kind, image.order] = mix(own + torch.arange(len(own), device=own.device)).sum()
        return found


def _given(inputs: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    given = {kind: names for kind, names in _KINDS.items() if inputs.get(names[0]) is not None}
    for kind, (_, grid) in given.items():
        if inputs.get(grid) is None:
            raise ConfigError(f"{kind}s were given without {grid}; make the inputs with the model's own processor")
    return given
