"""LLaVA-NeXT inside vLLM: as many tokens as the picture's size says, newlines among them, which always stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenprune.models.llava_next import LlavaNext
from tokenprune.serving.vllm.crops import PrunedCrops
from tokenprune.serving.vllm.layout import Pictures
from tokenprune.serving.vllm.processing import PrunedProcessor


class Tiled(Pictures):
    """Pictures of any size, in tiles."""

    def __init__(self, config: Any) -> None:
        super().__init__(LlavaNext, config)

    def check(self, made: Mapping[str, Any]) -> None:
        super().check(made)
        for kind, sizes in self.sizes(made).items():
            for pixels, layout in zip(made["pixel_values"], self.layouts(kind, sizes), strict=True):
                # Behind a picture's own tiles stands padding.
                if len(pixels) < layout.items or pixels[layout.items :].any():
                    raise ValueError(
                        f"tokenprune: a picture was made into {len(pixels)} tiles, which the model does not take; "
                        f"leave image_grid_pinpoints out of mm_processor_kwargs"
                    )


class PrunedLlavaNextProcessor(PrunedProcessor, LlavaNextMultiModalProcessor):
    def pictures(self) -> Pictures:
        return Tiled(self.info.get_hf_config())


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaNextProcessor, info=LlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class PrunedLlavaNext(PrunedCrops, LlavaNextForConditionalGeneration):
    """vLLM's own model behind `PrunedCrops`."""

    @staticmethod
    def make_pictures(config: Any) -> Pictures:
        return Tiled(config)
