"""What one process, or each of several, answers: ``parallel_worker.py FOLDER OUT``, alone or under torchrun."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText

import judge
import tiny
import tokenprune

METHODS: tuple[dict[str, Any], ...] = (
    {"method": "uniform", "layer": 2, "keep": 0.6},
    {"method": "vflowopt", "keep": 0.5},
    {"method": "fastv", "layer": 2, "keep": 0.6},
    {"method": "entropyprune", "layer": 2, "keep": 0.6},
    {"method": "entropyprune", "layer": 3, "source": "key", "keep": 0.7},
)


def answers(folder: str) -> list[Any]:
    split = {"tp_plan": "auto"} if "RANK" in os.environ else {}
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **split).eval()
    inputs, found = tiny.inputs(model, judge.ROWS), []
    for arguments in METHODS:
        with tokenprune.pruned(model, **arguments), torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            report = tokenprune.report(model)
            logits = model(**inputs).logits[:, -1]
        found.append([report.keep_lists, out.tolist(), logits.tolist()])
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    made = {Path(folder).name: answers(folder) for folder in sys.argv[2:]}
    rank = dist.get_rank() if dist.is_initialized() else "alone"
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(made))
