"""Times the kernels, one operation at a time: ``python -m tokenprune_kernels.bench --op dual_gram_entropy``.

Every operation's folder has a ``bench.py`` with what its rows are. On CUDA times are between events, medians, the L2
cache flushed before each; on a CPU runs alternate (A B A B ...), so that a change in the machine's load falls on all,
and times are processor time of the one thread used.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from tokenprune_kernels.dual_gram_entropy import bench as dual_gram_entropy
from tokenprune_kernels.kv_compact import bench as kv_compact

OPS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, str]]]] = {
    "dual_gram_entropy": dual_gram_entropy.rows,
    "kv_compact": kv_compact.rows,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and, with ``--csv``, write it."""
    parser = argparse.ArgumentParser(description="Time a kernel on bf16; one thread on a CPU.")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--op", choices=OPS, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--csv", type=Path, help="also write the table here")
    parser.add_argument("--repeats", type=int, default=15, help="on a CPU, of each side (default: 15)")
    parser.add_argument("--shapes", nargs="+", metavar="NxHxD", help="entropy: tokens, heads, columns")
    parser.add_argument("--growth", action="store_true", help="entropy: 512 to 32,768 tokens, no reference")
    parser.add_argument("--kept", nargs="+", type=float, default=[0.25, 0.1], help="compaction: shares kept")
    options = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = []
    try:
        for row in OPS[options.op](options):
            print(", ".join(f"{name} {value}" for name, value in row.items() if value), flush=True)
            found.append(row)
    finally:
        torch.set_num_threads(threads)
    if options.csv is not None:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    main()
