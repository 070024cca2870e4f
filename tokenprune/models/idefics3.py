"""Idefics3 and SmolVLM: crops between structural tokens, patches shuffled into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

from torch import nn

from tokenprune.models.base import Layout, VisionCall, locate
from tokenprune.models.crops import Crops
from tokenprune.tokens import Image, IntArray, VisionAttention


class Idefics3(Crops):
    """Every crop is an image of its own: text tokens (its row and column) stand between crops."""

    name = "idefics3"
    model_types: ClassVar[tuple[str, ...]] = ("idefics3",)
    examples: ClassVar[tuple[str, ...]] = ("HuggingFaceM4/Idefics3-8B-Llama3",)

    def text_model(self) -> nn.Module:
        return self.base().text_model  # type: ignore[return-value]

    def vision_tower(self) -> nn.Module:
        return self.base().vision_model  # type: ignore[return-value]

    def merge(self) -> int:
        return int(self.config.scale_factor)

    def images(self, kind: str, ids: IntArray, layouts: Sequence[Layout]) -> list[list[Image]]:
        # Rows with fewer crops are padded with empty ones, which the tower never sees.
        located = locate(ids, self.token_id(kind), layouts, kind, surplus=True)
        return [_place(crops, row) for crops, row in zip(located, ids, strict=True)]

    def attend(self, attention: Any, cls: bool, call: VisionCall) -> list[list[VisionAttention]]:
        crops = super().attend(attention, cls, call)
        real = call.tower.get("patch_attention_mask")
        if real is None:
            return crops
        real = real.flatten(1).to(call.outputs[0].device)
        return [[replace(own, real=r)] for (own,), r in zip(crops, real, strict=True)]


def _place(crops: list[Image], ids: IntArray) -> list[Image]:
    """Say which crops make one picture, and where they lie in it.

    A token opens every crop and closes every picture, so that it stands once between crops of one picture and twice
    between pictures. A second token names the crop; at the end of a row of crops there is more between them.
    """
    if not crops or crops[0].columns[0] < 2:
        return crops
    mark = ids[crops[0].columns[0] - 2]
    between = [ids[a.columns[-1] + 1 : b.columns[0]] for a, b in pairwise(crops)]
    continues = [False, *((tokens == mark).sum() == 1 for tokens in between)]
    placed: list[Image] = []
    row = column = 0
    for i, crop in enumerate(crops):
        if not continues[i]:
            row = column = 0
        elif len(between[i - 1]) == 2:
            column += 1
        else:
            row, column = row + 1, 0
        last = i + 1 == len(crops) or not continues[i + 1]  # the whole picture, made small
        placed.append(replace(crop, continues=bool(continues[i]), cell=None if last else (row, column)))
    return placed


class SmolVLM(Idefics3):
    """The same, with SmolVLM's own names; a video's frames are images."""

    name = "smolvlm"
    model_types: ClassVar[tuple[str, ...]] = ("smolvlm",)
    examples: ClassVar[tuple[str, ...]] = ("HuggingFaceTB/SmolVLM2-2.2B-Instruct",)
