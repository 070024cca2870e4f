"""Published tables: they are read and checked, their runs keep what they say, and verdicts are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
from typer.testing import CliRunner

import tokenprune
from tokenprune import ConfigError
from tokenprune.analysis.calibration import make_prompt
from tokenprune.cli import app
from tokenprune_eval.checkpoints import write_llava
from tokenprune_eval.protocols import __main__ as command
from tokenprune_eval.protocols.table import NONE, TABLES, Table, load_table, table_names
from tokenprune_eval.protocols.verdict import verdict

pytest.importorskip("lmms_eval")
from tokenprune.lmms.model import read_arguments

pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.xdist_group("protocols")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def llava(checkpoint: Path) -> tuple[Any, Any]:
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint).eval()
    return model, AutoProcessor.from_pretrained(checkpoint)


@pytest.mark.parametrize("name", table_names())
def test_runs_keep_what_they_say(name: str, llava: Any, tmp_path: Path) -> None:
    """On a checkpoint of LLaVA-1.5's lengths, with as many layers as the table's own model has."""
    model, processor = llava
    if "llava-1.5" not in name:
        model = LlavaForConditionalGeneration.from_pretrained(write_llava(tmp_path, layers=28)).eval()
    inputs = make_prompt(processor, [Image.new("RGB", (300, 200), (200, 30, 30))], "what is it ?")
    table = load_table(name)
    for run, args in table.runs().items():
        given = dict(pair.split("=") for pair in args.split(","))
        with tokenprune.pruned(model, **read_arguments(given).given()), torch.inference_mode():
            model(**inputs, logits_to_keep=1)
            told = tokenprune.report(model)
        if run == NONE:
            assert told.retention_average == 1.0
            continue
        budget = float(run.rsplit("-", 1)[1])
        wanted = budget / 576 if budget > 1 else budget
        found = told.retention_after_cut if "after_cut" in args else told.retention_average
        assert found == pytest.approx(wanted, abs=2 / 576), run


def test_the_released_code_keeps_166_98_and_29(llava: Any) -> None:
    """EntropyPrune's own arithmetic: averages of 192, 128 and 64 at layer 2 of 32 (spec, section 3)."""
    model, processor = llava
    inputs = make_prompt(processor, [Image.new("RGB", (300, 200))], "what is it ?")
    for keep, kept in ((192, 166), (128, 98), (64, 29)):
        with tokenprune.pruned(model, "entropyprune", keep=keep), torch.inference_mode():
            model(**inputs, logits_to_keep=1)
            assert tokenprune.report(model).kept == kept


def test_tables_are_checked() -> None:
    with pytest.raises(ConfigError, match="choose one of"):
        load_table("../table")
    given = yaml.safe_load((TABLES / "llava-1.5-7b-tokens.yaml").read_text())
    given["methods"][0]["published"] = [1.0]
    with pytest.raises(ValueError, match="1 numbers for 3 budgets"):
        Table.model_validate(given)
    with pytest.raises(ValueError, match="surprise"):
        Table.model_validate({**given, "surprise": 1})


def results(folder: Path, scores: dict[str, dict[str, float]], stamp: str = "1") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    document = {"results": {t: {f"{m},none": v for m, v in own.items()} for t, own in scores.items()}}
    (folder / f"{stamp}_results.json").write_text(json.dumps(document))


def test_verdicts(tmp_path: Path) -> None:
    table = load_table("entropyprune-llava-1.5-7b")
    with pytest.raises(ConfigError, match="unpruned"):
        verdict(table, tmp_path)
    whole = {
        "gqa": {"exact_match": 0.62},
        "mmbench_en_dev_static": {"gpt_eval_score": 64.0},
        "mme": {"mme_perception_score": 1510.0, "mme_cognition_score": 350.0},
        "pope": {"pope_f1_score": 0.8},  # 85.9 is published
        "scienceqa_img": {"exact_match": 0.69},
    }
    results(tmp_path / "none", whole)
    pruned = {task: {m: v * 0.95 for m, v in own.items()} for task, own in whole.items()}
    results(tmp_path / "entropyprune-192", {t: dict.fromkeys(own, 0.1) for t, own in whole.items()}, "1")
    results(tmp_path / "entropyprune-192", pruned, "2")  # the newer one counts
    lines = {line.what: line for line in verdict(table, tmp_path)}
    assert lines["unpruned gqa"].found == pytest.approx(62.0) and lines["unpruned gqa"].word == "within"
    assert lines["unpruned mme"].found == 1860.0 and lines["unpruned mme"].word == "within"
    assert lines["unpruned pope"].word == "OUTSIDE"
    mean = lines["entropyprune at 192: mean % of unpruned"]
    assert mean.found == pytest.approx(95.0) and mean.word == "within"
    assert lines["random at 192: mean % of unpruned"].word == "missing"
    results(
        tmp_path / "entropyprune-192", {t: {m: v * 0.8 for m, v in o.items()} for t, o in whole.items()}, "3"
    )
    assert {ln.what: ln for ln in verdict(table, tmp_path)}[mean.what].word == "OUTSIDE"


def test_show_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["show", "llava-1.5-7b-tokens"])
    shown = capsys.readouterr().out
    assert shown.count("python -m lmms_eval --model tokenprune") == 1 + 5 * 3
    assert "keep=192" in shown and "VisionZip (192: 97.8, 128: 96.4, 64: 93.0)" in shown


@pytest.mark.slow
def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything but lmms-eval's own process, which test_lmms starts."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    def in_process(model_args: str, tasks: str, out: Path, *more: str, batch_size: int = 1) -> None:
        include = more[more.index("--include_path") + 1]
        found = simple_evaluate(
            model="tokenprune",
            model_args=model_args,
            tasks=tasks.split(","),
            task_manager=TaskManager("ERROR", include_path=[include], include_defaults=False),
            batch_size=batch_size,
            device="cpu",
            bootstrap_iters=0,
            verbosity="ERROR",
        )
        out.mkdir(parents=True)
        (out / "now_results.json").write_text(json.dumps({"results": found["results"]}, default=str))

    monkeypatch.setattr(command, "run_lmms_eval", in_process)
    command.main(["run", "entropyprune-llava-1.5-7b", "--dry-run", "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert (
        "entropyprune-192: ran" in shown and "random at 192: mean % of unpruned               100.0" in shown
    )


@pytest.mark.slow
def test_compare_on_a_checkpoint_of_llava(checkpoint: Path, tmp_path: Path) -> None:
    """What the README promises for LLaVA-1.5-7B, on a folder of the same layout."""
    for name, color in {"a": (200, 0, 0), "b": (0, 0, 200)}.items():
        Image.new("RGB", (320, 240), color).save(tmp_path / f"{name}.png")
    lines = [{"image": f"{name}.png", "question": "is it red ?", "answer": "yes"} for name in "ab"]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = [
        "compare",
        str(checkpoint),
        "--data",
        str(tmp_path / "q.jsonl"),
        "--out",
        str(tmp_path / "report"),
    ]
    result = CliRunner().invoke(app, [*words, "--time-batch", "1", "--rounds", "1", "--new-tokens", "2"])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "report" / "report.html").read_text()
    assert "entropyprune" in page and "downsample" in page and "not possible" not in page
