"""Run the commands that draw on tiny checkpoints with their real processors: `processor_worker.py FOLDER FAMILY...`.

A process of its own, because torchvision has to be importable here and must not be elsewhere. What each family said on
stderr, and what it failed with, stands in FOLDER/FAMILY/stderr.txt.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import checkpoints
import tokenprune
from tokenprune.analysis.calibration import make_prompt
from tokenprune.cli import app
from tokenprune.images import as_seen
from tokenprune.tiling import lay_out

SIZES = {"wide": (150, 80), "tall": (60, 140), "square": (64, 64)}
VIDEOS = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm")


def main(family: str, folder: Path) -> None:
    model = checkpoints.write(family, folder / "model")
    pictures = folder / "pictures"
    pictures.mkdir()
    for i, (name, (width, height)) in enumerate(SIZES.items()):
        pixels = np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{name}.png")
    wide, tall = pictures / "wide.png", pictures / "tall.png"
    few = ["--keep", "50%"]
    call(
        "run", model, wide, tall, "What is it?", *few, "--max-new-tokens", 2, "--picture", folder / "run.png"
    )
    call("drift", model, "--data", pictures, *few, "--samples", 3, "--pictures", folder / "drift")
    call(
        "compare",
        model,
        "--data",
        pictures,
        "--method",
        "merge,of=divprune",
        "--budget",
        "50%",
        *quick(folder),
    )
    loaded = AutoModelForImageTextToText.from_pretrained(model).eval()
    processor = AutoProcessor.from_pretrained(model)
    check_places(loaded, processor)
    if family in VIDEOS:
        check_video(loaded, processor)


def quick(folder: Path) -> list[Any]:
    return ["--time-batch", 0, "--max-new-tokens", 2, "--out", folder / "report"]


def call(*arguments: Any) -> None:
    try:
        app(args=[str(argument) for argument in arguments], prog_name="tokenprune")
    except SystemExit as done:
        if done.code:
            raise


def check_places(model: Any, processor: Any) -> None:
    """Where a picture is white, and only there, the tokens drawn there saw white pixels."""
    for width, height in SIZES.values():
        picture = Image.new("RGB", (width, height), "black")
        picture.paste("white", (width // 2, 0, width, height // 2))
        seen: list[torch.Tensor] = []
        inputs = make_prompt(processor, [picture], "What?")
        with tokenprune.pruned(model, Brightness(seen), keep=0.5, layer=0), torch.inference_mode():
            model(**inputs)
            (views,) = lay_out(tokenprune.report(model).images, [as_seen(processor.image_processor, picture)])
        bright = torch.cat(seen)
        assert sum(view.tokens.size for view in views) == len(bright)
        for view in views:
            shown = bright[torch.from_numpy(view.tokens)]
            rows, columns = shown.shape
            white = view.picture.convert("L").resize((columns, rows), Image.Resampling.BOX)
            expected = torch.from_numpy(np.asarray(white) / 255.0)
            sure = (expected < 0.05) | (expected > 0.95)  # not at its edge
            assert (shown - expected)[sure].abs().max() < 0.35, (shown, expected)


class Brightness(tokenprune.methods.ScoreMethod):
    """Notes how bright the pixels of each token are, and keeps the first tokens."""

    name = "brightness"

    def __init__(self, noted: list[torch.Tensor]) -> None:
        self.noted = noted

    def needs(self) -> Any:
        return tokenprune.methods.Needs(
            pixels=lambda patches: patches.double().mean((1, 2, 3))[:, None] / 255
        )

    def score(self, image: Any) -> torch.Tensor:
        self.noted.append(image.pixels.flatten().cpu())
        return -torch.arange(image.n, dtype=torch.float32)


def check_video(model: Any, processor: Any) -> None:
    frames = [Image.new("RGB", (48, 48), (40 * i, 0, 0)) for i in range(4)]
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(text=[text], videos=[np.stack([np.asarray(f) for f in frames])], return_tensors="pt")
    with tokenprune.pruned(model, "uniform", keep=0.5, layer=0), torch.inference_mode():
        model.generate(**inputs, max_new_tokens=2)
        drawn = tokenprune.report(model).draw([frames])
    assert drawn and all(picture.width > picture.height / 2 for picture in drawn)


if __name__ == "__main__":
    for family in sys.argv[2:]:
        folder = Path(sys.argv[1]) / family
        folder.mkdir()
        with (folder / "stderr.txt").open("w") as file, contextlib.redirect_stderr(file):
            try:
                main(family, folder)
                print("done", file=file)
            except Exception:
                traceback.print_exc()
