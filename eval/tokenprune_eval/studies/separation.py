"""How well each score tells objects from ground, by layer: why a method wins or loses on a testbed.

    python -m tokenprune_eval.studies.separation --model smol --csv eval/results/separation_smol.csv

Per layer K and score: the AUC (the chance that a patch of an object scores higher than one of the ground; 1 keeps
objects, 0 keeps the ground, 0.5 knows nothing), the median norms of both, and the share of the ground's energy that
lies in its mean vector: where that is near 1 the ground is one vector, every score has two values, and which of
them is larger is luck. K = 0 is the projector's output, where only the norm can be a score.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenprune import tables
from tokenprune.machine import describe
from tokenprune.methods import EntropyPrune
from tokenprune_eval.studies.recorded import NORMALIZATIONS, SOURCES, images_at
from tokenprune_testbed import load
from tokenprune_testbed.dense import BACKGROUND, patch_objects
from tokenprune_testbed.language import make_inputs
from tokenprune_testbed.questions import Sample, ask
from tokenprune_testbed.scenes import DEFAULT_SCENES, SCENE_KINDS, Scene, make_scene

LAYERS = (1, 2, 3, 4, 6, 8, 10, 12, 15)
COLUMNS = (
    "model",
    "scenes",
    "layer",
    "state",
    "norm object",
    "norm ground",
    "auc norm",
    *(f"auc {name}" for name in NORMALIZATIONS),
    "ground energy in its mean",
    "objects",
    "grounds",
    "images",
    "cpu",
    "torch",
)


def auc(scores: Tensor, is_object: Tensor) -> float:
    """The chance that an object's score (n,) exceeds a ground's, ties counting half (Mann-Whitney U / n1 n0)."""
    from scipy.stats import mannwhitneyu

    result = mannwhitneyu(scores[is_object].numpy(), scores[~is_object].numpy())
    return float(result.statistic) / (int(is_object.sum()) * int((~is_object).sum()))


def energy_in_mean(states: Tensor) -> float:
    """Share of the energy of n vectors (n, d) that lies in their mean: |mean|^2 over the mean of |x|^2."""
    x = states.double()
    return float(x.mean(0).square().sum() / x.square().sum(1).mean())


def draw(count: int, kind: Any, seed: int = 0) -> tuple[list[Scene], list[Sample]]:
    """Held-out scenes with two to seven objects, and a question about each."""
    rng = np.random.default_rng([seed, 77])
    scenes = [make_scene(rng, "test", scenes=kind) for _ in range(count)]
    return scenes, [Sample([s.image], *ask(s, rng, "counting")[0]) for s in scenes]


def measure(model: Any, inputs: Any, labels: Tensor, layer: int) -> list[dict[str, str]]:
    """Rows of one layer, one per state.

    Args:
        inputs: a batch of prompts with one image each.
        labels: (images, tokens): 1 object, 0 ground, -1 neither.
    """
    sure, flags = (labels >= 0).flatten(), (labels == 1).flatten()
    is_object = flags[sure]

    def row(state: str, vectors: Tensor, scores: dict[str, Tensor]) -> dict[str, str]:
        norms = vectors.norm(dim=-1)
        found = {"auc norm": auc(norms, is_object)} | {
            f"auc {n}": auc(s[sure], is_object) for n, s in scores.items()
        }
        values = {
            "norm object": norms[is_object].median().item(),
            "norm ground": norms[~is_object].median().item(),
            **found,
            "ground energy in its mean": energy_in_mean(vectors[~is_object]),
        }
        counts = {"objects": str(int(is_object.sum())), "grounds": str(int((~is_object).sum()))}
        return {"layer": str(layer), "state": state, **{k: f"{v:.4g}" for k, v in values.items()}, **counts}

    if layer == 0:
        with torch.inference_mode():
            output = model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        return [row("projector", torch.cat(list(output)).float().cpu()[sure], {})]
    images = images_at(model, [inputs], SOURCES, layer)

    def score(source: str, normalization: str) -> Tensor:
        method = EntropyPrune(source=source, normalization=normalization)
        return torch.cat([method.score(image) for image in images]).float().cpu()

    return [
        row(
            source,
            torch.cat([getattr(image, source).float().flatten(1) for image in images]).cpu()[sure],
            {normalization: score(source, normalization) for normalization in NORMALIZATIONS},
        )
        for source in SOURCES
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="small", help="small (default), smol, a folder, or an adapter's file"
    )
    parser.add_argument("--scenes", choices=SCENE_KINDS, default=DEFAULT_SCENES)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, *LAYERS])
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--label", default=None, help="what the CSV calls the model (default: as --model)")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    model, processor = load(options.model)
    scenes, samples = draw(options.images, options.scenes)
    owners = np.stack([patch_objects(scene) for scene in scenes])
    labels = torch.from_numpy(np.where(owners >= 0, 1, np.where(owners == BACKGROUND, 0, -1)))
    inputs = make_inputs(processor, samples).to(model.device)
    machine = describe()
    about = {"model": options.label or options.model, "scenes": options.scenes, "images": str(options.images)}
    about |= {"cpu": machine["cpu"], "torch": machine["torch"]}
    rows = []
    for layer in options.layers:
        for row in measure(model, inputs, labels, layer):
            rows.append(dict.fromkeys(COLUMNS, "") | row | about)
            print("  ".join(f"{c} {rows[-1][c]}" for c in COLUMNS[2:-5] if rows[-1][c]), flush=True)
    if options.csv is not None:
        tables.write(options.csv, rows)


if __name__ == "__main__":
    main()
