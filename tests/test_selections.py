"""Contract 14: what a method returns is checked before it is used, and what it is shown is its own to write into."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import judge
import tiny
import tokenprune
from tokenprune.methods import ImageTokens, Method, Needs, ScoreMethod, Selection

LAYER: dict[str, Any] = {"layer": 2, "keep": 0.5, "budget": "after_cut"}


@dataclass(frozen=True)
class Says(Method):
    """Returns what it was made with, whatever it is asked."""

    name: ClassVar[str] = "says"

    answer: Any = None

    def needs(self) -> Needs:
        return Needs()

    def select(self, image: ImageTokens, k: int) -> Selection:
        first = torch.arange(k)
        return self.answer(first) if callable(self.answer) else self.answer


def pairs(*given: tuple[int, int]) -> Tensor:
    return torch.tensor(given, dtype=torch.long).reshape(-1, 2)


WRONG: dict[str, tuple[Any, str]] = {
    "no selection": ([0, 1], "list instead of a Selection"),
    "list": (lambda k: Selection(k.tolist()), "keep as list, not as a tensor"),
    "shape": (lambda k: Selection(k[:-1]), r"keep of shape \(12,\) where \(13,\) was asked for"),
    "two dimensions": (lambda k: Selection(k[None]), r"keep of shape \(1, 13\)"),
    "floats": (lambda k: Selection(k.float()), "keep of torch.float32 where torch.long"),
    "mask": (lambda k: Selection(k > 3), "keep of torch.bool where torch.long"),
    "no weights": (lambda k: Selection(k, pairs((0, 0))), "merges or weights without the other"),
    "no merges": (lambda k: Selection(k, None, torch.ones(1)), "merges or weights without the other"),
    "weights too long": (lambda k: Selection(k, pairs((0, 0)), torch.ones(2)), r"weights of shape \(2,\)"),
    "whole weights": (lambda k: Selection(k, pairs((0, 0)), torch.ones(1).long()), "weights of torch.int64"),
    "flat merges": (lambda k: Selection(k, torch.zeros(2).long(), torch.ones(2)), r"merges of shape \(2,\)"),
    # by value
    "duplicate": (lambda k: Selection(k.clamp(max=3)), "not ascending"),
    "unsorted": (lambda k: Selection(k.flip(0)), "not ascending"),
    "outside": (lambda k: Selection(k + 20), "not ascending within the image's 25 tokens"),
    "negative": (lambda k: Selection(k - 1), "not ascending within"),
    "source outside": (lambda k: Selection(k, pairs((25, 0)), torch.ones(1)), "outside the image's 25"),
    "negative source": (lambda k: Selection(k, pairs((-1, 0)), torch.ones(1)), "outside the image's 25"),
    "slot not kept": (lambda k: Selection(k, pairs((0, 20)), torch.ones(1)), "into tokens that are not kept"),
    "NaN weight": (lambda k: Selection(k, pairs((1, 0)), torch.full((1,), torch.nan)), "no finite numbers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_selection_is_refused_by_name_and_the_model_works_on(case: str) -> None:
    answer, text = WRONG[case]
    model = tiny.llava(layers=4)
    inputs = tiny.inputs(model, [["text:4", "image", "text:5"]])
    with torch.no_grad():
        stock = model(**inputs).logits
        with tokenprune.pruned(model, Says(answer), **{**LAYER, "keep": 13}):
            with pytest.raises(tokenprune.TokenPruneError, match=f"method 'says' returned .*{text}"):
                model(**inputs)
            with tokenprune.override(model, method="none"):
                assert torch.equal(model(**inputs).logits, stock)
        assert torch.equal(model(**inputs).logits, stock)


@dataclass(frozen=True)
class Scores(ScoreMethod):
    """Scores that were thought of before."""

    name: ClassVar[str] = "scores"

    given: Tensor = field(default_factory=lambda: torch.empty(0))

    def needs(self) -> Needs:
        return Needs()

    def score(self, image: ImageTokens) -> Tensor:
        return self.given[image.raster] if len(self.given) == 25 else self.given


def test_nan_ranks_last_and_is_reported() -> None:
    model = tiny.llava(layers=4)
    scores = torch.arange(25.0)
    scores[[3, 20, 24]] = torch.nan
    scores[7] = -torch.inf
    with tokenprune.pruned(model, Scores(scores), **{**LAYER, "keep": 22}), torch.no_grad():
        model(**tiny.inputs(model, [["text:4", "image", "text:5"]]))
        report = tokenprune.report(model)
    wanted = [i for i in range(25) if i not in (3, 20, 24)]
    assert report.keep_lists[0][0][0] == wanted
    assert report.images[0].notes == {"scores that were no numbers": 3}
    assert "scores that were no numbers (3)" in str(report)
    assert report.to_dict()["images"][0]["notes"] == {"scores that were no numbers": 3}


def test_scores_of_another_length_are_refused() -> None:
    model = tiny.llava(layers=4)
    with (
        tokenprune.pruned(model, Scores(torch.ones(7)), **LAYER),
        torch.no_grad(),
        pytest.raises(tokenprune.TokenPruneError, match=r"'scores' returned scores \(7,\) where 25"),
    ):
        model(**tiny.inputs(model, [["text:4", "image", "text:5"]]))


@dataclass(frozen=True)
class Vandal(ScoreMethod):
    """Writes into everything it is shown."""

    name: ClassVar[str] = "vandal"
    min_layer: ClassVar[int] = 1

    states: tuple[Any, ...] = ()
    writes: bool = True

    def needs(self) -> Needs:
        return Needs(states=self.states, vision=lambda attention: attention.received(), digest=True)

    def score(self, image: ImageTokens) -> Tensor:
        first = -image.raster.float()
        if self.writes:
            for name in (*self.states, "raster", "vision", "digest"):
                getattr(image, name).fill_(7)
        return first


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "build", [tiny.llava, tiny.qwen2_5_vl, tiny.llama4], ids=["llava", "qwen2_5_vl", "llama4"]
)
def test_what_a_method_is_shown_is_its_own_to_write_into(build: Any, grad: Any) -> None:
    model = build(layers=4)
    inputs = tiny.inputs(model, [["text:4", "image", "text:5"]])
    states = ("query", "key", "value", "hidden")
    found = []
    for writes in (False, True):
        with tokenprune.pruned(model, Vandal(states, writes), **LAYER), grad():
            found.append(model(**inputs).logits.clone())
            assert tokenprune.report(model).keep_lists[0][0][0][0] == 0
    assert torch.equal(*found)


# -- a row that ends in an image ---------------------------------------------------------------------------------------

ENDS = (["text:5", "image", "text:3", "image"], ["image"], ["text:2", "image", "text:9"])
METHODS: list[dict[str, Any]] = [
    {"method": "random", "layer": 0, "keep": 0.2},
    {"method": "entropyprune", "layer": 2, "keep": 0.6},
    {"method": "uniform", "cuts": [(1, 0.7), (3, 0.05)]},
    {"method": "random", "layer": 1, "keep": 1, "budget": "after_cut"},
    {"method": "random", "layer": 1, "keep": 0.5, "allocation": "pooled"},
]


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("arguments", METHODS, ids=lambda a: f"{a['method']}{a.get('layer', '')}")
@pytest.mark.parametrize("build", [tiny.llava, tiny.gemma3], ids=["llava", "gemma3"])
def test_each_rows_last_column_stays(build: Any, arguments: dict[str, Any], pad: str) -> None:
    model = build(layers=4)
    inputs = tiny.inputs(model, ENDS, pad=pad)
    with tokenprune.pruned(model, **arguments), torch.no_grad():
        model(**inputs)
        report = tokenprune.report(model)
    assert report.index is not None
    for r, row in enumerate(tiny.visual_positions(model, inputs)):
        last = int(inputs["attention_mask"][r].nonzero()[-1])
        assert last in report.index[r].tolist()
        assert all(len(image.kept) for image in report.images)
        for i, columns in enumerate(row):
            kept = report.keep_lists[-1][r][i]
            if int(columns[-1]) == last:
                assert kept[-1] == len(columns) - 1
    if arguments.get("budget") == "after_cut":  # the budget is kept all the same
        assert {image.kept for image in report.images} == {(1,)}
    assert judge.prefill_difference(model, inputs, **arguments) <= judge.TOLERANCE


def test_the_next_token_is_told_by_the_last_column() -> None:
    model = tiny.llava(layers=4)
    inputs = tiny.inputs(model, ENDS[:1])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    difference, _, _ = judge.generate_difference(model, inputs, options, method="random", layer=1, keep=0.4)
    assert difference <= judge.TOLERANCE


def test_forced_lists_have_to_keep_it() -> None:
    model = tiny.llava(layers=4)
    inputs = tiny.inputs(model, [["text:3", "image"]])
    with tokenprune.pruned(model, layer=1, keep_lists=[[[[0, 5]]]]), torch.no_grad():
        with pytest.raises(tokenprune.ConfigError, match="must keep the image's last token, 24"):
            model(**inputs)
        with tokenprune.override(model, keep_lists=[[[np.array([0, 24])]]]):
            model(**inputs)


@pytest.mark.parametrize(
    "lists",
    [
        {0: [[[0]]]},
        (x for x in [[[[0]]]]),
        [{0: [[0]]}],
        [[[[True, False]]]],
        [[[{0: 1}]]],
        [[[np.array([True, False])]]],
        [[["01"]]],
        [[(i for i in (0, 1))]],
    ],
)
def test_forced_lists_are_lists_of_integers(lists: Any) -> None:
    model = tiny.llava(layers=4)
    with pytest.raises(tokenprune.ConfigError, match="keep_lists"), torch.no_grad():
        with tokenprune.pruned(model, layer=1, keep_lists=lists):
            model(**tiny.inputs(model, [["text:4", "image", "text:5"]]))
