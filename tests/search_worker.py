"""A process that searches on a shared study, which the first of them makes.

`python tests/search_worker.py STORAGE TRIALS SEED WORKER`
"""

from __future__ import annotations

import sys

import torch

import tiny
from tokenprune.tune.search import search

ROWS = [["text:4", "image", "text:5"]]
STUDY = "shared"


def main(storage: str, trials: int, seed: int, worker: int) -> None:
    torch.set_num_threads(1)
    model = tiny.llava(layers=6)
    calls = [tiny.inputs(model, ROWS, seed=n) for n in range(6)]
    search(
        model,
        calls,
        0.4,
        methods=["vflowopt"],
        trials=trials,
        seed=seed,
        worker=worker,
        storage=storage,
        study=STUDY,
        heartbeat=1,
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
