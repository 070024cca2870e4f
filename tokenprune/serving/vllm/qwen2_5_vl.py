"""Qwen2.5-VL inside vLLM: pictures and videos."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenprune.models.qwen2_5_vl import Qwen25VL
from tokenprune.serving.vllm.grids import Grids, PrunedGrids
from tokenprune.serving.vllm.processing import PrunedProcessor


class PrunedQwen25VLProcessor(PrunedProcessor, Qwen2_5_VLMultiModalProcessor):
    kinds = ("image", "video")

    def pictures(self) -> Grids:
        return Grids(Qwen25VL, self.info.get_hf_config())


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen25VLProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class PrunedQwen25VL(PrunedGrids, Qwen2_5_VLForConditionalGeneration):
    """vLLM's own model behind `PrunedGrids`."""

    @staticmethod
    def make_pictures(config: Any) -> Grids:
        return Grids(Qwen25VL, config)
