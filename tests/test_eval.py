"""The benchmark's ideal computes what the library computes; tables resume; formulas and labels are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import tokenprune
from tokenprune import tables
from tokenprune.arguments import read_keep
from tokenprune.compare.arms import NONE, read_methods
from tokenprune.compare.statistics import difference
from tokenprune_eval import experiments
from tokenprune_eval.experiments import EXPERIMENTS
from tokenprune_eval.publish import accuracy
from tokenprune_eval.studies import adaptive, separation
from tokenprune_eval.studies.recorded import SOURCES, images_at
from tokenprune_eval.studies.rows import Rows, pack, unpack
from tokenprune_testbed.evaluate import wilson_interval
from tokenprune_testbed.language import make_inputs
from tokenprune_testbed.modeling import build_model, build_processor

RESULTS = Path(__file__).parents[1] / "eval" / "results"

# -- formulas ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (50, 100, 0.40383, 0.59617), (95, 100, 0.88825, 0.97846)],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=2e-5)


def test_difference_of_identical_answers_is_zero() -> None:
    same = np.array([True, False, True, True])
    found = difference(same, same, [0, 0, 1, 1])
    assert (found.points, found.low, found.high, found.word) == (0, 0, 0, "is level with")


def test_difference_resamples_clusters() -> None:
    """100 questions about one scene are worth one, not a hundred."""
    rng = np.random.default_rng(0)
    theirs = np.zeros(400)
    ours = np.repeat(rng.random(100) < 0.3, 4)
    alone = difference(ours, theirs, range(400))
    together = difference(ours, theirs, [i // 4 for i in range(400)])
    assert alone.points == together.points == pytest.approx(100 * ours.mean())
    assert together.high - together.low > 1.6 * (alone.high - alone.low)
    assert alone.word == "beats"
    assert difference(theirs, ours, range(400)).word == "loses to"


# -- experiments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 8, 2002])
def test_pack_and_unpack(n: int) -> None:
    correct = (np.random.default_rng(n).random(n) < 0.5).tolist()
    assert unpack(pack(correct), n).tolist() == correct


COLUMNS = ["key", "questions", "accuracy"]


def _row(key: str) -> dict[str, str]:
    return {"key": key, "questions": "7", "accuracy": "0.5"}


def test_rows_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    results = Rows(path, COLUMNS)
    correct = [True, False, True, True, False, False, True]
    results.add(_row("a"), correct)
    results.add(_row("b"), correct)
    whole = path.read_text()
    for cut in (1, 5, len("b,") + 3):
        path.write_text(whole[:-cut])  # the kill came while b was written
        again = Rows(path, COLUMNS)
        again.load()
        assert list(again.rows) == ["a"]
        assert again.correct("a").tolist() == correct
    again.add(_row("c"))
    final = Rows(path, COLUMNS)
    final.load()
    assert list(final.rows) == ["a", "c"]
    with pytest.raises(SystemExit, match="other columns"):
        Rows(path, ["key"]).load()


class _FakeBench:
    name = "m"


def test_a_study_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measure(bench: Any, setting: Any) -> tuple[dict[str, str], list[bool]]:
        if len(asked) == limit:
            raise KeyboardInterrupt
        asked.append(f"{setting['keep']} {setting['arm']}")
        return {"questions": "7", "accuracy": "0.5"}, [True] * 7

    def arms(bench: Any, keep: float) -> dict[str, Any]:
        return {arm: {"keep": keep, "arm": arm} for arm in ("a", "b")}

    monkeypatch.setattr(adaptive, "measure", measure)
    monkeypatch.setattr(adaptive, "arms", arms)

    def go() -> Rows:
        rows = Rows(tmp_path / "mine.csv", adaptive.COLUMNS)
        rows.load()
        for keep in (0.5, 0.25):
            adaptive.run(_FakeBench(), keep, rows)  # type: ignore[arg-type]
        return rows

    limit = 3
    with pytest.raises(KeyboardInterrupt):
        go()
    assert len(asked) == 3
    limit = 100
    rows = go()
    assert asked == ["0.5 a", "0.5 b", "0.25 a", "0.25 b"], "each arm once"
    assert list(rows.rows) == ["m 0.5 a", "m 0.5 b", "m 0.25 a", "m 0.25 b"]
    assert go().correct("m 0.5 a").all()


def test_committed_rows_are_shown() -> None:
    """With the columns that the command writes: it could go on with them."""
    rows = Rows(RESULTS / "adaptive.csv", adaptive.COLUMNS)
    rows.load()
    assert rows.rows and "|" in adaptive.table(rows) and "|" in adaptive.by_kind(rows)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_committed_comparisons_are_what_experiments_ask(name: str) -> None:
    """Every committed comparison keeps its command."""
    own = EXPERIMENTS[name]
    rows = tables.read(RESULTS / f"{name}.csv")
    asked = {NONE, *read_methods(own.methods), *own.controls}
    if name == "compare_smol":
        asked.remove("auto")  # of profiles that are no longer bundled: taken out
    assert {row["arm"] for row in rows} == asked
    assert {float(row["keep"]) for row in rows if row["keep"]} == {read_keep(text) for text in own.budgets}
    assert {row["questions"] for row in rows} == {str(own.questions)}


def test_pages_say_what_is_committed() -> None:
    root = RESULTS.parents[1]
    results = (root / "docs" / "results.md").read_text()
    assert accuracy.default(RESULTS, ("auto", "uniform")) in (root / "README.md").read_text()
    assert accuracy.above(RESULTS) in results
    assert accuracy.section(accuracy.read(RESULTS, "compare")) in results
    assert accuracy.every_method(accuracy.read(RESULTS, "methods")).rstrip() in results


def test_an_experiment_is_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiments.main(["--show", "layers_small", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert shown.startswith("layers_small: tokenprune compare small --data testbed")
    assert "--method entropyprune,layer=7,source=hidden" in shown
    with pytest.raises(SystemExit):
        experiments.main(["nothing"])


# -- formulas of studies -------------------------------------------------------------------------------------------


def test_auc_counts_pairs() -> None:
    scores = torch.tensor([0.1, 0.5, 0.5, 0.9, 0.2])
    is_object = torch.tensor([False, True, False, True, False])
    pairs = [(0.5 if a == b else float(a > b)) for a in scores[is_object] for b in scores[~is_object]]
    assert separation.auc(scores, is_object) == pytest.approx(sum(pairs) / len(pairs))
    assert separation.auc(is_object.float(), is_object) == 1.0


def test_energy_in_the_mean() -> None:
    one = torch.tensor([[3.0, 4.0]]).expand(5, -1)
    assert separation.energy_in_mean(one) == pytest.approx(1.0)
    assert separation.energy_in_mean(torch.eye(4)) == pytest.approx(0.25)


def test_separation_reads_the_states_a_method_sees() -> None:
    torch.manual_seed(0)
    model, processor = build_model(3).eval(), build_processor()
    scenes, samples = separation.draw(2, "mosaic")
    labels = torch.zeros(2, 144, dtype=torch.long)
    labels[:, ::7] = 1
    inputs = make_inputs(processor, samples)
    rows = separation.measure(model, inputs, labels, 2)
    assert [row["state"] for row in rows] == list(SOURCES)
    with torch.inference_mode():
        states = model(**inputs, output_hidden_states=True).hidden_states[2]
        columns = (inputs["input_ids"] == model.config.image_token_id).nonzero(as_tuple=True)
    norms = states[columns].norm(dim=-1)[labels.flatten() == 1]
    assert float(rows[-1]["norm object"]) == pytest.approx(norms.median().item(), rel=1e-3)
    (projector,) = separation.measure(model, inputs, labels, 0)
    assert "auc none" not in projector
    assert 0 <= float(projector["ground energy in its mean"]) <= 1
    assert len(scenes) == 2 and not tokenprune.is_wrapped(model)


@pytest.mark.parametrize("source", ["query", "key", "value", "hidden"])
def test_every_images_states_are_recorded(source: str) -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, (["text:5", "image", "text:3", "image", "text:4"],))
    states = [getattr(image, source) for image in images_at(model, [inputs, inputs], (source,), 2)]  # type: ignore[arg-type]
    shape = (25, 64) if source == "hidden" else (25, 2 if source in ("key", "value") else 4, 16)
    assert [tuple(x.shape) for x in states] == [shape] * 4
    torch.testing.assert_close(states[0], states[2])
    assert not torch.equal(states[0], states[1])
