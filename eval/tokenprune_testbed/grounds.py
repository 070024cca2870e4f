"""Grounds that say something: each ninth of a picture shows a real texture or photograph in one of four tints.

The ninths are those that "top left" to "bottom right" name. Every kind can be told in a few of the vision tower's
patches. Training and test crops come from the two halves of each source picture.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

Split = Literal["train", "test"]
UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

IMAGE_SIZE = 96
CELL_SIZE = IMAGE_SIZE // 3
ROW_WORDS = ("top", "middle", "bottom")
COLUMN_WORDS = ("left", "center", "right")
GROUND_ASSETS = Path(__file__).with_name("grounds.npz")

GROUNDS = ("brick", "grass", "gravel", "coins", "text", "stars", "tissue", "moon")
TINTS: dict[str, tuple[int, int, int]] = {
    "gray": (82, 82, 82),
    "brown": (104, 66, 34),
    "purple": (82, 50, 122),
    "olive": (76, 88, 28),
}
TINT_NAMES = tuple(TINTS)


def place_of(x: float, y: float) -> str:
    """Row word and column word of the third of the image a point in pixels lies in, e.g. "top left"."""
    return f"{ROW_WORDS[int(y * 3 / IMAGE_SIZE)]} {COLUMN_WORDS[int(x * 3 / IMAGE_SIZE)]}"


@dataclass(frozen=True)
class Ground:
    """``image`` (96, 96, 3) float before objects are painted; what each ninth shows, row by row from the top.

    Attributes:
        cells: nine words of ``GROUNDS``.
        tints: the tint of each kind that occurs; a kind has one tint in a picture.
    """

    image: FloatArray = field(repr=False)
    cells: tuple[str, ...]
    tints: dict[str, str]

    def places(self, kind: str) -> list[str]:
        """Where a kind is seen, e.g. ["top left", "middle center"]."""
        return [place for place, shown in zip(PLACES, self.cells, strict=True) if shown == kind]


PLACES = tuple(f"{row} {column}" for row in ROW_WORDS for column in COLUMN_WORDS)


@cache
def _textures() -> dict[Split, dict[str, FloatArray]]:
    """Grey textures (h, w) of mean 0 and deviation 1, clipped at 2."""
    with np.load(GROUND_ASSETS) as archive:
        arrays = {name: archive[name].astype(np.float32) for name in archive.files}

    def standard(x: FloatArray) -> FloatArray:
        return np.clip((x - x.mean()) / x.std(), -2, 2).astype(np.float32)

    splits: tuple[Split, ...] = ("train", "test")
    return {split: {kind: standard(arrays[f"{split}_{kind}"]) for kind in GROUNDS} for split in splits}


def _layout(rng: np.random.Generator) -> list[int]:
    """Which of up to five kinds each ninth has: islands in one kind, stripes, or anything."""
    kind = rng.random()
    if kind < 0.5:
        cells = np.zeros(9, dtype=int)
        islands = int(rng.integers(1, 5))
        cells[rng.permutation(9)[:islands]] = np.arange(1, islands + 1)
    elif kind < 0.75:
        stripes = np.arange(3)
        cells = np.repeat(stripes, 3) if rng.random() < 0.5 else np.tile(stripes, 3)
    else:
        cells = rng.integers(0, int(rng.integers(2, 5)), 9)
    return [int(c) for c in cells]


def _telling_crop(rng: np.random.Generator, texture: FloatArray) -> FloatArray:
    """A ninth's crop: of three drawn the one of most contrast, for an empty corner of a page could be anything."""
    corners = [[int(rng.integers(extent - CELL_SIZE + 1)) for extent in texture.shape] for _ in range(3)]
    crops = [texture[y : y + CELL_SIZE, x : x + CELL_SIZE] for y, x in corners]
    crop = max(crops, key=lambda c: float(c.std()))
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def make_ground(rng: np.random.Generator, split: Split) -> Ground:
    """Draw one ground; the same generator state gives the same."""
    kinds = [GROUNDS[i] for i in rng.permutation(len(GROUNDS))]
    cells = tuple(kinds[i] for i in _layout(rng))
    tints = {kind: TINT_NAMES[rng.integers(len(TINTS))] for kind in sorted(set(cells))}
    light = {kind: rng.uniform(0.85, 1.15) for kind in tints}
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    for index, kind in enumerate(cells):
        crop = _telling_crop(rng, _textures()[split][kind])
        top, left = (CELL_SIZE * i for i in divmod(index, 3))
        color = np.asarray(TINTS[tints[kind]], dtype=np.float32) * light[kind]
        image[top : top + CELL_SIZE, left : left + CELL_SIZE] = color * (1 + 0.3 * crop[..., None])
    return Ground(image, cells, tints)
