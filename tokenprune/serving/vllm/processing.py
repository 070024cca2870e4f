"""The processor's part of pruning: as many placeholders as rows are kept, and the counts for the encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptReplacement, PromptUpdate, PromptUpdateDetails

from tokenprune.arguments import read_keep
from tokenprune.budget import Keep, check_keep
from tokenprune.errors import ConfigError
from tokenprune.serving.vllm import metrics
from tokenprune.serving.vllm.layout import Pictures, prunable
from tokenprune.serving.vllm.names import PER_REQUEST
from tokenprune.serving.vllm.settings import Settings, read_settings


def kept_name(kind: str) -> str:
    """The field that says how many rows of an image stay, those that always do included."""
    return f"tokenprune_kept_{kind}"


def whole_name(kind: str) -> str:
    """The field that says how many tokens it has unpruned."""
    return f"tokenprune_whole_{kind}"


@dataclass
class Placeholders(PromptUpdateDetails):
    """What stands for an image in the prompt.

    Attributes:
        whole: how many tokens it would be unpruned.
        frame: those of them that stand around the image's own.
    """

    whole: int = 0
    frame: int = 0


class PrunedProcessor:
    """In front of one of vLLM's processors. All that is counted is what that processor made, however it was asked."""

    info: Any
    kinds: ClassVar[tuple[str, ...]] = ("image",)

    def pictures(self) -> Pictures:
        """The family's arithmetic."""
        raise NotImplementedError

    def framed(self, kind: str, rows: list[int], fields: Mapping[str, Any]) -> list[int]:
        """What stands in the prompt for an image of these placeholders, and was made as these fields say."""
        return rows

    def _placeholder(self, kind: str) -> int:
        return int(getattr(self.info.get_hf_config(), f"{kind}_token_id"))

    @cached_property
    def _settings(self) -> Settings:
        return read_settings(self.info.get_hf_config().tokenprune)

    # -- counts -----------------------------------------------------------------------------------------------------

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        made = super()._apply_hf_processor_main(mm_items, _vllms(hf_kwargs))  # type: ignore[misc]
        pictures, settings, keep = self.pictures(), self._settings, _keep_of(hf_kwargs)
        pictures.check(made)
        if settings.method.needs().sees_tower and any(f"{kind}_embeds" in made for kind in self.kinds):
            raise ValueError(
                f"tokenprune: {settings.method.name!r} has to see images as pictures, not as embeddings"
            )
        for kind, sizes in pictures.sizes(made).items():
            layouts = pictures.layouts(kind, sizes)
            parts = [pictures.parts(kind, layout) for layout in layouts]
            rows = [
                sum(own.columns - prunable(own) + settings.count(prunable(own), keep) for own in of_one)
                for of_one in parts
            ]
            made[kept_name(kind)] = torch.tensor(rows)
            made[whole_name(kind)] = torch.tensor([own.columns for own in layouts])
        return made

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        own = {
            name(kind): MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
            for kind in self.kinds
            for name in (kept_name, whole_name)
        }
        return {**fields, **own}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        def placeholders(kind: str, number: int) -> Placeholders:
            fields = out_mm_kwargs[kind][number]
            rows, whole = (int(fields[name(kind)].data) for name in (kept_name, whole_name))
            token = self._placeholder(kind)
            full = self.framed(kind, [token] * rows, fields)
            frame = len(full) - rows
            is_embed = partial(_are, token) if frame else None
            return Placeholders(full, is_embed, whole + frame, frame)

        targets = self.targets()
        return [
            PromptReplacement(modality=kind, target=targets[kind], replacement=partial(placeholders, kind))
            for kind in self.kinds
        ]

    def targets(self) -> dict[str, list[int]]:
        """What stands for an image in the prompt before its placeholders do."""
        return {kind: [self._placeholder(kind)] for kind in self.kinds}

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Stores that servers share must not mix up what servers of other settings made."""
        found = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        mark = self._settings.mark
        return {kind: [f"{own}-{mark}" for own in hashes] for kind, hashes in found.items()}

    # -- refusals ---------------------------------------------------------------------------------------------------

    def _cached_apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        """As vLLM's; refuses what positions could not be told of, or there are none for.

        Raises:
            ValueError: says why; the request is refused.
        """
        found = super()._cached_apply_hf_processor(inputs, timing_ctx)  # type: ignore[misc]
        try:
            self._check(list(inputs.prompt), found.prompt_updates)
        except ValueError:
            _forget(inputs.cache, found)
            raise
        return found

    def _check(self, prompt: list[int], updates: Mapping[str, Sequence[Sequence[Any]]]) -> None:
        kinds = {self._placeholder(kind): kind for kind in self.kinds}
        if set(prompt) <= kinds.keys():
            return  # what vLLM measures memory with
        if prompt[-1] in kinds:
            raise ValueError(
                "tokenprune: the prompt ends in a picture; put text behind it, as chat templates do"
            )
        given: dict[str, Iterator[Placeholders]] = {
            kind: iter([update.content for (update,) in updates.get(kind, ())]) for kind in self.kinds
        }
        whole, before = 0, None
        for token in prompt:
            image = next(given[kinds[token]], None) if token in kinds else None
            if token in kinds and image is None:
                raise ValueError("tokenprune: the prompt has places for more pictures than were given")
            whole += 1 if image is None else image.whole
            if before is not None and image is not None and image.is_embed is None:
                alike = (len(before.full), before.whole) == (len(image.full), image.whole)
                if not (alike and self.pictures().side_by_side):
                    raise ValueError(
                        "tokenprune: images of different sizes stand side by side; put text between them"
                    )
            before = image
        context = self.info.get_hf_config().tokenprune_context
        if whole > context:  # vLLM itself checks the pruned length only
            raise ValueError(
                f"tokenprune: unpruned the prompt has {whole} tokens, and the model has {context} positions; send "
                f"fewer or smaller images"
            )
        for kind, items in updates.items():
            for (update,) in items:
                own = update.content
                metrics.count(kind, own.whole - own.frame, len(own.full) - own.frame)


def _are(token: int, full: list[int]) -> torch.Tensor:
    return torch.tensor(full) == token


def _forget(cache: Any, found: Any) -> None:
    """Take a refused request's pictures out of the front end's cache: the engine is not going to see them."""
    if cache is None:
        return
    for kind, items in found.kwargs.items():
        for item, own in zip(items, found.hashes[kind], strict=True):
            if item is not None:
                cache.invalidate(own)


def _vllms(kwargs: Mapping[str, object]) -> dict[str, object]:
    """Without what is ours."""
    return {name: value for name, value in kwargs.items() if name != PER_REQUEST}


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
