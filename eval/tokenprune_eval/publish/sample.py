"""The report that README and quickstart show, of a model of LLaVA-1.5-7B's size.

``python -m tokenprune_eval.publish.sample``

Weights are random and all layers share one layer's, so that it takes 2 GB and half a minute on a CPU: tokens, bytes
and FLOPs are those of the real one; times are not, and are left out.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import tokenprune
from tokenprune.bench.geometry import GEOMETRIES, build, prompts

LLAVA = GEOMETRIES["llava-1.5-7b"]
TEXT = 18  # "USER: <image>\nWhat is on the table? ASSISTANT:" in LLaVA's tokens, without the picture's


def build_shared() -> Any:
    """LLaVA-1.5-7B's decoder behind a small tower; its 32 layers have one layer's random weights."""
    model: Any = build(replace(LLAVA, layers=1))
    text = model.model.language_model
    text.config.num_hidden_layers = LLAVA.layers
    weights = {id(parameter): parameter for parameter in text.layers[0].parameters()}
    text.layers = nn.ModuleList(copy.deepcopy(text.layers[0], dict(weights)) for _ in range(LLAVA.layers))
    for number, layer in enumerate(text.layers):
        layer.self_attn.layer_idx = number
    return model


def main(argv: Sequence[str] | None = None) -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description="The report of a model of LLaVA-1.5-7B's size.")
    parser.add_argument("--method", default="vflowopt")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--compact-early", action="store_true", help="and the layers before the last cut")
    options = parser.parse_args(argv)
    model, inputs = build_shared(), prompts(replace(LLAVA, text=TEXT), 1)
    given = {"keep": options.keep, "compact_early": options.compact_early}
    with tokenprune.pruned(model, options.method, **given), torch.inference_mode():
        model(**inputs, use_cache=True, logits_to_keep=1)
        report = tokenprune.report(model)
    print("\n".join(line for line in str(report).splitlines() if "scoring" not in line))


if __name__ == "__main__":
    main()
