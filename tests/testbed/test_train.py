"""The training command runs end to end, resumes, and averages gradients over processes."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

TINY = ["--phases", "1x16:0.01", "2x16:0.01", "--batch-size", "2", "--eval-samples", "7", "--threads", "1"]

# Each process holds the gradients rank + 1 and 10 * (rank + 1), and one parameter without any.
AVERAGING = """
import sys
import torch
from tokenprune_testbed.train import RANK, average_gradients, step_seconds
torch.distributed.init_process_group("gloo")
a, b, c = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), (1,)))
a.grad, b.grad = torch.full((2, 3), RANK + 1.0), torch.full((4,), 10.0 * (RANK + 1))
average_gradients([a, b, c])
assert c.grad is None
assert a.grad.eq(1.5).all() and b.grad.eq(15.0).all(), (a.grad, b.grad)
seconds = [None, None]
torch.distributed.all_gather_object(seconds, step_seconds(1000.0 * RANK))
assert seconds[0] == seconds[1], seconds
torch.distributed.destroy_process_group()
"""


def run(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "curve.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_both_stages_then_go_on(tmp_path):
    out = tmp_path / "run"
    train = ("-m", "tokenprune_testbed.train", "--out", str(out), "--dense-minutes", "0.01", *TINY)
    run(*train)
    assert [r["layers"] for r in rows(out)] == ["1", "2"]  # one evaluation at the end of each phase
    model = LlavaForConditionalGeneration.from_pretrained(out / "model")
    assert len(model.model.language_model.layers) == 2
    assert model.dtype == torch.bfloat16

    steps = int(rows(out)[-1]["step"])
    third = train.index("2x16:0.01") + 1
    run(*train[:third], "2x144:0.01", *train[third:])
    last = rows(out)[-1]
    assert (last["layers"], last["visual_tokens"]) == ("2", "144")
    assert int(last["step"]) > steps  # the first two phases were not run again
    assert len(rows(out)) == 3


@pytest.mark.slow
def test_resume_from_a_model(tmp_path):
    from tokenprune_testbed.modeling import build_model, build_processor

    torch.manual_seed(0)
    start = build_model(1).to(torch.bfloat16)
    start.save_pretrained(tmp_path / "start")
    build_processor().save_pretrained(tmp_path / "start")
    out = tmp_path / "run"
    resume = ("--resume-from", str(tmp_path / "start"), "--dense-weight", "0.3", "--focus-share", "0.5")
    run("-m", "tokenprune_testbed.train", "--out", str(out), *resume, *TINY[3:], "--phases", "1x144:0.02")
    model = LlavaForConditionalGeneration.from_pretrained(out / "model")
    tower = model.model.vision_tower.state_dict()
    assert all(torch.equal(v, tower[k]) for k, v in start.model.vision_tower.state_dict().items())
    moved = model.model.multi_modal_projector.linear_1.weight
    assert not torch.equal(moved, start.model.multi_modal_projector.linear_1.weight)


def test_gradients_are_averaged_over_processes(tmp_path):
    script = tmp_path / "averaging.py"
    script.write_text(AVERAGING)
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
