"""InternVL (the transformers classes) inside vLLM: tiles of one size, an image is all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenprune.models.base import Layout
from tokenprune.models.crops import side
from tokenprune.models.internvl import InternVL
from tokenprune.serving.vllm.crops import PrunedCrops
from tokenprune.serving.vllm.layout import Pictures
from tokenprune.serving.vllm.processing import PrunedProcessor
from tokenprune.tokens import Grid, IntArray


class Tiles(Pictures):
    """How many tiles a picture was made into its processor says."""

    def __init__(self, config: Any) -> None:
        super().__init__(InternVL, config)

    def sizes(self, made: Mapping[str, Any]) -> dict[str, IntArray]:
        tiles = made.get("image_num_patches")
        return {} if tiles is None or not len(tiles) else {"image": np.asarray(tiles)}

    def layouts(self, kind: str, sizes: IntArray) -> list[Layout]:
        """Of pictures of so many tiles, the thumbnail among them."""
        vision, merge = self.config.vision_config, round(1 / self.config.downsample_ratio)
        tokens = side(vision.image_size) // side(vision.patch_size) // merge
        return [Layout((Grid(count, tokens, tokens, merge),), items=count) for count in sizes.tolist()]

    def crops(self, kind: str, layouts: list[Layout]) -> list[int]:
        return [layout.items for layout in layouts]


class ImagesOnly(InternS1ProcessingInfo):
    """Videos are refused: their rows would carry no positions."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}


class PrunedInternVLProcessor(PrunedProcessor, InternS1MultiModalProcessor):
    def pictures(self) -> Tiles:
        return Tiles(self.info.get_hf_config())

    def framed(self, kind: str, rows: list[int], fields: Mapping[str, Any]) -> list[int]:
        processor, tokenizer = self.info.get_hf_processor(), self.info.get_tokenizer()
        start, end = tokenizer.convert_tokens_to_ids([processor.start_image_token, processor.end_image_token])
        return [start, *rows, end]


@MULTIMODAL_REGISTRY.register_processor(
    PrunedInternVLProcessor, info=ImagesOnly, dummy_inputs=InternS1DummyInputsBuilder
)
class PrunedInternVL(PrunedCrops, InternS1ForConditionalGeneration):
    """vLLM's own model behind `PrunedCrops`."""

    @staticmethod
    def make_pictures(config: Any) -> Tiles:
        return Tiles(config)

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

    def crops_of(self, fields: Mapping[str, Any], layouts: Sequence[Layout]) -> Iterator[Tensor]:
        return iter(fields["pixel_values"].split([layout.items for layout in layouts]))
