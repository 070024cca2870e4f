"""What EntropyPrune's score sees on real inputs: the spread of the eigenvalues, and how far H is just a norm.

    python -m tokenprune_eval.studies.spectrum --layers 1 2 4 --csv eval/results/testbed_spectrum.csv

Without trace normalisation H falls with a token's scale once eigenvalues exceed 1/e and rises with it below, so
which tokens "largest H" keeps depends on the scale of a layer's states. Read these numbers beside every comparison.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenprune.machine import describe
from tokenprune.tokens import State
from tokenprune_eval.studies.recorded import SOURCES, images_at
from tokenprune_kernels.dual_gram_entropy.reference import matrix_entropy, spectrum

QUANTILES = (0.05, 0.5, 0.95, 1.0)
COLUMNS = (
    "source",
    "layer",
    "tokens",
    *(f"lambda_max_q{round(100 * q)}" for q in QUANTILES),
    "share_above_1_over_e",
    "spearman_none_norm",
    "spearman_trace_norm",
    "spearman_none_trace",
    "images",
    "cpu",
    "torch",
)


def record(model: Any, calls: list[dict[str, Any]], source: State, layer: int) -> list[Tensor]:
    """The states (n, heads, head_dim) of every image in `calls` that a cut at `layer` would score."""
    images = images_at(model, calls, (source,), layer)
    if source == "hidden":
        return [
            image.hidden.unflatten(1, (image.num_heads, -1)) for image in images if image.hidden is not None
        ]
    return [getattr(image, source) for image in images]


def describe_spectrum(images: list[Tensor]) -> dict[str, float]:
    """Largest eigenvalue per token, the share of eigenvalues above 1/e, and rank correlations averaged over images.

    Args:
        images: (n, heads, head_dim) states of each image.
    """
    values = torch.cat([spectrum(x) for x in images])
    largest = values.amax(-1)
    correlations: dict[str, list[float]] = {"none_norm": [], "trace_norm": [], "none_trace": []}
    for x in images:
        none, trace = matrix_entropy(x), matrix_entropy(x, normalization="trace")
        norm = x.double().flatten(1).norm(dim=1)
        correlations["none_norm"].append(spearman(none, norm))
        correlations["trace_norm"].append(spearman(trace, norm))
        correlations["none_trace"].append(spearman(none, trace))
    return {
        **{f"lambda_max_q{round(100 * q)}": float(largest.quantile(q)) for q in QUANTILES},
        "share_above_1_over_e": float((values > torch.e**-1).double().mean()),
        **{f"spearman_{name}": sum(c) / len(c) for name, c in correlations.items()},
    }


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors without ties."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--model", default="small", help="small (default), smol, or a folder")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()

    from tokenprune_testbed import evaluation_set, load
    from tokenprune_testbed.language import make_inputs

    model, processor = load(options.model)
    samples = [s for s in evaluation_set(10 * options.images) if len(s.images) == 1][: options.images]
    calls = [make_inputs(processor, [sample]) for sample in samples]
    machine = describe()
    rows = []
    for layer in options.layers:
        for source in SOURCES:
            images = record(model, calls, source, layer)
            found = describe_spectrum(images)
            tokens = sum(len(x) for x in images)
            row = {"source": source, "layer": layer, "tokens": tokens, "images": len(images)}
            row |= {"cpu": machine["cpu"], "torch": machine["torch"]}
            rows.append(row | {name: f"{value:.4g}" for name, value in found.items()})
            print("  ".join(f"{c} {rows[-1][c]}" for c in COLUMNS[:-3]), flush=True)
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
