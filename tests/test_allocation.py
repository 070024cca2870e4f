"""Budgets per image or pooled over a prompt's images (contract 15), and floors per frame."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import judge
import tiny
import tokenprune
from tokenprune.methods.base import ScoreMethod
from tokenprune.methods.seen import ImageTokens, Needs
from tokenprune.tokens import Grid

ROWS = [["text:3", "image", "text:2", "image", "text:4"], ["image", "text:5"], ["text:6"]]
FAMILIES = ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl", "gemma3"]


class Late(ScoreMethod):
    """Scores a token by its place, so that what is kept can be written down."""

    name: ClassVar[str] = "late"

    def needs(self) -> Needs:
        return Needs()

    def score(self, image: ImageTokens) -> Tensor:
        return image.raster.float()


@pytest.mark.parametrize("method", ["random", "uniform", "entropyprune"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pooled_equals_the_oracle(family: str, method: str) -> None:
    model = tiny.build(family)
    inputs = tiny.inputs(model, ROWS, pad="left")
    arguments: dict[str, Any] = {"method": method, "layer": 2, "keep": 0.5, "allocation": "pooled"}
    assert judge.prefill_difference(model, inputs, **arguments) <= judge.TOLERANCE
    greedy = {"do_sample": False, "max_new_tokens": 3}
    assert judge.generate_difference(model, inputs, greedy, **arguments)[0] <= judge.TOLERANCE


@pytest.mark.parametrize("keep", [0.3, 7])
def test_pooled_budget_is_met_per_sample(keep: float | int) -> None:
    """The sum of what the images would keep on their own; which of them keeps it, the scores say."""
    model = tiny.llava()
    inputs = tiny.inputs(model, ROWS)
    with tokenprune.pruned(model, Late(), layer=0, keep=keep, allocation="pooled"), torch.no_grad():
        model(**inputs)
        report = tokenprune.report(model)
    total = 50 * keep if isinstance(keep, float) else 2 * keep
    assert [image.kept[0] for image in report.images] == [0, int(total), int(total / 2)]
    assert report.keep_lists[0][0] == [[], list(range(25 - int(total), 25))]
    assert report.images[0].average == 0.0


def test_forced_lists_have_the_images_as_they_came() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, ROWS[:1])
    with tokenprune.pruned(model, "random", layer=1, keep=0.4, allocation="pooled"), torch.no_grad():
        wanted = model(**inputs).logits
        lists = tokenprune.report(model).keep_lists
        with tokenprune.override(model, keep_lists=lists):
            found = model(**inputs).logits
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_every_frame_keeps_its_floor(family: str) -> None:
    """Without a floor this method keeps the end of the video; with one, the end of every frame, then of the video."""
    model = tiny.build(family)
    inputs = tiny.inputs(model, [["text:3", "video", "text:4"], ["text:2", "image", "text:2"]], pad="left")
    arguments: dict[str, Any] = {"method": Late(), "layer": 1, "keep": 0.7, "frame_floor": 2}
    assert judge.prefill_difference(model, inputs, **arguments) <= judge.TOLERANCE
    with tokenprune.pruned(model, **arguments), torch.no_grad():
        model(**inputs)
        report = tokenprune.report(model)
    (frames, height, width), *_ = report.images[0].grids
    kept = report.keep_lists[0][0][0]
    size, k = height * width, len(kept)
    ends = {f * size + size - 1 - i for f in range(frames) for i in range(2)}
    rest = [i for i in reversed(range(frames * size)) if i not in ends][: k - len(ends)]
    assert frames > 1 and kept == sorted([*ends, *rest])
    with tokenprune.pruned(model, **{**arguments, "frame_floor": 0}), torch.no_grad():
        model(**inputs)
        assert tokenprune.report(model).keep_lists[0][0][0] == list(range(frames * size - k, frames * size))


def test_floor_after_an_earlier_cut() -> None:
    """Frames of unequal size left: 3, 1 and 4 tokens of 3 frames, best last."""
    raster = torch.tensor([0, 1, 3, 4, 8, 9, 10, 11])
    image = ImageTokens(8, raster, (Grid(3, 2, 2),), frame_floor=2)
    assert image.frame().tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert Late().select(image, 5).keep.tolist() == [1, 2, 3, 6, 7]
    assert Late().select(image, 6).keep.tolist() == [1, 2, 3, 5, 6, 7]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"allocation": "sample"}, "allocation must be 'image' or 'pooled', not 'sample'"),
        ({"frame_floor": -1}, "frame_floor must be a number of tokens, 0 or more, not -1"),
        ({"frame_floor": True}, "frame_floor must be a number of tokens"),
        ({"method": "uniform", "frame_floor": 1}, "frame_floor needs a method that scores tokens"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], text: str) -> None:
    model = tiny.llava()
    with pytest.raises(tokenprune.ConfigError, match=text):
        tokenprune.wrap(model, **{"method": "random", "keep": 0.5, "layer": 1, **arguments})
    assert not tokenprune.is_wrapped(model)


def test_floor_beyond_the_budget() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, ROWS)
    with tokenprune.pruned(model, "random", keep=3, layer=0, frame_floor=4), torch.no_grad():
        model(**inputs)
        assert all("some frames keep fewer" in str(image.notes) for image in tokenprune.report(model).images)
        with tokenprune.override(model, strict=True):
            with pytest.raises(tokenprune.ConfigError, match="frame_floor=4 takes 4 tokens for the 1 frames"):
                model(**inputs)


def test_merging_within_a_pool_is_refused_at_wrap() -> None:
    model = tiny.llava()
    for arguments in ({}, {"recycling": "cells"}):
        with pytest.raises(
            tokenprune.ConfigError, match="merges tokens, which allocation='pooled' does not offer"
        ):
            tokenprune.wrap(model, "vflowopt", keep=0.5, allocation="pooled", **arguments)
        assert not tokenprune.is_wrapped(model)
    with (
        tokenprune.pruned(model, "vflowopt", keep=0.5, allocation="pooled", recycling="none"),
        torch.no_grad(),
    ):
        model(**tiny.inputs(model, [["image", "text:3", "image", "text:2"]]))
        assert tokenprune.report(model).pruned
