"""The benchmark: its ideal computes what the library computes, and what it writes can be read again."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tokenprune
from tokenprune.bench.geometry import (
    GEOMETRIES,
    Subject,
    build,
    fix_features,
    own_subject,
    prompts,
    random_subject,
)
from tokenprune.bench.ideal import prepare
from tokenprune.bench.measure import Bench, Plan, bar, measure, verdict
from tokenprune.bench.output import latest, markdown, plot
from tokenprune.bench.peak import peak_bytes
from tokenprune.cli import app
from tokenprune.cli import bench as bench_command
from tokenprune.tables import append, check
from tokenprune_eval.publish import __main__ as publish
from tokenprune_kernels.timing import Timed, interleave, ratio
from tokenprune_testbed import load

TINY = GEOMETRIES["tiny"]
PLAN = Plan("entropyprune", keep=0.6, layer=2, rounds=3, steps=2, totals=(32,))


@pytest.fixture(scope="module")
def subject() -> Subject:
    return random_subject(TINY)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("batch", "ragged"), [(1, False), (3, False), (3, True)])
def test_contract_23_ideal_equals_ours(batch: int, ragged: bool, attention: str) -> None:
    model = build(TINY, attention=attention)
    inputs = prompts(TINY, batch, ragged)
    features = fix_features(model, batch, TINY)
    given = torch.randint(0, 2, (batch, TINY.visual), generator=torch.Generator().manual_seed(3)).bool()
    keep_lists = [[row.nonzero().flatten().tolist()] for row in given]
    ideal = prepare(model, inputs, features, 2, keep_lists)
    with torch.inference_mode():
        logits, cache = ideal()
        unpruned = model(**inputs).logits[:, -1]
        with tokenprune.pruned(model, layer=2, keep_lists=[keep_lists]):
            output = model(**inputs, use_cache=True, logits_to_keep=1)
    assert (logits - output.logits[:, -1]).abs().max() <= 1e-4
    assert (logits - unpruned).abs().max() > 1e-2, (
        "pruning changes nothing here, so the comparison sees nothing"
    )
    assert [layer.keys.shape for layer in cache.layers] == [
        layer.keys.shape for layer in output.past_key_values.layers
    ]


@pytest.mark.parametrize("method", ["entropyprune", "uniform"])
def test_bench_checks_what_it_times(subject: Subject, method: str) -> None:
    bench = Bench(subject, 2, True, replace(PLAN, method=method))
    bench.check()
    assert 0 < bench.report.kept < 2 * TINY.visual
    bench.error = 1.0
    with pytest.raises(tokenprune.TokenPruneError, match="nothing was timed"):
        bench.check()
    bench.error, bench.effect = 0.0, 0.0
    with pytest.raises(tokenprune.TokenPruneError, match="blind"):
        bench.check()


def test_contract_23_a_wrong_index_is_seen(subject: Subject) -> None:
    bench = Bench(subject, 1, False, PLAN)
    assert bench.features is not None and bench.ideal is not None
    lists = [
        [sorted(set(range(TINY.visual)) - set(image)) for image in row] for row in bench.report.keep_lists[0]
    ]
    wrong = prepare(subject.model, bench.inputs, bench.features, 2, lists)
    with torch.inference_mode():
        assert (wrong()[0] - bench.ideal()[0]).abs().max() > 1e-2


def test_contract_23_launch_bound() -> None:
    assert verdict(1.19, 2.0, 0.97) == "launch-bound"
    assert verdict(1.2, 0.97, 0.97) == "pass"
    assert verdict(3.0, 0.969, 0.97) == "fail"
    assert [bar("cpu", 576, False), bar("cpu", 576, True)] == [0.97, 0.95]
    assert [bar("cuda", 576, False), bar("cuda", 2880, False)] == [0.92, 0.97]


def test_contract_20_peak_memory_is_not_above(subject: Subject) -> None:
    row = Bench(subject, 1, False, PLAN).memory()
    assert 0 < int(row["peak_ours"]) <= int(row["peak_unpruned"])


def test_peak_bytes_counts_what_is_live_at_once() -> None:
    def run() -> torch.Tensor:
        total = torch.zeros(250_000)
        for _ in range(3):
            total = total + 1  # two at a time, never four
        return total

    assert 2_000_000 <= peak_bytes(run) < 2_100_000


def test_append_refuses_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.csv"
    append(path, {"a": "1", "b": "x, y"})
    append(path, {"a": "2", "b": ""})
    assert path.read_text() == 'a,b\n1,"x, y"\n2,\n'
    with pytest.raises(tokenprune.ConfigError, match="other columns"):
        append(path, {"a": "1"})


def test_append_after_a_kill(tmp_path: Path) -> None:
    """A last line without its end gets it; one that is not whole is refused, before anything is measured."""
    path = tmp_path / "bench.csv"
    path.write_text("a,b\n1,2")
    append(path, {"a": "=3", "b": "4"})
    assert path.read_text() == "a,b\n1,2\n'=3,4\n"
    path.write_text("a,b\n1,2\n3")
    for refused in (lambda: append(path, {"a": "5", "b": "6"}), lambda: check(path)):
        with pytest.raises(tokenprune.ConfigError, match=r"last line of .*bench.csv is not whole"):
            refused()
    assert path.read_text() == "a,b\n1,2\n3"
    path.write_text("")
    append(path, {"a": "1", "b": "2"})
    assert path.read_text() == "a,b\n1,2\n"


def test_interleave_pairs_rounds_and_leaves_setup_out() -> None:
    ran: list[str] = []
    arms = {
        "a": Timed(lambda state: ran.append(f"a{state}"), setup=lambda: 1),
        "b": Timed(lambda state: ran.append("b")),
    }
    seconds = interleave(arms, 2, warmup=1)
    assert ran == ["b", "a1", "a1", "b", "b", "a1"], "every second round runs backwards"
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_ratio_is_of_pairs() -> None:
    found = ratio([1.0, 20.0, 3.0], [1.0, 10.0, 6.0])
    assert (found.median, found.p20, found.p80) == pytest.approx((1.0, 0.7, 1.6))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Two batches by the command line, read back."""
    path = tmp_path_factory.mktemp("bench") / "bench.csv"
    what = "bench --geometry tiny --method entropyprune --layer 2 --keep 60% --batch 1 --batch 3r"
    words = f"{what} --repeats 3 --steps 2 --answer 32 --csv"
    result = CliRunner().invoke(app, [*words.split(), str(path)], catch_exceptions=False)
    assert result.exit_code == 0 and "ideal / pruned" in result.output
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_command_writes_whole_rows(rows: list[dict[str, str]]) -> None:
    assert [row["batch"] for row in rows] == ["1", "3 ragged"]
    empty = {name for name in rows[0] if not rows[0][name]}
    assert {name for name in empty if not name.startswith("answer256")} <= {"gpu", "ram_gib", "triton"}
    assert all(float(row["ideal/ours"]) > 0 and row["verdict"] for row in rows)


def test_table_and_figure(rows: list[dict[str, str]], tmp_path: Path) -> None:
    text = markdown(rows)
    assert text.startswith("| | batch 1, 3 rounds | batch 3 ragged, 3 rounds |")
    assert "256-token" not in text  # not run, in no row
    assert len({line.count("|") for line in text.splitlines()}) == 1
    plot(rows, tmp_path / "bench.svg")
    assert (tmp_path / "bench.svg").read_text().startswith("<?xml")


def test_documents_are_made_from_the_rows(rows: list[dict[str, str]], tmp_path: Path) -> None:
    path, readme, page = (tmp_path / name for name in ("bench.csv", "README.md", "docs/performance.md"))
    page.parent.mkdir()
    for row in [*rows, {**rows[0], "method": "auto: x"}, {**rows[0], "gpu": "H200", "geometry": "huge"}]:
        append(path, row)
    for document in (readme, page):
        marks = "<!-- summary: begin -->\nold\n<!-- summary: end -->\n<!-- speed: begin -->\nold\n<!-- speed: end -->\n"
        document.write_text(f"before\n{marks}after\n")
    words = ["speed", "--results", str(tmp_path), "--root", str(tmp_path)]
    publish.main(words)
    for document in (readme, page):
        text = (
            document.read_text().replace("<!-- summary: begin -->\nold\n", "")
            if document == readme
            else page.read_text()
        )
        assert text.startswith("before\n") and text.endswith("<!-- speed: end -->\nafter\n")
        assert "old" not in text and text.index("huge") < text.find("tiny") % len(text), "GPUs first"
    assert page.read_text().index("auto: x") < page.read_text().rindex("entropyprune"), (
        "the default method first"
    )
    assert page.read_text().count("| tiny |") == 3 and readme.read_text().count("| tiny |") == 0
    assert {p.name for p in tmp_path.glob("*.svg")} == {
        f"bench_{name}.svg" for name in ("huge_entropyprune_gpu", "tiny_entropyprune_cpu", "tiny_auto_cpu")
    }
    readme.write_text("no marks")
    with pytest.raises(SystemExit, match="speed: begin"):
        publish.main(words)


def test_latest_row_of_a_machine_counts(rows: list[dict[str, str]]) -> None:
    again = {**rows[0], "rounds": "9"}
    others = [{**rows[0], "gpu": "H200"}, {**rows[0], "method": "uniform"}]
    assert latest([*rows, again, *others]) == [again, rows[1], *others]


@pytest.mark.parametrize(
    ("method", "named"), [("auto", "auto: vflowopt"), ("vflowopt", "vflowopt"), ("random", "random")]
)
def test_methods_that_look_at_pictures_have_a_tower(
    method: str, named: str, recwarn: pytest.WarningsRecorder
) -> None:
    """The default method's rows: no ideal where it cuts often or merges, everything else as for others."""
    subject = random_subject(TINY, looks=True)
    row = measure(Bench(subject, 2, True, replace(PLAN, method=method, layer=None, totals=())))
    assert row["method"] == named and float(row["unpruned/ours"]) > 0 and row["decode ours/unpruned"]
    assert 0 < int(row["kept_after_cut"]) < TINY.visual
    assert not row["ideal/ours"] and not row["verdict"]


@pytest.mark.slow
def test_a_model_of_ones_own() -> None:
    model, processor = load("small")
    bench = Bench(own_subject("small", model, processor), 2, False, replace(PLAN, keep=0.4, totals=()))
    row = measure(bench)
    assert row["geometry"] == "small" and float(row["logits_error"]) <= 1e-4 and row["ideal/ours"]


def test_help_names_every_geometry() -> None:
    assert set(bench_command.NAMES) == set(GEOMETRIES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--geometry 8b", "--geometry is one of"),
        ("--batch 0", "--batch takes a number of rows"),
        ("--batch x", "--batch takes a number of rows"),
        ("--clock sun", "--clock is one of"),
        ("--answer 7", "--answer is 32, 256 or 0"),
        ("--method fastv,x", "NAME,PARAM=VALUE"),
        ("--method auto,t=1", "auto chooses parameters and layers itself"),
        ("--layer 1", "auto chooses parameters and layers itself"),
        ("--method entropyprune,layer=7,compact_early=true", "not compact_early, layer; there are --layer"),
        ("--method entropyprune,nosuch=1", "has no parameter"),
        ("--device meta", "cannot be used here"),
    ],
)
def test_refusals(words: str, message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "--geometry", "tiny", *words.split()])
    assert result.exit_code != 0 and message in result.output
