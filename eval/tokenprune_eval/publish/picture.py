"""The README's picture: what controls and a method keep of one scene, equally many tokens each.

``python -m tokenprune_eval.publish.picture``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import tokenprune
from tokenprune.draw import add_caption, draw_report, tile
from tokenprune_testbed import evaluation_set, load
from tokenprune_testbed.language import make_inputs

ARMS: dict[str, dict[str, Any]] = {
    "random": {"method": "random", "layer": 0},
    "uniform": {"method": "uniform", "layer": 0},
    "merge of divprune": {"method": "merge", "of": "divprune", "layer": 0},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description="Kept tokens, side by side.")
    parser.add_argument("--model", default="small")
    parser.add_argument("--keep", type=float, default=0.22)
    parser.add_argument("--question", type=int, default=32, help="number in the evaluation set of 100")
    parser.add_argument("--out", type=Path, default=Path("docs/kept.png"))
    options = parser.parse_args(argv)
    model, processor = load(options.model)
    sample = evaluation_set(100)[options.question]
    inputs = make_inputs(processor, [sample])
    images = [Image.fromarray(image) for image in sample.images]

    def answer() -> str:
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        return str(processor.batch_decode(new, skip_special_tokens=True)[0])

    whole = images[0].resize((384, 384), Image.Resampling.NEAREST)
    panels = [add_caption(whole, f"{sample.question}  unpruned: {answer()}")]
    for name, arguments in ARMS.items():
        with tokenprune.pruned(model, keep=options.keep, **arguments):
            said = answer()
            report = tokenprune.report(model)
        caption = f"{name}, {options.keep:.0%}: {said}"
        panels += draw_report(report, images[:1], captions=[caption])
    tile(panels, columns=4).save(options.out)


if __name__ == "__main__":
    main()
