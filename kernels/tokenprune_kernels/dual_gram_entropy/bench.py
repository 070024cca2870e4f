"""Times the backends against the released form: ``python -m tokenprune_kernels.dual_gram_entropy.bench``.

The released form is ``reference.matrix_entropy``: float64 throughout, all tokens in one piece, always the dual Gram.
Runs alternate (A B A B ...), so that a change in the machine's load falls on both; each time is a median. Times are
CPU time of the one thread used, which other processes on the machine do not add to.
"""

import argparse
import csv
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..machine import cpu_name
from . import dual_gram_entropy
from .arguments import Normalization
from .reference import error_scale, matrix_entropy

#: (tokens, heads, head_dim): LLaVA-1.5-7B, LLaVA-1.6-7B, a tiny test model, a 1k-wide model, Qwen2.5-VL-7B, h > d.
SHAPES = ["576x32x128", "2880x32x128", "144x4x32", "576x16x64", "1024x28x128", "576x64x32"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; times are in milliseconds of CPU time."""

    shape: str
    dtype: str
    normalization: str
    reference_ms: float
    cpu_ms: float
    speedup: float
    error: float  # max |H - H64| / error_scale
    repeats: int
    cpu: str
    threads: int
    torch: str


def paired_medians(a: Callable[[], object], b: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Medians of a and of b, run alternately after one unmeasured run each, in milliseconds."""
    times: tuple[list[float], list[float]] = ([], [])
    a(), b()
    for _ in range(repeats):
        for run, taken in zip((a, b), times, strict=True):
            start = time.process_time()
            run()
            taken.append(1e3 * (time.process_time() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def measure(
    shape: str, normalization: Normalization, repeats: int, dtype: torch.dtype = torch.bfloat16
) -> Row:
    """Time one shape, ``"tokens x heads x head_dim"``, on gaussian query states in the layout attention has."""
    n, h, d = (int(size) for size in shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    # (batch, heads, tokens, d) transposed, as it comes out of a model
    x = torch.randn(1, h, n, d, generator=generator).to(dtype).transpose(1, 2)

    def reference() -> Tensor:
        return matrix_entropy(x, normalization=normalization)

    def fast() -> Tensor:
        return dual_gram_entropy(x, normalization=normalization)

    reference_ms, cpu_ms = paired_medians(reference, fast, repeats)
    error = ((fast().double() - reference()).abs() / error_scale(x, normalization=normalization)).max().item()
    return Row(
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
        normalization=normalization,
        reference_ms=round(reference_ms, 3),
        cpu_ms=round(cpu_ms, 3),
        speedup=round(reference_ms / max(cpu_ms, 1e-6), 2),
        error=float(f"{error:.1e}"),
        repeats=repeats,
        cpu=cpu_name(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and, with ``--csv``, write it."""
    parser = argparse.ArgumentParser(description="Time the matrix entropy, one thread.")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    parser.add_argument("--repeats", type=int, default=15, help="measured runs of each side (default: 15)")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxHxD", help="tokens, heads, columns")
    arguments = parser.parse_args(argv)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        print(f"{cpu_name()}, 1 thread, torch {torch.__version__}, {arguments.repeats} repeats")
        print(
            f"{'shape':>14} {'normalization':>14} {'reference ms':>13} {'cpu ms':>9} {'speedup':>8} {'error':>8}"
        )
        rows = []
        for shape in arguments.shapes:
            normalizations: tuple[Normalization, ...] = ("none", "trace")
            for normalization in normalizations:
                row = measure(shape, normalization, arguments.repeats)
                print(
                    f"{row.shape:>14} {row.normalization:>14} {row.reference_ms:>13.2f} {row.cpu_ms:>9.2f} "
                    f"{row.speedup:>7.2f}x {row.error:>8.1e}",
                    flush=True,
                )
                rows.append(row)
    finally:
        torch.set_num_threads(threads)
    if arguments.csv is not None:
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        with arguments.csv.open("w", newline="") as file:
            names = [field.name for field in dataclasses.fields(Row)]
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(dataclasses.asdict(row) for row in rows)


if __name__ == "__main__":
    main()
