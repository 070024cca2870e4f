"""Qwen2-VL inside vLLM: pictures and videos."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenprune.models.qwen2_vl import Qwen2VL
from tokenprune.serving.vllm.grids import Grids, PrunedGrids
from tokenprune.serving.vllm.processing import PrunedProcessor


class PrunedQwen2VLProcessor(PrunedProcessor, Qwen2VLMultiModalProcessor):
    kinds = ("image", "video")

    def pictures(self) -> Grids:
        return Grids(Qwen2VL, self.info.get_hf_config())


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen2VLProcessor, info=Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class PrunedQwen2VL(PrunedGrids, Qwen2VLForConditionalGeneration):
    """vLLM's own model behind `PrunedGrids`."""

    @staticmethod
    def make_pictures(config: Any) -> Grids:
        return Grids(Qwen2VL, config)
