"""The guard for text, fitted on rendered pages against photographs, and judged.

``python -m tokenprune_eval.studies.guard``

Pages are made here: six fonts, sizes from 7 to 30 pixels, prose, tables, receipts and screenshots, black on white,
light on dark and on tinted paper. Photographs are those that scikit-image and scikit-learn bring, in crops. Then
the testbed's own pages and scenes, in its patches of 8 pixels. Fonts and photographs of the held-out half appear
nowhere in the other. It prints the constants of `tokenprune/printed.py` (--fit) and writes error rates of both kinds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tokenprune import tables
from tokenprune.printed import is_print, look, summary
from tokenprune_testbed.grounds import Split
from tokenprune_testbed.pages import make_page
from tokenprune_testbed.scenes import make_scene

PATCH, TESTBED_PATCH = 14, 8
KINDS = ("prose", "table", "receipt", "screenshot")
PAGE, SCENE = "testbed page", "testbed scene"
PRINT = (*KINDS, PAGE)
WORDS = (
    "the of and to in is that for it as was with be by on not he this are or his from at which but have an had they "
    "you were their one all we can her has there been if more when will would who so no invoice total amount date "
    "report section figure results method model tokens value index 2026 1,024 37.5 % page table"
).split()


def fonts() -> list[str]:
    """Those that matplotlib brings."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral", "cmr10", "DejaVuSans-Bold")
    return [str(folder / f"{name}.ttf") for name in names]


def page(rng: np.random.Generator, font: str, kind: str) -> Image.Image:
    """A rendered page of a kind."""
    size = int(rng.integers(7, 31))
    width, height = (int(n) for n in rng.integers(280, 900, 2))
    paper, ink = _colors(rng)
    sheet = Image.new("RGB", (width, height), paper)
    pen, own = ImageDraw.Draw(sheet), ImageFont.truetype(font, size)
    margin, y = int(rng.integers(4, 30)), int(rng.integers(4, 30))
    pitch = round(size * rng.uniform(1.15, 1.7))
    columns = int(rng.integers(2, 6))
    while y < height - size:
        if kind == "prose":
            line = " ".join(rng.choice(WORDS, max(2, width // (size * 3))))
            pen.text((margin, y), line, fill=ink, font=own)
        elif kind == "table":
            for c in range(columns):
                x = margin + c * (width - 2 * margin) // columns
                pen.text((x, y), f"{rng.uniform(0, 1000):.1f}", fill=ink, font=own)
            pen.line([(margin, y + pitch - 2), (width - margin, y + pitch - 2)], fill=ink)
        elif kind == "receipt":
            pen.text((margin, y), " ".join(rng.choice(WORDS, 2)), fill=ink, font=own)
            pen.text((width - margin - 4 * size, y), f"{rng.uniform(0, 99):.2f}", fill=ink, font=own)
        else:
            bar = tuple(int(v) for v in rng.integers(60, 230, 3))
            if rng.random() < 0.15:
                pen.rectangle([(0, y), (width, y + pitch)], fill=bar)
            pen.text((margin, y), " ".join(rng.choice(WORDS, int(rng.integers(2, 9)))), fill=ink, font=own)
        y += pitch
    return sheet


def _colors(rng: np.random.Generator) -> tuple[Any, Any]:
    dark, light = rng.integers(0, 60, 3), rng.integers(215, 256, 3)
    pair = (tuple(int(v) for v in light), tuple(int(v) for v in dark))
    return pair if rng.random() < 0.8 else pair[::-1]


def photographs() -> list[NDArray[np.uint8]]:
    """Those that come with the packages, in colour and grey, some of them of textures."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    found = [np.asarray(image) for image in load_sample_images().images]
    names = (
        "astronaut",
        "coffee",
        "chelsea",
        "rocket",
        "camera",
        "coins",
        "brick",
        "grass",
        "gravel",
        "moon",
        "hubble_deep_field",
        "immunohistochemistry",
        "cell",
        "clock",
        "colorwheel",
        "horse",
    )
    for name in names:
        try:
            image = np.asarray(getattr(data, name)())
        except Exception:  # not among those that are bundled
            continue
        if image.dtype == bool:
            continue
        found.append(image if image.ndim == 3 else np.repeat(image[..., None], 3, 2))
    return [image[..., :3].astype(np.uint8) for image in found]


def crop(rng: np.random.Generator, image: NDArray[np.uint8]) -> Image.Image:
    """Any part of a photograph, at any size."""
    height, width = image.shape[:2]
    h, w = int(rng.integers(height // 3, height + 1)), int(rng.integers(width // 3, width + 1))
    y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
    part = Image.fromarray(image[y : y + h, x : x + w])
    scale = rng.uniform(0.5, 1.6)
    return part.resize((max(28, round(w * scale)), max(28, round(h * scale))), Image.Resampling.BICUBIC)


def looked(picture: Image.Image, patch: int = PATCH) -> torch.Tensor:
    """What a tower's patches show of it: (patches, columns)."""
    height, width = (n // patch * patch for n in (picture.height, picture.width))
    x = torch.from_numpy(np.asarray(picture.convert("RGB"))[:height, :width].copy()).permute(2, 0, 1)
    patches = x.unfold(1, patch, patch).unfold(2, patch, patch).permute(1, 2, 0, 3, 4).flatten(0, 1)
    return look(patches)


def judged(kind: str, picture: Image.Image) -> torch.Tensor:
    """`looked`, in the patches in which pictures of this kind are read."""
    return looked(picture, TESTBED_PATCH if kind in (PAGE, SCENE) else PATCH)


def pictures(half: int, count: int, seed: int) -> list[tuple[str, Image.Image]]:
    """So many pages and photographs of one half of the fonts and photographs, with their kinds."""
    rng = np.random.default_rng(seed + half)
    own, photos = fonts()[half::2], photographs()[half::2]
    found = []
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        found.append((kind, page(rng, own[int(rng.integers(len(own)))], kind)))
        found.append(("photograph", crop(rng, photos[int(rng.integers(len(photos)))])))
        split: Split = "test" if half else "train"
        found.append((PAGE, Image.fromarray(make_page(rng, split).image)))
        found.append((SCENE, Image.fromarray(make_scene(rng, split, scenes="mosaic").image)))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Fit, or judge."""
    parser = argparse.ArgumentParser(description="The guard for text.")
    parser.add_argument("--fit", action="store_true", help="print the constants of tokenprune/printed.py")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--csv", type=Path, default=Path("eval/results/guard.csv"))
    options = parser.parse_args(argv)
    if options.fit:
        _fit(options.count)
        return
    rows = []
    held = pictures(1, options.count, 0)
    for kind in (*PRINT, "photograph", SCENE):
        own = [float(is_print(judged(kind, picture))) > 0.5 for name, picture in held if name == kind]
        wrong = len(own) - sum(own) if kind in PRINT else sum(own)
        rows.append({"kind": kind, "pictures": len(own), "wrong": wrong, "share": f"{wrong / len(own):.4f}"})
        print(rows[-1])
    tables.write(options.csv, rows)


def _fit(count: int) -> None:
    from sklearn.linear_model import LogisticRegression

    found = pictures(0, count, 0)
    x = torch.stack([summary(judged(kind, picture)) for kind, picture in found]).double().numpy()
    y = np.array([kind in PRINT for kind, _ in found])
    mean, scale = x.mean(0), x.std(0)
    model = LogisticRegression(C=0.5, max_iter=2000).fit((x - mean) / scale, y)
    for name, values in (("_MEAN", mean), ("_SCALE", scale), ("_WEIGHTS", model.coef_[0])):
        print(f"{name} = ({', '.join(f'{v:.4f}' for v in values)})")
    print(f"_BIAS = {model.intercept_[0]:.4f}")
    print("# on the fitted half:", model.score((x - mean) / scale, y))


if __name__ == "__main__":
    main()
