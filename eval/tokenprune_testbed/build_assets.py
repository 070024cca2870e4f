"""Developers only: rebuild the .npz files from scikit-learn, scikit-image and matplotlib.

python -m tokenprune_testbed.build_assets
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from tokenprune_testbed.grounds import GROUND_ASSETS, UInt8Array
from tokenprune_testbed.pages import CHARACTERS, FONTS, LETTERS, SIZES
from tokenprune_testbed.scenes import ASSETS

SHORT_SIDE = 160
TRAIN_PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
TEST_PHOTOS = ("hubble_deep_field", "immunohistochemistry", "flower")
NUM_TEST_DIGITS = 397
# Ground: picture of scikit-image, and the scale at which 8-pixel patches show what it is.
GROUND_SOURCES = {
    "brick": ("brick", 0.3),
    "grass": ("grass", 0.3),
    "gravel": ("gravel", 0.6),
    "coins": ("coins", 0.4),
    "text": ("page", 0.6),
    "stars": ("hubble_deep_field", 0.4),
    "tissue": ("immunohistochemistry", 0.5),
    "moon": ("moon", 0.5),
}
GROUND_SIDE = 160  # at most


def _shrink(photo: UInt8Array) -> UInt8Array:
    """Resize (h, w, 3) to a short side of ``SHORT_SIDE`` and a long side of at most 4/3 of it."""
    image = Image.fromarray(photo[..., :3])
    scale = SHORT_SIDE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    limit = SHORT_SIDE * 4 // 3
    return np.asarray(image.crop((0, 0, min(image.width, limit), min(image.height, limit))))


def build() -> dict[str, npt.NDArray[Any]]:
    """Collect digits with their labels and split, and the photographs of both splits."""
    from skimage import data
    from sklearn.datasets import load_digits, load_sample_image

    bunch = load_digits()
    is_test = np.zeros(len(bunch.target), dtype=bool)
    is_test[np.random.default_rng(0).permutation(len(is_test))[:NUM_TEST_DIGITS]] = True
    arrays = {
        "digits": bunch.images.astype(np.uint8),
        "digit_labels": bunch.target.astype(np.uint8),
        "digit_is_test": is_test,
    }
    for split, names in (("train", TRAIN_PHOTOS), ("test", TEST_PHOTOS)):
        for name in names:
            photo = load_sample_image("flower.jpg") if name == "flower" else getattr(data, name)()
            arrays[f"photo_{split}_{name}"] = _shrink(np.asarray(photo))
    return arrays


def build_grounds() -> dict[str, npt.NDArray[Any]]:
    """Grey textures: the left half of each picture for training, the right half for testing."""
    from skimage import data

    arrays = {}
    for kind, (name, scale) in GROUND_SOURCES.items():
        grey = Image.fromarray(np.asarray(getattr(data, name)())).convert("L")
        if kind == "text":  # where both halves are written on
            grey = grey.crop((0, 45, grey.width, 150))
        size = round(grey.width * scale), round(grey.height * scale)
        pixels = np.asarray(grey.resize(size, Image.Resampling.LANCZOS))
        middle = size[0] // 2
        arrays[f"train_{kind}"] = pixels[:GROUND_SIDE, max(0, middle - GROUND_SIDE) : middle]
        arrays[f"test_{kind}"] = pixels[:GROUND_SIDE, middle : middle + GROUND_SIDE]
    return arrays


def build_letters() -> dict[str, npt.NDArray[Any]]:
    """Of each font and size a strip of all characters, each as wide as its advance, and where each ends."""
    from pathlib import Path

    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    arrays = {}
    for font in (*FONTS["train"], *FONTS["test"]):
        for size in SIZES:
            own = ImageFont.truetype(str(folder / f"{font}.ttf"), size)
            top = min(own.getbbox(c, anchor="ls")[1] for c in CHARACTERS)
            bottom = max(own.getbbox(c, anchor="ls")[3] for c in CHARACTERS)
            strips = []
            for c in CHARACTERS:
                left, _, right, _ = own.getbbox(c, anchor="ls")
                width = max(round(own.getlength(c)), int(right - min(left, 0)))
                glyph = Image.new("L", (width, int(bottom - top)))
                ImageDraw.Draw(glyph).text((-min(left, 0), -top), c, fill=255, font=own, anchor="ls")
                strips.append(np.asarray(glyph))
            arrays[f"{font}_{size}"] = np.concatenate(strips, axis=1)
            arrays[f"{font}_{size}_ends"] = np.cumsum([s.shape[1] for s in strips]).astype(np.int32)
    return arrays


if __name__ == "__main__":
    for path, arrays in ((ASSETS, build()), (GROUND_ASSETS, build_grounds()), (LETTERS, build_letters())):
        np.savez_compressed(path, allow_pickle=False, **arrays)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
