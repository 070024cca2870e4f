"""Stages: cuts that each have a method of their own, with needs of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import judge
import tiny
import tokenprune
from tokenprune.arguments import Arguments, Stage, check_stages, read_stages
from tokenprune.cli import app
from tokenprune.methods import (
    Grid,
    ImageTokens,
    ImportanceMap,
    Needs,
    Question,
    ScoreMethod,
    Staged,
    Text,
    VFlowOpt,
)
from tokenprune.profiles.profile import Profile, ProfileStage
from tokenprune.space import Setting
from tokenprune.tune.making import make_profile
from tokenprune.tune.stages import arguments_at, search_space

STAGES: list[tuple[Any, ...]] = [(0, "vflowopt", 0.7), (2, "question", 0.5), (4, "fastv", None)]


def staged(family: str) -> list[tuple[Any, ...]]:
    if family == "kimi_k25":  # the states of its latent attention are not offered
        return [(0, "vflowopt", 0.7), (2, "entropyprune", 0.5, {"source": "hidden"}), (4, "uniform", None)]
    return STAGES


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_against_the_oracle(family: str) -> None:
    model = tiny.build(family)
    prefix = [["image", "text:12"], ["image", "text:9"]]
    inputs = tiny.inputs(model, prefix if family == "paligemma" else judge.ROWS)
    arguments = {"stages": staged(family), "keep": 0.5}
    assert judge.prefill_difference(model, inputs, **arguments) <= judge.tolerance(model)
    options = {"do_sample": False, "max_new_tokens": 3}
    assert judge.generate_difference(model, inputs, options, **arguments)[0] <= judge.tolerance(model)


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"cache_implementation": "static"}], ids=["beams", "static"]
)
def test_other_ways_of_generating(options: dict[str, Any]) -> None:
    model = tiny.qwen2_5_vl()
    inputs = tiny.inputs(model, judge.ROWS)
    with tokenprune.pruned(model, stages=STAGES, keep=0.5):
        found = model.generate(**inputs, **options, max_new_tokens=4, do_sample=False)
        lists = tokenprune.report(model).keep_lists
    assert found.shape[0] == len(judge.ROWS) and len(lists) == 3


def test_the_same_method_in_all_stages_is_the_short_form() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, judge.ROWS)
    outputs = []
    for arguments in (
        {"method": "vflowopt", "cuts": [(0, 0.7), (2, 0.5), (4, None)]},
        {"stages": [(0, "vflowopt", 0.7), Stage(2, VFlowOpt(), 0.5), (4, "vflowopt")]},
    ):
        with tokenprune.pruned(model, keep=0.5, **arguments), torch.no_grad():
            outputs.append(model(**inputs).logits)
    assert torch.equal(*outputs)


@dataclass(frozen=True)
class Shown(ScoreMethod):
    """Remembers what it was shown."""

    name: ClassVar[str] = "shown"
    seen: ClassVar[list[ImageTokens]] = []
    wants: Needs = field(default_factory=Needs)

    def needs(self) -> Needs:
        return self.wants

    def score(self, image: ImageTokens) -> Tensor:
        self.seen.append(image)
        return torch.arange(image.n)


def test_each_stage_is_shown_what_it_needs_and_no_more() -> None:
    Shown.seen.clear()
    model = tiny.llava()
    inputs = tiny.inputs(model, [["text:3", "image", "text:4"]])
    stages = [
        (0, Shown(Needs(features=True)), 0.8),
        (2, Shown(Needs(states=("query",), prompt=("key",))), 0.6),
        (4, Shown(Needs(states=("hidden",))), None),
    ]
    with tokenprune.pruned(model, stages=stages, keep=0.6), torch.no_grad():
        model(**inputs)
    first, second, third = Shown.seen
    assert first.features is not None and second.features is third.features is None
    assert second.query is not None and first.query is third.query is None
    assert second.prompt is not None and second.prompt.key is not None and second.prompt.behind == 4
    assert third.hidden is not None and third.prompt is None and [i.cut for i in Shown.seen] == [0, 1, 2]


def test_a_later_stage_knows_what_an_earlier_one_merged() -> None:
    Shown.seen.clear()
    model = tiny.llava()
    inputs = tiny.inputs(model, [["text:3", "image", "text:4"]])
    with tokenprune.pruned(model, stages=[(0, "vflowopt", 0.6), (3, Shown(), None)], keep=0.5):
        model(**inputs)
    (image,) = Shown.seen
    assert image.merged_sizes is not None
    torch.testing.assert_close(image.sizes.sum(), torch.tensor(25.0))


# -- arguments, texts, profiles, reports -----------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"stages": STAGES, "method": "fastv", "keep": 0.5}, tokenprune.ConfigError, "leave method out"),
    ({"stages": STAGES, "layer": 2, "keep": 0.5}, tokenprune.ConfigError, "leave layer out"),
    ({"stages": STAGES, "t": 1.0, "keep": 0.5}, tokenprune.ConfigError, "leave t out"),
    ({"stages": [(0, "auto", 0.5)], "keep": 0.5}, tokenprune.ConfigError, "names the method"),
    ({"stages": [(0, "nosuch", 0.5)], "keep": 0.5}, tokenprune.ConfigError, "unknown method 'nosuch'"),
    ({"stages": [(0, "uniform", 0.5), (0, "fastv")], "keep": 0.5}, tokenprune.ConfigError, "ascending order"),
    ({"stages": [(0, "uniform"), (2, "fastv")], "keep": 0.5}, tokenprune.ConfigError, "needs a keep"),
    ({"stages": [(0, "fastv", 0.5)]}, tokenprune.ConfigError, "'fastv' can cut this model at layers 1"),
    ({"stages": [(0, "question", 0.5)]}, tokenprune.ConfigError, "'question' can cut this model at layers 1"),
    ({"stages": 3}, tokenprune.ConfigError, "must be a list of"),
    ({"stages": [(0, "uniform", 0.5, 7)]}, tokenprune.ConfigError, "a stage is"),
    (
        {"stages": [(0, ImportanceMap(), 0.7), (2, ImportanceMap(t=2.0), None)], "keep": 0.5},
        tokenprune.ConfigError,
        "'vision' is wanted in two ways",
    ),
    (
        {"stages": [(0, "uniform", 0.7), (2, "entropyprune", None, {"lookahead": 1})], "keep": 0.5},
        tokenprune.ConfigError,
        "speaks before the LLM",
    ),
]


@pytest.mark.parametrize(("arguments", "kind", "text"), REFUSED)
def test_refusals(arguments: dict[str, Any], kind: type[Exception], text: str) -> None:
    model = tiny.llava()
    with pytest.raises(kind, match=text):
        tokenprune.wrap(model, **arguments)
    with tokenprune.pruned(model, "uniform", keep=0.5):  # nothing is left behind
        pass


def test_stages_of_equal_parameters_share_the_tower() -> None:
    model = tiny.llava()
    stages = [(0, ImportanceMap(t=2.0), 0.7), (2, ImportanceMap(t=2.0), None)]
    inputs = tiny.inputs(model, judge.ROWS)
    assert judge.prefill_difference(model, inputs, stages=stages, keep=0.5) <= judge.TOLERANCE


def test_texts() -> None:
    text = "0:vflowopt(even=0.3 recycling=none):20%, 10:question:10%,20:question"
    assert read_stages(text) == (
        Stage(0, "vflowopt", 0.2, {"even": 0.3, "recycling": "none"}),
        Stage(10, "question", 0.1),
        Stage(20, "question"),
    )
    assert read_stages(text.replace(",", ";")) == read_stages(text)
    asked = Arguments.from_text({"stages": text, "keep": "11%"})
    assert asked.stages == read_stages(text) and asked.keep == 0.11
    for wrong in ("vflowopt", "0:vflowopt:20%,x", "0", "0:vflowopt(even):2"):
        with pytest.raises(tokenprune.ConfigError):
            read_stages(wrong)


def test_overrides() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, judge.ROWS[:1])

    def layers(**changes: Any) -> tuple[str, tuple[int, ...]]:
        with tokenprune.override(model, **changes), torch.no_grad():
            model(**inputs)
            report = tokenprune.report(model)
        return report.method, report.layers_cut

    with tokenprune.pruned(model, "uniform", keep=0.5, layer=1):
        assert layers(stages=STAGES) == ("stages", (0, 2, 4))
        assert layers() == ("uniform", (1,))
    with tokenprune.pruned(model, stages=STAGES, keep=0.5):
        assert layers(keep=0.55) == ("stages", (0, 2, 4))
        assert layers(method="uniform", layer=2, keep=0.6) == ("uniform", (2,))
        assert layers(stages=[(1, "uniform", 0.5), (3, "fastv", 0.2)]) == ("stages", (1, 3))


def test_reports_name_the_methods() -> None:
    model = tiny.llava()
    with tokenprune.pruned(model, stages=STAGES, keep=0.5), torch.no_grad():
        model(**tiny.inputs(model, judge.ROWS))
        report = tokenprune.report(model)
    assert [own["method"] for own in report.parameters["stages"]] == ["vflowopt", "question", "fastv"]
    assert json.loads(report.to_json())["parameters"]["stages"][1]["pooling"] == "mean"


def test_profiles(tmp_path: Path) -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, judge.ROWS)
    stages = tuple(ProfileStage(layer=layer, method=method, keep=keep) for layer, method, keep in STAGES)
    path = Profile(method="stages", stages=stages, keep=0.5).save(tmp_path / "p.json")
    lists = []
    for arguments in ({"profile": path, "allow_mismatch": True}, {"stages": STAGES, "keep": 0.5}):
        with tokenprune.pruned(model, **arguments), torch.no_grad():
            model(**inputs)
            lists.append(tokenprune.report(model).keep_lists)
    assert lists[0] == lists[1]
    with tokenprune.pruned(model, profile=path, keep=0.4, allow_mismatch=True), torch.no_grad():
        model(**inputs)
        report = tokenprune.report(model)
        assert report.profile == Profile.load(path).hash and report.images[0].kept[0] == round(25 * 0.7 * 0.8)
    for wrong in ({"method": "fastv", "stages": stages}, {"method": "stages"}):
        with pytest.raises(ValueError, match="stages go with method 'stages'"):
            Profile(keep=0.5, **wrong)
    with pytest.raises(tokenprune.ConfigError, match="leave one of them out"):
        tokenprune.wrap(model, profile=path, stages=STAGES, allow_mismatch=True)


# -- what the question asks for ---------------------------------------------------------------------------------------


def asked(pooling: str = "mean", behind: int = 2, **more: Any) -> Tensor:
    """Two heads of width 2, three image tokens, text tokens of which the last `behind` ask."""
    key = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 2.0]], [[0.0, 0.0], [1.0, 0.0]]])
    query = torch.tensor([[[9.0, 9.0], [9.0, 9.0]], [[2.0, 0.0], [0.0, 1.0]], [[0.0, 4.0], [0.0, 3.0]]])
    text = Text(torch.arange(3), query=query, behind=behind, scale=0.5)
    image = ImageTokens(
        n=3, raster=torch.arange(3), grids=(Grid(1, 1, 3),), num_heads=2, key=key, prompt=text
    )
    return Question(pooling=pooling, **more).score(image)


def test_question_by_hand() -> None:
    def softmax(*logits: float) -> Tensor:
        return torch.tensor(logits).float().softmax(0)

    first = (softmax(1, 0, 0) + softmax(0, 2, 0)) / 2  # of head 0: the two that ask
    second = (softmax(0, 1, 0) + softmax(0, 3, 0)) / 2
    torch.testing.assert_close(asked(), (first + second) / 2)
    torch.testing.assert_close(asked("max"), torch.maximum(first, second))
    torch.testing.assert_close(asked("median"), torch.minimum(first, second))
    only = (softmax(1, 0, 0) + softmax(0, 1, 0)) / 2  # the last one is the template's
    torch.testing.assert_close(asked(skip_last=1), only)
    torch.testing.assert_close(asked(behind=0), (softmax(0, 2, 0) + softmax(0, 3, 0)) / 2)
    for wrong in ({"pooling": "no"}, {"skip_last": -1}, {"even": 2}):
        with pytest.raises(tokenprune.ConfigError):
            Question(**wrong)  # type: ignore[arg-type]


def test_needs_are_united() -> None:
    made = Staged((VFlowOpt(), Question()))
    needs = made.needs()
    assert needs.states == ("key",) and needs.prompt == ("query",) and needs.vision is not None
    assert needs.merges and needs.bias and needs.features and not needs.last_row


def test_the_command_line_takes_stages(tmp_path: Path) -> None:
    Image.new("RGB", (96, 96), "red").save(tmp_path / "red.png")
    words = ["run", "small", str(tmp_path / "red.png"), "how many digits ?", "--keep", "25%", "--json"]
    stages = "stages=0:vflowopt:40%;8:fastv:15%;12:fastv"
    result = CliRunner().invoke(app, [*words, "--param", stages], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["report"]
    assert report["layers_cut"] == [0, 8, 12] and report["method"] == "stages"


def test_searches_find_stages_and_keep_them_as_profiles(tmp_path: Path) -> None:
    setting = Setting(12, 1, 0.25, grid_side=6, attention_peak=3.0)
    space = search_space(setting)
    assert space is not None
    point = {name: dimension.default for name, dimension in space.items()}
    assert "stages" not in arguments_at(point, setting)
    found = arguments_at({**point, "reads1": "fastv", "reads2": "question"}, setting)
    stages = check_stages(found["stages"])
    assert [(own.layer, own.method) for own in stages] == [(0, "vflowopt"), (4, "fastv"), (8, "question")]
    assert found["method"] == "auto" and stages[0].parameters["even"] == 0.5 and stages[-1].keep is None
    single = arguments_at({**point, "cuts": 2, "reads1": "fastv"}, setting)
    assert [(own[0], own[1]) for own in single["stages"]] == [(0, "vflowopt"), (4, "fastv")]
    again = arguments_at({**point, "first": "cdpruner"}, setting)
    assert [(own[1], own[3]) for own in again["stages"]] == [("merge", {"of": "cdpruner"})] * 3

    model = tiny.llava(layers=12)
    made = make_profile(
        model, {"keep": 0.25, **found}, np.ones(4), metric="cosine", controls={}, made={"how": "test"}
    )
    path = made.save(tmp_path / "p.json")
    assert Profile.load(path).stages[1].method == "fastv"
    with tokenprune.pruned(model, profile=path), torch.no_grad():
        model(**tiny.inputs(model, judge.ROWS))
        assert tokenprune.report(model).layers_cut == (0, 4, 8)
