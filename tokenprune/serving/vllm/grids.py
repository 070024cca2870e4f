"""Models of the Qwen-VL kind: pictures and videos of any size, each with its grid, and positions on three axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tokenprune.errors import ConfigError
from tokenprune.models.base import Layout, VisionCall
from tokenprune.models.qwen2_vl import Qwen2VL
from tokenprune.serving.vllm.layout import Pictures
from tokenprune.serving.vllm.model import PrunedModel
from tokenprune.serving.vllm.positions import LARGEST
from tokenprune.tokens import IntArray

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class Grids(Pictures):
    """A picture's size is its grid of (t, h, w) patches."""

    side_by_side = False
    family: Qwen2VL

    def sizes(self, made: Mapping[str, Any]) -> dict[str, IntArray]:
        grids = {kind: made.get(f"{kind}_grid_thw") for kind in _PIXELS}
        return {kind: np.asarray(own) for kind, own in grids.items() if own is not None and len(own)}

    def crops(self, kind: str, layouts: list[Layout]) -> list[int]:
        return [own.columns * own.grids[0].merge ** 2 for own in layouts]  # patches

    def check(self, made: Mapping[str, Any]) -> None:
        vision = self.config.vision_config
        merge, width = vision.spatial_merge_size, 3 * vision.temporal_patch_size * vision.patch_size**2
        for kind, sizes in self.sizes(made).items():
            pixels = made.get(_PIXELS[kind])
            if pixels is not None and (
                tuple(pixels.shape) != (sizes.prod(-1).sum(), width) or (sizes[:, 1:] % merge).any()
            ):
                raise ValueError(
                    f"tokenprune: {kind}s were made into patches that the model does not take; leave patch_size, "
                    f"temporal_patch_size and merge_size out of mm_processor_kwargs"
                )
        for (t, _, _), seconds in zip(self.sizes(made).get("video", ()), self.seconds(made), strict=False):
            if not 0 <= (t - 1) * seconds <= LARGEST:
                raise ValueError("tokenprune: a video is too long for the model's positions; send less of it")

    def seconds(self, made: Mapping[str, Any]) -> list[float]:
        """By how many positions the frames of each video are apart, where the model tells time by them."""
        speed = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        given = made.get("second_per_grid_ts")
        return [] if given is None else [float(own) * speed for own in torch.as_tensor(given).flatten()]


class PrunedGrids(PrunedModel):
    """In front of one of vLLM's models of the kind."""

    visual: Any
    pictures: Grids
    kinds: ClassVar[tuple[str, ...]] = ("image", "video")

    def check_served(self) -> None:
        if self.settings.method.needs().ahead is not None:
            raise ConfigError(
                "looking ahead is not served for models with positions on three axes; serve vflowopt or uniform"
            )

    def watch_tower(self) -> None:
        """Note queries, keys and rotary embeddings of the last layer that attends to whole frames."""
        if getattr(self, "use_data_parallel", False):
            raise ConfigError(
                f"method {self.settings.method.name!r} looks at the vision tower, of which each rank sees other images "
                f"with --mm-encoder-tp-mode data; leave that out, or serve uniform"
            )
        index = self.pictures.family.vision_layer(self.visual)
        self._attention = self.visual.blocks[index].attn
        self._seen: dict[str, Any] = {}

        def before(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            self._seen["rope"] = tuple(kwargs[f"rotary_pos_emb_{name}"] for name in ("cos", "sin"))

        def after(_module: Any, _args: Any, output: Any) -> None:
            self._seen["qkv"] = self._of_all_heads(output[0].squeeze(1))

        self._attention.register_forward_pre_hook(before, with_kwargs=True)
        self._attention.qkv.register_forward_hook(after)

    def _of_all_heads(self, qkv: Tensor) -> Tensor:
        """(m, 3 heads d) of every rank of a tensor-parallel tower, so that all of them choose alike."""
        from vllm.distributed import tensor_model_parallel_all_gather
        from vllm.model_executor.layers.linear import QKVParallelLinear

        if self._attention.tp_size == 1:
            return qkv
        if isinstance(self._attention.qkv, QKVParallelLinear):
            # A rank has its heads' queries, keys and values.
            parts = qkv.unflatten(-1, (3, -1)).contiguous()
            return tensor_model_parallel_all_gather(parts, dim=-1).flatten(-2)
        return tensor_model_parallel_all_gather(qkv.contiguous(), dim=-1)

    def seen(
        self, fields: Mapping[str, Any], kind: str, layouts: Sequence[Layout], features: Sequence[Tensor]
    ) -> Iterator[dict[str, Any]]:
        needs = self.settings.method.needs()
        shown: list[dict[str, Any]] = [{} for _ in layouts]
        if not needs.sees_tower:
            return iter(shown)
        sizes = self.pictures.sizes(fields)[kind]
        if needs.vision is not None:
            for own, layout, frames in zip(shown, layouts, self._attend(sizes), strict=True):
                own["vision"] = self.of_tokens(layout, [torch.cat([needs.vision(frame) for frame in frames])])
        if needs.pixels is not None:
            for own, layout, patches in zip(
                shown, layouts, self.pictures.eight_bit(fields[_PIXELS[kind]], sizes), strict=True
            ):
                own["pixels"] = self.of_tokens(layout, [needs.pixels(patches)])
        return iter(shown)

    def _attend(self, sizes: IntArray) -> Any:
        """The attention of each frame of each picture, from what the tower has shown last."""
        attention, visual = self._attention, self.visual
        rope = tuple(torch.cat([half, half], dim=-1) for half in self._seen["rope"])
        call = VisionCall({}, {"position_embeddings": rope}, [self._seen["qkv"]], sizes)
        self._seen = {}
        tower = SimpleNamespace(
            spatial_merge_size=visual.spatial_merge_size,
            window_size=getattr(visual, "window_size", 0),
            patch_size=self.config.vision_config.patch_size,
        )
        heads = attention.num_attention_heads_per_partition * attention.tp_size
        module = SimpleNamespace(num_heads=heads, scaling=attention.attn.scale)
        return self.pictures.family.attend(tower, module, call)

    # -- positions --------------------------------------------------------------------------------------------------

    def places(self, layout: Layout, columns: Tensor, seconds: float) -> Tensor:
        (grid,) = layout.grids
        area = grid.height * grid.width
        frame = ((columns // area).double() * seconds).long()
        return torch.stack([frame, columns % area // grid.width, columns % grid.width], dim=1)

    def seconds(self, fields: Mapping[str, Any], kind: str, count: int) -> list[float]:
        found = self.pictures.seconds(fields) if kind == "video" else []
        return found or [1.0] * count

    def whole_positions(self, tokens: list[int], features: Any) -> tuple[Tensor, int]:
        """By vLLM's own model, of whatever rule it has."""
        return super(PrunedModel, self).get_mrope_input_positions(tokens, features)  # type: ignore[misc]
