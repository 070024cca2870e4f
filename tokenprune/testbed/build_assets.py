"""Developers only: rebuild ``assets.npz`` (needs scikit-learn and scikit-image; the package does not).

python -m tokenprune.testbed.build_assets
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tokenprune.testbed.scenes import ASSETS, UInt8Array

SHORT_SIDE = 160
TRAIN_PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
TEST_PHOTOS = ("hubble_deep_field", "immunohistochemistry", "flower")
NUM_TEST_DIGITS = 397


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


if __name__ == "__main__":
    np.savez_compressed(ASSETS, allow_pickle=False, **build())
    print(f"{ASSETS}: {ASSETS.stat().st_size / 1e6:.2f} MB")
