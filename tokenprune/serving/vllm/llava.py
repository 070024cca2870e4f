"""LLaVA-1.5 inside vLLM: every picture has as many tokens as the tower has patches."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenprune.models.llava import Llava
from tokenprune.serving.vllm.crops import PrunedCrops
from tokenprune.serving.vllm.layout import Pictures
from tokenprune.serving.vllm.processing import PrunedProcessor


class PrunedLlavaProcessor(PrunedProcessor, LlavaMultiModalProcessor):
    def pictures(self) -> Pictures:
        return Pictures(Llava, self.info.get_hf_config())


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class PrunedLlava(PrunedCrops, LlavaForConditionalGeneration):
    """vLLM's own model behind `PrunedCrops`."""

    @staticmethod
    def make_pictures(config: Any) -> Pictures:
        return Pictures(Llava, config)
