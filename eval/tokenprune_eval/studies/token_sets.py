"""Times the diversity of token sets, as the ECL takes it: ``python -m tokenprune_eval.studies.token_sets``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from tokenprune import tables
from tokenprune.estimators import estimate, make_estimator
from tokenprune_kernels.machine import describe_device
from tokenprune_kernels.timing import Timed, interleave, milliseconds


def main(argv: Sequence[str] | None = None) -> None:
    """Print milliseconds per set and, with ``--csv``, write them."""
    parser = argparse.ArgumentParser(description="Time estimators on sets of N tokens of a width, bf16.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", nargs="+", type=int, default=[576, 2880, 8192])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--estimators", nargs="+", default=["von_neumann", "renyi"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    rows = []
    for n in options.tokens:
        tokens = torch.randn(n, options.width, device=options.device, dtype=torch.bfloat16)
        for name in options.estimators:
            estimator = make_estimator(name)
            arms = {name: Timed(lambda _, e=estimator, t=tokens: estimate(t, e))}  # type: ignore[misc]
            seconds = interleave(arms, options.repeats, warmup=1, device=options.device)
            row = {"tokens": str(n), "width": str(options.width), "estimator": name}
            row |= {"ms": f"{milliseconds(seconds[name]):.4g}", **describe_device(options.device)}
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            rows.append(row)
    if options.csv is not None:
        tables.write(options.csv, rows)


if __name__ == "__main__":
    main()
