"""Qwen3-VL inside vLLM: pictures, with their deep-stack features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenprune.models.qwen3_vl import Qwen3VL
from tokenprune.serving.vllm.grids import Grids, PrunedGrids
from tokenprune.serving.vllm.processing import PrunedProcessor


class ImagesOnly(Qwen3VLProcessingInfo):
    """Videos are refused: between their frames stand timestamps, and each frame would need a budget of its own."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": 0}  # vLLM's processor asks for both


class PrunedQwen3VLProcessor(PrunedProcessor, Qwen3VLMultiModalProcessor):
    def pictures(self) -> Grids:
        return Grids(Qwen3VL(), self.info.get_hf_config())


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3VLProcessor, info=ImagesOnly, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class PrunedQwen3VL(PrunedGrids, Qwen3VLForConditionalGeneration):
    """vLLM's own model behind `PrunedGrids`."""

    kinds = ("image",)

    @staticmethod
    def make_pictures(config: Any) -> Grids:
        return Grids(Qwen3VL(), config)
