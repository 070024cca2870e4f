"""The Entropy Collapse Layer of the testbed: of the trained model, of an untrained one, and on images of noise.

    python -m tokenprune_eval.studies.ecl --csv eval/results/testbed_ecl.csv --figure eval/results/testbed_ecl.png

The claim (EntropyPrune, arXiv 2602.17196) is that visual tokens' diversity drops sharply at one layer because of what
the model has learned. So an untrained model and meaningless images are measured beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tokenprune import machine, tables
from tokenprune.analysis.calibration import CalibrationSample, calibration_calls, load_calibration
from tokenprune.analysis.collapse import find_collapse
from tokenprune.analysis.layers import read_layers
from tokenprune.analysis.plots import plot_collapse
from tokenprune.estimators import ESTIMATORS
from tokenprune.profiles.collapse import Collapse
from tokenprune_testbed import load

CASES = ("trained", "untrained", "trained, images of noise")
COLUMNS = (
    *("case", "estimator", "layer", "mean", "low", "high", "drop", "drop_low", "drop_high", "text"),
    *("largest_drop", "clear", "images", "cpu", "torch", "transformers", "date"),
)


def noise_images(samples: Sequence[CalibrationSample], seed: int) -> list[CalibrationSample]:
    """The same prompts about pixels drawn uniformly at random."""
    rng = np.random.default_rng(seed)
    return [
        CalibrationSample(
            tuple(
                Image.fromarray(rng.integers(0, 256, (image.height, image.width, 3), dtype=np.uint8))
                for image in sample.images
            ),
            sample.prompt,
        )
        for sample in samples
    ]


def measure(
    case: str, images: int, seed: int, name: str = "small"
) -> tuple[dict[str, Collapse], dict[str, list[float]]]:
    """By estimator: what was found, and the text tokens' mean curve."""
    model, processor = load(name)
    if case == "untrained":
        torch.manual_seed(seed)
        model = type(model)(model.config).eval()
    samples = load_calibration("testbed", images, seed=seed)
    if "noise" in case:
        samples = noise_images(samples, seed)
    statistics = read_layers(model, calibration_calls(processor, samples), list(ESTIMATORS), attention=False)
    found = {name: find_collapse(values, name, seed=seed) for name, values in statistics.visual.items()}
    return found, {name: np.nanmean(values, 0).tolist() for name, values in statistics.text.items()}


def rows(case: str, found: dict[str, Collapse], text: dict[str, list[float]]) -> list[dict[str, Any]]:
    facts = {k: v for k, v in machine.describe().items() if k in COLUMNS}
    return [
        {
            "case": case,
            "estimator": name,
            "layer": layer,
            **{
                column: f"{getattr(collapse, column)[layer]:.6f}"
                for column in ("mean", "low", "high", "drop", "drop_low", "drop_high")
            },
            "text": f"{text[name][layer]:.6f}",
            "largest_drop": collapse.steepest,
            "clear": collapse.clear,
            "images": collapse.images,
            **facts,
        }
        for name, collapse in found.items()
        for layer in range(len(collapse.mean))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="small", help="small (default), smol, or a folder")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    table: list[dict[str, Any]] = []
    drawn: dict[str, Collapse] = {}
    texts: dict[str, list[float]] = {}
    for case in CASES:
        found, text = measure(case, options.images, options.seed, options.model)
        table += rows(case, found, text)
        for estimator in ("von_neumann", "diffusion"):
            drawn[f"{case}: {estimator}"] = found[estimator]
            texts[f"{case}: {estimator}"] = text[estimator]
        for collapse in found.values():
            print(f"{case}: {collapse.verdict()}", flush=True)
    if options.csv:
        tables.write(options.csv, table)
    if options.figure:
        plot_collapse(drawn, options.figure, text=texts)


if __name__ == "__main__":
    main()
