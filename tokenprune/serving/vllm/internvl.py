"""InternVL (the transformers classes) inside vLLM: tiles of one size, an image is all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptReplacement, PromptUpdate, PromptUpdateDetails

from tokenprune.models.base import Layout
from tokenprune.models.crops import side
from tokenprune.models.internvl import InternVL
from tokenprune.serving.vllm.layout import Pictures
from tokenprune.serving.vllm.model import PrunedImages
from tokenprune.serving.vllm.processing import PrunedProcessor
from tokenprune.tokens import Grid


class Tiles(Pictures):
    """How many tiles a picture has its processor knows."""

    def __init__(self, config: Any) -> None:
        super().__init__(InternVL(), config)

    def of_tiles(self, count: int) -> Layout:
        """Of a picture of so many, the thumbnail among them."""
        vision, merge = self.config.vision_config, round(1 / self.config.downsample_ratio)
        tokens = side(vision.image_size) // side(vision.patch_size) // merge
        return Layout((Grid(count, tokens, tokens, merge),), items=count)


class ImagesOnly(InternS1ProcessingInfo):
    """Videos are refused: their rows would carry no positions."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}


class PrunedInternVLProcessor(PrunedProcessor, InternS1MultiModalProcessor):
    def pictures(self) -> Tiles:
        return Tiles(self.info.get_hf_config())

    @property
    def _placeholder(self) -> int:
        return int(self.info.get_hf_config().image_token_id)

    def _layout(self, height: int, width: int) -> Layout:
        processor = self.info.get_hf_processor().image_processor
        return self.pictures().of_tiles(processor.get_number_of_image_patches(height, width, {}))

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        processor, tokenizer = self.info.get_hf_processor(), self.info.get_tokenizer()
        token, layouts = processor.image_token_id, self._layouts(mm_items)
        marks = (processor.start_image_token, processor.end_image_token)
        start, end = (tokenizer.convert_tokens_to_ids(mark) for mark in marks)

        def placeholders(number: int) -> Any:
            rows = self._rows(layouts[number], hf_processor_mm_kwargs)
            return PromptUpdateDetails.select_token_id([start, *[token] * rows, end], token)

        return [PromptReplacement(modality="image", target=[token], replacement=placeholders)]


@MULTIMODAL_REGISTRY.register_processor(
    PrunedInternVLProcessor, info=ImagesOnly, dummy_inputs=InternS1DummyInputsBuilder
)
class PrunedInternVL(PrunedImages, InternS1ForConditionalGeneration):
    """vLLM's own model behind `PrunedImages`."""

    pictures: Tiles

    @staticmethod
    def make_pictures(config: Any) -> Tiles:
        return Tiles(config)

    @property
    def placeholder(self) -> int:
        return int(self.config.image_token_id)

    @property
    def tower_attention(self) -> Any:
        return self.vision_tower.encoder.layer[-1].attention

    def watch_tower(self) -> None:
        attention = self.tower_attention
        last = "norm" if attention.qk_normalization else "proj"
        for letter, name in (("q", "_query"), ("k", "_key")):
            getattr(attention, f"{letter}_{last}").register_forward_hook(partial(self._note, name))

    def _note(self, name: str, _module: Any, _args: Any, output: Tensor) -> None:
        setattr(self, name, self._of_all_heads(output))

    def given(self, kwargs: Mapping[str, Any], count: int) -> Iterator[tuple[Layout, Tensor]]:
        tiles = [int(number) for number in kwargs["image_num_patches"]]
        for own, crops in zip(tiles, kwargs["pixel_values"].split(tiles), strict=True):
            yield self.pictures.of_tiles(own), crops
