"""Qwen3-VL inside vLLM: pictures and videos, with their deep-stack features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenprune.models.base import Layout
from tokenprune.models.qwen3_vl import Qwen3VL
from tokenprune.serving.vllm.grids import Grids, PrunedGrids
from tokenprune.serving.vllm.processing import PrunedProcessor


class Frames(Grids):
    """Between the frames of a video stand timestamps: each frame is a picture with a budget of its own."""

    def parts(self, kind: str, layout: Layout) -> list[Layout]:
        (grid,) = layout.grids
        return [Layout((replace(grid, frames=1),))] * grid.frames


class PrunedQwen3VLProcessor(PrunedProcessor, Qwen3VLMultiModalProcessor):
    kinds = ("image", "video")

    def pictures(self) -> Frames:
        return Frames(Qwen3VL, self.info.get_hf_config())

    def framed(self, kind: str, rows: list[int], fields: Mapping[str, Any]) -> list[int]:
        if kind == "image":
            return rows
        config, timestamps = self.info.get_hf_config(), fields["timestamps"].data
        return list(
            self.get_video_repl(
                tokens_per_frame=[len(rows) // len(timestamps)] * len(timestamps),
                timestamps=timestamps,
                tokenizer=self.info.get_tokenizer(),
                vision_start_token_id=config.vision_start_token_id,
                vision_end_token_id=config.vision_end_token_id,
                video_token_id=config.video_token_id,
            ).full
        )

    def targets(self) -> dict[str, list[int]]:
        config, found = self.info.get_hf_config(), super().targets()
        if not self._expands_only_video_token(self.info.get_hf_processor()):
            found["video"] = [config.vision_start_token_id, *found["video"], config.vision_end_token_id]
        return found


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3VLProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class PrunedQwen3VL(PrunedGrids, Qwen3VLForConditionalGeneration):
    """vLLM's own model behind `PrunedGrids`."""

    is_multimodal_pruning_enabled: bool

    @staticmethod
    def make_pictures(config: Any) -> Frames:
        return Frames(Qwen3VL, config)

    def embed_multimodal(self, **fields: Any) -> Any:
        """As `PrunedModel`'s; vLLM's own pruning of videos, which would put timestamps into the rows, stays off."""
        enabled, self.is_multimodal_pruning_enabled = self.is_multimodal_pruning_enabled, False
        try:
            return super().embed_multimodal(**fields)
        finally:
            self.is_multimodal_pruning_enabled = enabled
