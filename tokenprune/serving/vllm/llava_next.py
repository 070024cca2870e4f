"""LLaVA-NeXT inside vLLM: as many tokens as the picture's size says, newlines among them, which always stay."""

from __future__ import annotations

from typing import Any

from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenprune.models.llava_next import LlavaNext
from tokenprune.serving.vllm.layout import Pictures
from tokenprune.serving.vllm.model import PrunedImages
from tokenprune.serving.vllm.processing import PrunedProcessor


class PrunedLlavaNextProcessor(PrunedProcessor, LlavaNextMultiModalProcessor):
    def pictures(self) -> Pictures:
        return Pictures(LlavaNext(), self.info.get_hf_config(), LlavaNextModel)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaNextProcessor, info=LlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class PrunedLlavaNext(PrunedImages, LlavaNextForConditionalGeneration):
    """vLLM's own model behind `PrunedImages`."""

    @staticmethod
    def make_pictures(config: Any) -> Pictures:
        return Pictures(LlavaNext(), config, LlavaNextModel)
