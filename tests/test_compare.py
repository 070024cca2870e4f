"""`tokenprune compare`: the arms, what is counted of them, resuming, and the report."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import tokenprune
from tokenprune import ConfigError, UnsupportedModelError
from tokenprune.analysis.batches import batched
from tokenprune.analysis.calibration import make_prompt
from tokenprune.analysis.memory import Memory
from tokenprune.cli import app
from tokenprune.cli.compare import CONTROLS as controls_told
from tokenprune.compare.arms import CONTROLS, NONE, Arm, make_arms
from tokenprune.compare.downsample import interpolated, shrunk_prompt
from tokenprune.compare.export import write_csv, write_json
from tokenprune.compare.page import write_page
from tokenprune.compare.questions import Question, is_right, load_questions, normal
from tokenprune.compare.run import CompareOptions, Comparison, compare
from tokenprune.compare.statistics import mean_interval
from tokenprune.compare.store import ASKED, LINES
from tokenprune.methods import METHODS
from tokenprune.models import find_family, stock_model
from tokenprune.tables import csv_text
from tokenprune.tune import measure
from tokenprune_testbed import evaluate, evaluation_set, load

pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.xdist_group("compare")]
OPTIONS: dict[str, Any] = {
    "methods": ("auto", "entropyprune,layer=1,source=hidden"),
    "budgets": (0.5, 0.05),
    "max_new_tokens": 6,
    "batch_size": 5,
    "time_batches": (2,),
    "rounds": 1,
    "new_tokens": 2,
}
COUNT = 20


@pytest.fixture(scope="module")
def bed() -> tuple[Any, Any]:
    return load("small")


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return load_questions("testbed", COUNT)


@pytest.fixture(scope="module")
def found(bed: Any, questions: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    folder = tmp_path_factory.mktemp("compare") / "out"
    return compare(*bed, questions, folder, **OPTIONS), folder


# -- arms --------------------------------------------------------------------------------------------------------------


def test_controls_stand_beside_every_budget(bed: Any) -> None:
    arms = make_arms(bed[0], ["vflowopt"], [0.2, 0.5], 16)
    assert [arm.name for arm in arms] == [NONE, "vflowopt", *CONTROLS, "vflowopt", *CONTROLS]
    assert [arm.keep for arm in arms[1:6]] == [0.5] * 5
    deep = {arm.keep: arm.arguments["layer"] for arm in arms if arm.name == "random deep"}
    assert deep == {0.5: 4, 0.2: 1}  # half of the budget is spent before the cut


def test_controls_can_be_chosen(bed: Any) -> None:
    assert [a.name for a in make_arms(bed[0], ["vflowopt"], [0.5], 16, ["uniform"])] == [
        NONE,
        "vflowopt",
        "uniform",
    ]
    with pytest.raises(ConfigError, match="unknown control 'unifrom'"):
        CompareOptions(controls=("unifrom",))
    assert tuple(CONTROLS) == controls_told


def test_all_methods_and_other_seeds(bed: Any) -> None:
    arms = make_arms(bed[0], ["all", "random,layer=0,seed=1"], [0.5], 16)
    names = [arm.name for arm in arms]
    assert names[0] == NONE and names[1] == "auto" and set(METHODS) - {"none"} <= set(names)
    assert names.count("random") == names.count("random,layer=0,seed=1") == 1
    with pytest.raises(ConfigError, match="given twice"):
        make_arms(bed[0], ["all", "fastv"], [0.5], 16)


def test_what_reads_the_question_is_said(found: Any, bed: Any, questions: Any) -> None:
    rows = [row for row in found[0].summary.rows if row.keep and not row.refused and row.setting]
    assert rows and not any(row.setting["reads_text"] for row in rows if row.name != "auto")
    for method, reads in (("fastv", True), ("merge", True), ("restore", False), ("vflowopt", False)):
        parameters = {"of": "divprune"} if method == "restore" else {}
        with tokenprune.pruned(bed[0], method, keep=0.5, **parameters):
            bed[0](**make_prompt(bed[1], questions[0].images, questions[0].text))
            assert tokenprune.report(bed[0]).reads_text is reads


def test_auto_is_left_out_where_nothing_is_known(bed: Any) -> None:
    from tokenprune_testbed.modeling import build_model

    torch.manual_seed(0)
    assert all(arm.name != "auto" for arm in make_arms(build_model(), ["auto"], [0.5], 16))
    assert any(arm.name == "auto" for arm in make_arms(bed[0], ["auto"], [0.5], 16))


@pytest.mark.parametrize(
    ("methods", "budgets", "advice"),
    [
        (["nosuch"], [0.5], "unknown method"),
        (["fastv,sauce=hidden"], [0.5], "no parameter"),
        (["random"], [0.5], "always there"),
        (["fastv,keep=0.3"], [0.5], "leave keep out"),
        (["fastv", "fastv"], [0.5], "given twice"),
        (["fastv"], [0.5, 0.5], "given twice"),
        (["fastv"], [192], "fraction"),
        (["fastv"], [1.0], "fraction"),
    ],
)
def test_what_cannot_be_compared(bed: Any, methods: list[str], budgets: list[float], advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        make_arms(bed[0], methods, budgets, 16)


# -- questions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "right", "exact", "contains"),
    [
        ("The red.", ["red"], True, True),
        ("it is red", ["red"], False, True),
        ("reddish", ["red"], False, False),
        ("Yes", ["no", "yes"], True, True),
        ("", ["no"], False, False),
        ("3", ["3"], True, True),
    ],
)
def test_is_right(answer: str, right: list[str], exact: bool, contains: bool) -> None:
    assert is_right(answer, right) is exact
    assert is_right(answer, right, "contains") is contains


def test_questions_of_a_file(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [
        {"image": "a.png", "question": "q ?", "answers": ["x", {"answer": "y"}], "family": "f"},
        {"image": ["a.png", "a.png"], "prompt": "r ?", "answer": 3},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = load_questions(tmp_path / "q.jsonl", 5)
    assert (first.text, first.answers, first.family) == ("q ?", ("x", "y"), "f")
    assert (second.answers, len(second.images)) == (("3",), 2)
    assert first.pictures != second.pictures
    lines[1].pop("answer")
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ConfigError, match="1 of 2"):
        load_questions(tmp_path / "q.jsonl", 5)
    lines[0]["answers"] = [[1]]  # type: ignore[list-item]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ConfigError, match="line 1"):
        load_questions(tmp_path / "q.jsonl", 5)


# -- the smaller picture -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.5, 0.22, 0.11])
def test_smaller_picture_of_a_model_of_one_size(bed: Any, questions: list[Question], keep: float) -> None:
    model, processor = bed
    question = questions[0]
    family = find_family(stock_model(model))
    inputs = shrunk_prompt(family, processor, question.images, question.text, keep)
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    rows, columns = (side // 8 for side in inputs["pixel_values"].shape[-2:])
    assert tokens == rows * columns <= keep * 144 < (rows + 1) * (columns + 1)
    with pytest.raises((ValueError, RuntimeError)):
        model(**inputs)  # the tower has positions for 144 patches
    with interpolated(family), torch.inference_mode():
        assert model(**inputs).logits.isfinite().all()
    assert not stock_model(model).model.vision_tower._forward_pre_hooks


class PatchProcessor:
    """A token per 4 x 4 pixels, but never fewer than `least`."""

    chat_template = "x"

    def __init__(self, least: int = 1) -> None:
        self.least = least

    def apply_chat_template(self, messages: Any, **_: Any) -> dict[str, torch.Tensor]:
        images = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
        count = sum(max(self.least, (i.width // 4) * (i.height // 4)) for i in images)
        return {"input_ids": torch.full((1, count + 2), 7)}


def test_smaller_picture_of_a_model_of_many_sizes() -> None:
    family: Any = SimpleNamespace(token_id=lambda kind: 7)
    images = [Image.new("RGB", (160, 80)), Image.new("RGB", (40, 40))]
    whole = 40 * 20 + 100 + 2
    inputs = shrunk_prompt(family, PatchProcessor(), images, "q", 0.3)
    assert 0.2 * whole < inputs["input_ids"].shape[1] <= 0.3 * whole
    with pytest.raises(UnsupportedModelError, match="so small"):
        shrunk_prompt(family, PatchProcessor(least=99), images, "q", 0.1)


# -- what is counted ---------------------------------------------------------------------------------------------------


def test_unpruned_answers_are_the_evaluators(bed: Any, found: Any) -> None:
    theirs = evaluate(*bed, evaluation_set(COUNT), batch_size=5)
    summary = found[0].summary
    assert summary.answers[NONE] == theirs.answers
    assert summary.whole.accuracy.value == theirs.overall.accuracy
    assert {f: s.value for f, s in summary.whole.families.items()} == pytest.approx(
        {f: s.accuracy for f, s in theirs.families.items()}
    )


def test_drift_is_the_tuners(bed: Any, found: Any) -> None:
    asker = found[0].asker
    calls = list(batched(asker.prompts, 1))
    for arm in found[0].arms:
        row = found[0].summary.at(arm.name, arm.keep)
        if arm.shrinks or row is None or row.refused:
            continue
        expected = measure(bed[0], calls, arm.arguments, Memory()).mean()
        assert row.drift == pytest.approx(expected, abs=1e-6)


def test_rows_by_hand(found: Any, questions: list[Question]) -> None:
    summary = found[0].summary
    right = {
        key: np.array([normal(a) == q.answers[0] for a, q in zip(own, questions, strict=True)])
        for key, own in summary.answers.items()
    }
    group = right[NONE] & ~right["downsample @ 0.5"]
    assert group.any()
    for name in ("auto", "uniform", "random deep"):
        row, key = summary.at(name, 0.5), f"{name} @ 0.5"
        assert row.accuracy.value == pytest.approx(right[key].mean())
        assert row.group_a.value == pytest.approx(right[key][group].mean())
        assert row.group_a.total == group.sum()
        same = [a == b for a, b in zip(summary.answers[key], summary.answers[NONE], strict=True)]
        assert row.loyalty.value == pytest.approx(np.mean(same))
        expected = 100 * (right[key].mean() - right["random @ 0.5"].mean())
        assert row.against["random"].points == pytest.approx(expected)
        assert row.kept == pytest.approx(0.5, abs=0.01)
        assert row.kv_share < 0.6 and row.flops < 0.55
    whole = summary.whole
    assert (whole.kept, whole.kv_share, whole.flops, whole.loyalty.value) == (1.0, 1.0, 1.0, 1.0)
    assert whole.drift == pytest.approx(0, abs=1e-6)


def test_budgets_out_of_reach_are_rows_that_say_so(found: Any) -> None:
    row = found[0].summary.at("entropyprune,layer=1,source=hidden", 0.05)
    assert "cannot be reached" in row.refused
    assert found[0].summary.at("auto", 0.05).refused == ""


def test_times(found: Any) -> None:
    summary = found[0].summary
    assert summary.whole.times[2, "prefill"]["speedup"] == 1.0
    for row in summary.rows:
        assert row.refused or set(row.times) == {(2, w) for w in ("prefill", "first token", "whole answer")}
        assert all(time["ms"] > 0 for time in row.times.values())


def test_model_is_as_it_was(bed: Any, found: Any) -> None:
    model = bed[0]
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    ours = [h for h in hooks if str(getattr(h, "__module__", "")).startswith("tokenprune")]
    assert not ours and "_tokenprune" not in vars(model)
    assert "forward" not in vars(model.model.vision_tower)


def test_interval_of_a_mean() -> None:
    rng = np.random.default_rng(1)
    values = rng.random(400) < 0.8
    low, high = mean_interval(values, range(400))
    spread = 1.96 * np.sqrt(0.8 * 0.2 / 400)
    assert (low, high) == pytest.approx((values.mean() - spread, values.mean() + spread), abs=0.01)
    assert mean_interval(np.ones(5), range(5)) == (1.0, 1.0)
    assert mean_interval(np.array([0, 1]), [3, 3]) == (0.5, 0.5)


# -- on disk -----------------------------------------------------------------------------------------------------------


def test_resume_after_a_kill(bed: Any, questions: Any, found: Any, tmp_path: Path) -> None:
    whole, folder = found
    copy = tmp_path / "out"
    shutil.copytree(folder, copy)
    lines = (copy / LINES).read_bytes().splitlines(keepends=True)
    answers = [i for i, line in enumerate(lines) if b'"answer"' in line]
    (copy / LINES).write_bytes(
        b"".join(lines[: answers[27]]) + lines[answers[27]][:40]
    )  # in the middle of a line
    with pytest.raises(ConfigError, match="--resume"):
        compare(*bed, questions, copy, **OPTIONS)
    again = compare(*bed, questions, copy, resume=True, **OPTIONS)
    assert again.summary.answers == whole.summary.answers
    for one, other in zip(again.summary.rows, whole.summary.rows, strict=True):
        timeless = [
            replace(row, times={}, drift=0.0, kept=0.0, kv=0.0, kv_share=0.0, flops=0.0)
            for row in (one, other)
        ]
        assert repr(timeless[0]) == repr(timeless[1])
    keys = [
        (r["arm"], r["question"]) for r in map(json.loads, (copy / LINES).open()) if r["kind"] == "answer"
    ]
    assert len(keys) == len(set(keys))


DAMAGE: dict[str, tuple[str, Any]] = {
    "asked is empty": (ASKED, lambda data: b""),
    "asked is half": (ASKED, lambda data: data[:20]),
    "asked is a list": (ASKED, lambda data: b"[1]"),
    "zeros of a power cut": (LINES, lambda data: data + b"\0" * 512 + b"\n"),
    "a broken line": (LINES, lambda data: data[:700] + b"\n" + data[900:]),
    "a line without kind": (LINES, lambda data: b'{"arm": "none"}\n' + data),
    "no text": (LINES, lambda data: b"\xff\xfe\n" + data),
    "an answer without text": (LINES, lambda data: data + b'{"kind": "answer", "arm": "none"}\n'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_resume_of_a_damaged_folder(
    damage: str, bed: Any, questions: Any, found: Any, tmp_path: Path
) -> None:
    """Whole lines are kept, the rest is asked again; what was asked stands twice."""
    whole, folder = found
    copy, (name, change) = tmp_path / "out", DAMAGE[damage]
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(change((copy / name).read_bytes()))
    again = compare(*bed, questions, copy, resume=True, **OPTIONS)
    assert again.summary.answers == whole.summary.answers
    assert all(isinstance(json.loads(line)["kind"], str) for line in (copy / LINES).open())


def test_a_folder_that_no_longer_says_what_was_asked(
    bed: Any, questions: Any, found: Any, tmp_path: Path
) -> None:
    copy = tmp_path / "out"
    shutil.copytree(found[1], copy)
    (copy / ASKED).write_text("")
    lines = [line for line in (copy / LINES).open() if json.loads(line)["kind"] != "asked"]
    (copy / LINES).write_text("".join(lines))
    with pytest.raises(ConfigError, match="is damaged, and nothing else says"):
        compare(*bed, questions, copy, resume=True, **OPTIONS)


def test_no_cell_is_a_formula() -> None:
    assert [csv_text(text) for text in ("=1+1", "+x", "-2.5", "-", "@a", "plain", "1e3", "")] == [
        *("'=1+1", "'+x", "-2.5", "'-", "'@a", "plain", "1e3", "")
    ]


def test_more_budgets_later_and_another_comparison_is_refused(
    bed: Any, questions: Any, found: Any, tmp_path: Path
) -> None:
    copy = tmp_path / "out"
    shutil.copytree(found[1], copy)
    more = {**OPTIONS, "budgets": (0.5, 0.05, 0.3), "methods": ("auto",), "time_batches": ()}
    summary = compare(*bed, questions, copy, resume=True, **more).summary
    assert (
        summary.at("auto", 0.3) is not None and summary.at("entropyprune,layer=1,source=hidden", 0.5) is None
    )
    with pytest.raises(ConfigError, match="questions"):
        compare(*bed, questions[1:], copy, resume=True, **more)


def test_csv_and_json(found: Any, tmp_path: Path) -> None:
    summary = found[0].summary
    write_csv(summary, tmp_path / "c.csv", {"cpu": "x"})
    write_json(summary, tmp_path / "c.json", {"cpu": "x"})
    with (tmp_path / "c.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(summary.rows) and all(row["cpu"] == "x" for row in rows)
    row = next(r for r in rows if (r["arm"], r["keep"]) == ("auto", "0.5"))
    assert float(row["accuracy"]) == pytest.approx(summary.at("auto", 0.5).accuracy.value, abs=1e-4)
    assert json.loads(row["setting"])["profile"]
    document = json.loads((tmp_path / "c.json").read_text())
    assert document["answers"] == summary.answers and len(document["questions"]) == COUNT


# -- the report --------------------------------------------------------------------------------------------------------


def test_page_needs_nothing_else(found: Any, tmp_path: Path) -> None:
    comparison = found[0]
    hostile = "<script>alert(1)</script>"
    asked = [replace(q, text=f"{hostile} {q.text}") for q in comparison.summary.questions]
    summary = replace(comparison.summary, questions=asked)
    page = tmp_path / "report.html"
    about = {"model": "m", "data": "d", "date": "today", "cpu": "c", "gpu": ""}
    write_page(replace(comparison, summary=summary), page, about, "tokenprune compare m")
    text = page.read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:|#)", text)
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "<link" not in text and "@import" not in text and "url(http" not in text
    for row in summary.rows:
        assert row.name in text
        if row.accuracy is not None:
            assert str(row.accuracy) in text
    assert "tokenprune compare m" in text and "not possible" in text
    assert text.count("data:image/jpeg") >= len(comparison.arms) // 2 - 1


def test_without_right_answers(bed: Any, questions: Any, tmp_path: Path) -> None:
    asked = [replace(q, answers=()) for q in questions[:4]]
    options = {**OPTIONS, "methods": ("vflowopt",), "budgets": (0.3,), "time_batches": ()}
    comparison = compare(*bed, asked, tmp_path / "out", **options)
    row = comparison.summary.at("vflowopt", 0.3)
    assert row.accuracy is None and row.loyalty.total == 4 and row.drift > 0 and not row.loses_to
    about = {"model": "m", "data": "d", "date": "today", "cpu": "c", "gpu": ""}
    write_page(comparison, tmp_path / "r.html", about, "c")
    write_csv(comparison.summary, tmp_path / "c.csv", about)
    assert "Accuracy</h2>" not in (tmp_path / "r.html").read_text()


def test_on_the_command_line(tmp_path: Path) -> None:
    words = ["compare", "small", "--data", "testbed", "--out", str(tmp_path / "out"), "--questions", "6"]
    words += ["--budget", "30%", "--method", "vflowopt", "--time-batch", "0", "--max-new-tokens", "6"]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert Path(document["report"]).is_file() and Path(document["csv"]).is_file()
    assert document["command"].startswith(
        "tokenprune compare small --data testbed --out out --method vflowopt"
    )
    shown = CliRunner().invoke(app, [*words, "--resume"])
    assert shown.exit_code == 0 and "vflowopt" in shown.stdout


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["--budget", "192"], "fraction"),
        (["--method", "nosuch"], "unknown method"),
        (["--out", "no/such/folder"], "no folder"),
        (["--time-batch", "-1"], "time-batch"),
    ],
)
def test_refused_before_a_model_is_loaded(tmp_path: Path, words: list[str], advice: str) -> None:
    given = ["compare", "no/such/model", "--data", "testbed", "--out", str(tmp_path / "out"), *words]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2 and advice in result.output
    assert not (tmp_path / "out").exists()


def test_an_arm_has_one_key() -> None:
    assert Arm("fastv", 0.125).key == "fastv @ 0.125" and Arm(NONE, None).key == NONE
