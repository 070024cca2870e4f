"""The processor's part of pruning: as many placeholders as tokens are kept, and the counts for the encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptReplacement, PromptUpdate

from tokenprune.arguments import read_keep
from tokenprune.budget import Keep, check_keep
from tokenprune.errors import ConfigError
from tokenprune.models.base import Layout
from tokenprune.serving.vllm.layout import Pictures, prunable
from tokenprune.serving.vllm.settings import PER_REQUEST, Settings, read_settings

KEPT = "tokenprune_kept"  # how many of its prunable tokens an image keeps
WHOLE = "tokenprune_whole"  # how many tokens it has unpruned, those that always stay included


class PrunedProcessor:
    """In front of one of vLLM's processors for models of the LLaVA kind."""

    info: Any

    def pictures(self) -> Pictures:
        """The family's arithmetic."""
        raise NotImplementedError

    @property
    def _placeholder(self) -> int:
        """The id that stands for a picture in a prompt."""
        return int(self.info.get_hf_config().image_token_index)

    def _settings(self) -> Settings:
        return read_settings(self.info.get_hf_config().tokenprune)

    def _layouts(self, mm_items: Any) -> list[Layout]:
        if "image" not in mm_items:
            return []
        images = mm_items["image"]
        if not hasattr(images, "get_image_size"):
            raise ValueError("tokenprune: images have to come as pictures, not as embeddings")
        sizes = [images.get_image_size(i) for i in range(len(images))]
        return [self._layout(size.height, size.width) for size in sizes]

    def _layout(self, height: int, width: int) -> Layout:
        return self.pictures().layout(height, width)

    def _kept(self, layout: Layout, kwargs: Mapping[str, object]) -> int:
        return self._settings().count(prunable(layout), _keep_of(kwargs))

    def _rows(self, layout: Layout, kwargs: Mapping[str, object]) -> int:
        """What a picture has of placeholders: those kept, and those that always stay."""
        return layout.columns - prunable(layout) + self._kept(layout, kwargs)

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        own = {name: value for name, value in hf_kwargs.items() if name != PER_REQUEST}
        found = super()._apply_hf_processor_main(mm_items, own)  # type: ignore[misc]
        layouts = self._layouts(mm_items)
        if layouts:
            found[KEPT] = torch.tensor([self._kept(layout, hf_kwargs) for layout in layouts])
            found[WHOLE] = torch.tensor([layout.columns for layout in layouts])
        return found

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Refuse what positions could not be told of, or there are none for.

        Raises:
            ValueError: images of different sizes without text between them, or a prompt that is too long unpruned; the
                request is refused.
        """
        layouts = self._layouts(inputs.mm_data_items)
        self._check_length(inputs.prompt, layouts)
        found = super().apply(inputs, timing_ctx)  # type: ignore[misc]
        images = list(zip(found["mm_placeholders"].get("image", ()), layouts, strict=True))
        for (one, own), (other, next_to) in pairwise(images):
            beside = one.offset + one.length == other.offset
            if beside and (one.length, own.columns) != (other.length, next_to.columns):
                raise ValueError(
                    "tokenprune: images of different sizes stand side by side; put text between them"
                )
        return found

    def _check_length(self, prompt: Any, layouts: Sequence[Layout]) -> None:
        """Before anything of it is remembered: vLLM itself checks the pruned length only.

        Raises:
            ValueError: the prompt has more tokens unpruned than the model has positions, or ends in a picture.
        """
        config = self.info.get_hf_config()
        tokens = self.info.get_tokenizer().encode(prompt) if isinstance(prompt, str) else list(prompt)
        if all(token == self._placeholder for token in tokens):
            return  # what vLLM measures memory with
        if tokens[-1] == self._placeholder:
            raise ValueError(
                "tokenprune: the prompt ends in a picture; put text behind it, as chat templates do"
            )
        whole = len(tokens) - len(layouts) + sum(layout.columns for layout in layouts)
        if whole > config.tokenprune_context:
            raise ValueError(
                f"tokenprune: unpruned the prompt has {whole} tokens, and the model has {config.tokenprune_context} "
                f"positions; send fewer or smaller images"
            )

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        counts = {name: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for name in (KEPT, WHOLE)}
        return {**fields, **counts}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        token, layouts = self._placeholder, self._layouts(mm_items)

        def placeholders(number: int) -> list[int]:
            return [token] * self._rows(layouts[number], hf_processor_mm_kwargs)

        return [PromptReplacement(modality="image", target=[token], replacement=placeholders)]


def _keep_of(kwargs: Mapping[str, object]) -> Keep | None:
    """What a request asks for.

    Raises:
        ValueError: it is no budget; the request is refused.
    """
    given: Any = kwargs.get(PER_REQUEST)
    if given is None:
        return None
    try:
        return read_keep(given) if isinstance(given, str) else check_keep(given)
    except ConfigError as error:
        raise ValueError(f"{PER_REQUEST}: {error}") from None
