"""The benchmark's ideal computes what the library computes; tables resume; formulas and labels are right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tokenprune
from tokenprune.compare.statistics import difference
from tokenprune_eval import early, separation, table
from tokenprune_eval.cells import SOURCES, Cell, grid
from tokenprune_eval.results import Results, pack, unpack
from tokenprune_testbed import evaluation_set
from tokenprune_testbed.evaluate import wilson_interval
from tokenprune_testbed.language import make_inputs
from tokenprune_testbed.modeling import build_model, build_processor

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


# -- the table -----------------------------------------------------------------------------------------------------


def test_grid() -> None:
    cells = grid([0.5, 0.11], [1, 2], seeds=5)
    assert len(cells) == len({cell.key for cell in cells}) == 1 + 2 * 2 * (5 + 1 + 8)
    assert cells[0].arguments() == {"method": "none"}
    last = cells[-1]
    assert last.key == "entropyprune source=hidden normalization=trace layer=2 keep=0.11"
    assert last.label == "entropyprune (hidden, trace)"
    assert cells[1].label == cells[2].label == "random"


@pytest.mark.parametrize("n", [1, 8, 2002])
def test_pack_and_unpack(n: int) -> None:
    correct = (np.random.default_rng(n).random(n) < 0.5).tolist()
    assert unpack(pack(correct), n).tolist() == correct


def _row(key: str, **values: str) -> dict[str, str]:
    return {**dict.fromkeys(table.COLUMNS, ""), "key": key, "status": "ok", "questions": "7", **values}


def test_results_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    results = Results(path, table.COLUMNS)
    correct = [True, False, True, True, False, False, True]
    results.add(_row("a"), correct)
    results.add(_row("b"), correct)
    whole = path.read_text()
    for cut in (1, 5, len("b,") + 3):
        path.write_text(whole[:-cut])  # the kill came while b was written
        again = Results(path, table.COLUMNS)
        again.load()
        assert list(again.rows) == ["a"]
        assert again.correct("a").tolist() == correct
    again.write()
    again.add(_row("c", status="unreachable"))
    final = Results(path, table.COLUMNS)
    final.load()
    assert list(final.rows) == ["a", "c"]
    final.write(["c", "a"])
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["key", "c", "a"]
    with pytest.raises(SystemExit, match="other columns"):
        Results(path, ["key"]).load()


class _FakeTestbed:
    def __init__(self, name: str, scenes: Any, questions: int, batch_size: int) -> None:
        self.digest, self.scenes, self.samples = name, scenes, evaluation_set(questions, scenes=scenes)


def _fake_row(cell: Cell, model: str) -> tuple[dict[str, str], list[bool]]:
    shares = [name for name in table.COLUMNS if name.split()[-1] in ("accuracy", "low", "high")]
    values = {
        **dict.fromkeys(shares, "0.5"),
        "method": cell.method,
        "parameters": " ".join(f"{name}={value}" for name, value in cell.parameters),
        "layer": str(cell.layer or ""),
        "keep": str(cell.keep or ""),
        "model": model,
        "question_seed": "0",
        "scenes": "plain",
        "kv_bytes_per_prompt": "2048",
    }
    return _row(cell.key, **values), [cell.method == "entropyprune"] * 7


def test_table_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def rows(cells: Sequence[Cell], model: str, *rest: Any) -> Iterator[tuple[dict[str, str], list[bool]]]:
        for done, cell in enumerate(cells):
            if done == limit:
                raise KeyboardInterrupt
            asked.append(cell.key)
            yield _fake_row(cell, model)

    monkeypatch.setattr(table, "rows", rows)
    monkeypatch.setattr(table, "Testbed", _FakeTestbed)
    path = str(tmp_path / "table.csv")
    options = [
        "--csv",
        path,
        *"--questions 7 --budgets 0.5 --layers 1 --seeds 2 --rounds 0 --model m --scenes plain".split(),
    ]
    limit = 3
    with pytest.raises(KeyboardInterrupt):
        table.main(options)
    assert len(asked) == 3
    limit = 100
    table.main([*options, "--resume"])
    assert asked == [cell.key for cell in grid([0.5], [1], 2)], "each cell once"
    made = capsys.readouterr().out
    assert "EntropyPrune (query, none) against random: better at 50 % (+100.0 [+100.0, +100.0])." in made
    table.main(["--csv", path, "--summary", "--layers", "1"])
    assert capsys.readouterr().out in made, "--summary prints what the run printed"
    with pytest.raises(SystemExit, match="holds rows with model m, not other"):
        table.main([*options, "--resume", "--model", "other"])


def test_unreachable_budget_is_a_row() -> None:
    testbed = table.Testbed("random", "mosaic", 10, 10)
    row, correct = testbed.evaluate(Cell("uniform", (), 2, 0.11))
    assert correct is None
    assert row["status"] == "unreachable"
    assert float(row["floor"]) == pytest.approx((2 * 144 + 14) / (16 * 144), abs=1e-4)


# -- how well scores tell objects from ground -------------------------------------------------------------------------


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


@pytest.mark.slow
def test_answers_with_and_without_compact_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked later, a question behind its picture is answered as in one prompt; and the cache is smaller."""
    monkeypatch.setattr(early, "METHODS", {"uniform": {"method": "uniform", "layer": 2}})
    early.main(["--models", "small", "--questions", "24", "--csv", str(tmp_path / "early.csv")])
    results = Results(tmp_path / "early.csv", early.COLUMNS)
    results.load()
    rows = list(results.rows.values())
    assert [row["asked"] for row in rows] == ["at once", "later", "at once", "at once", "later", "later"]
    assert rows[0]["accuracy"] == rows[1]["accuracy"], "nothing pruned: one call or two"
    for whole, short in (rows[2:4], rows[4:6]):
        assert float(short["kv_mib"]) < float(whole["kv_mib"])
