"""How far noise moves each estimator of diversity.

``python -m tokenprune_eval.studies.noise --figure estimators_noise.png``

Clusters of tokens on the unit sphere with growing isotropic noise: the number of clusters, which is what a reader of
"diversity" has in mind, does not change. Shown is each estimator's value over its value without noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from tokenprune.estimators import DiffusionSpectralEntropy, Estimator, make_estimator, prepare

ESTIMATORS: dict[str, Estimator] = {
    "von_neumann": make_estimator("von_neumann"),
    "renyi, alpha = 2": make_estimator("renyi"),
    "effective_rank": make_estimator("effective_rank"),
    "nuclear_norm": make_estimator("nuclear_norm"),
    "diffusion, t = 1": DiffusionSpectralEntropy(t=1),
    "diffusion, t = 4": DiffusionSpectralEntropy(t=4),
    "diffusion, t = 8": DiffusionSpectralEntropy(t=8),
}
LEVELS = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06)


def clusters(noise: float, seed: int, count: int = 8, tokens: int = 144, width: int = 128) -> Tensor:
    """(tokens, width) unit tokens around `count` orthonormal centres; noise is per coordinate."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.linalg.qr(torch.randn(width, count, generator=generator, dtype=torch.float64)).Q.T
    x = centres[torch.arange(tokens) % count]
    return prepare(x + noise * torch.randn(tokens, width, generator=generator, dtype=torch.float64))


def measure(seeds: int = 5) -> dict[str, list[float]]:
    """By estimator: its value at each of LEVELS over that without noise, mean over seeds."""
    return {
        name: [
            sum(float(estimator(clusters(noise, s)) / estimator(clusters(0, s))) for s in range(seeds))
            / seeds
            for noise in LEVELS
        ]
        for name, estimator in ESTIMATORS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    values = measure()
    print("noise".ljust(18), *(f"{level:6.2f}" for level in LEVELS))
    for name, curve in values.items():
        print(name.ljust(18), *(f"{v:6.3f}" for v in curve))
    if options.figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for name, curve in values.items():
            axes.plot(
                LEVELS, curve, marker="o", markersize=3, linestyle="-" if "diff" in name else "--", label=name
            )
        axes.set(
            xlabel="noise per coordinate (128 of them)", ylabel="value / value without noise", yscale="log"
        )
        axes.set_title("8 clusters of tokens: what noise alone adds")
        axes.legend(fontsize=8)
        figure.savefig(options.figure, dpi=120)


if __name__ == "__main__":
    main()
