"""Tensor parallelism: each rank keeps the same tokens and answers as one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import parallel_worker
import tiny
import tokenprune
from tokenprune.runtime import tower

NAMES = ("llava", "qwen3_vl", "gemma3")


@pytest.mark.slow
def test_ranks_answer_as_one_process(tmp_path: Path) -> None:
    for name in NAMES:
        tiny.build(name).save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in NAMES]
    worker, path = parallel_worker.__file__, os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for before in ([], launch):
        command = [sys.executable, *before, str(worker), str(tmp_path), *folders]
        ran = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
    alone, *ranks = (json.loads((tmp_path / f"{who}.json").read_text()) for who in ("alone", 0, 1))
    for name in NAMES:
        for own in ranks:
            for (kept, answer, logits), wanted in zip(own[name], alone[name], strict=True):
                assert kept == wanted[0] and answer == wanted[1]
                torch.testing.assert_close(torch.tensor(logits), torch.tensor(wanted[2]), atol=1e-4, rtol=0)


def test_a_tower_that_is_split_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def split(module: nn.Module) -> Any:
        return object()

    monkeypatch.setattr(tower, "split_over", split)
    model = tiny.llava()
    with pytest.raises(
        tokenprune.UnsupportedModelError, match="vision tower is split over several processes"
    ):
        tokenprune.wrap(model, "vflowopt", keep=0.5)
    with tokenprune.pruned(model, "uniform", keep=0.5):
        pass
