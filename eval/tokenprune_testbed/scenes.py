"""Synthetic scenes made of real parts: handwritten digits and shapes on grounds that say something, or do not.

A scene is a 96 x 96 RGB image with its ground truth. Objects are placed freely: they neither overlap nor
line up with the vision tower's 8-pixel patches. Digits and photographs come in two disjoint splits. There are
two kinds of scenes:

* "mosaic": the ground of every ninth is a real texture or photograph in a tint (`grounds.py`), which questions
  ask about, and objects differ in size;
* "plain": objects of one size on a photograph, a gradient or a texture that nobody asks about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from tokenprune_testbed.grounds import (
    IMAGE_SIZE,
    FloatArray,
    Ground,
    Split,
    UInt8Array,
    make_ground,
    place_of,
)

SceneKind = Literal["plain", "mosaic"]
SCENE_KINDS: tuple[SceneKind, ...] = ("plain", "mosaic")
DEFAULT_SCENES: SceneKind = "mosaic"  # what the shipped models were trained on

GLYPH_SIZE = 14
MOSAIC_SIZES = (12, 14, 17)  # some smaller than two patches, so that an even grid of tokens can miss them
ASSETS = Path(__file__).with_name("assets.npz")

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 45, 45),
    "green": (40, 190, 70),
    "blue": (60, 90, 235),
    "yellow": (235, 215, 50),
    "magenta": (215, 60, 205),
    "cyan": (60, 210, 220),
}
COLOR_NAMES = tuple(COLORS)
SHAPES = ("circle", "square", "triangle", "cross", "star")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KINDS = SHAPES + DIGITS

_MIN_GAP = 1  # clear pixels between the bounding boxes of two objects


@dataclass(frozen=True)
class SceneObject:
    """One glyph: its kind (a word of ``KINDS``), colour, top-left corner and side in pixels."""

    kind: str
    color: str
    x: int
    y: int
    size: int = GLYPH_SIZE

    @property
    def is_digit(self) -> bool:
        return self.kind in DIGITS

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) of the middle of the glyph's box, in pixels."""
        return self.x + self.size / 2, self.y + self.size / 2

    @property
    def place(self) -> str:
        """Row word and column word of the third of the image the centre lies in, e.g. "top left"."""
        return place_of(*self.center)

    @property
    def place_margin(self) -> float:
        """Distance in pixels from the centre to the nearest border between thirds; small means debatable."""
        third = IMAGE_SIZE / 3
        return min(abs(v - border) for v in self.center for border in (third, 2 * third))


@dataclass(frozen=True)
class Scene:
    """An image (96, 96, 3) uint8 and what is on it.

    ``row`` lists, left to right, the indices of the digits written on one line (empty: no line was written;
    scenes with a line hold no other digits). ``previous`` is the same image before its last object was
    added, for questions about what is new, else None. ``ground`` is what the objects stand on, where it says
    something ("mosaic").
    """

    image: UInt8Array
    objects: tuple[SceneObject, ...]
    row: tuple[int, ...] = ()
    previous: UInt8Array | None = field(default=None, repr=False)
    ground: Ground | None = None


@dataclass(frozen=True)
class _Assets:
    glyphs: dict[Split, dict[str, FloatArray]]  # kind -> (n, size, size) coverage in 0..1
    photos: dict[Split, tuple[UInt8Array, ...]]  # each (h, w, 3)


def _shape_masks(size: int) -> dict[str, FloatArray]:
    """Coverage masks (size, size) in 0..1 of the five shapes, drawn for 14 pixels and scaled."""
    yy, xx = np.mgrid[0:size, 0:size] * ((GLYPH_SIZE - 1) / (size - 1))
    middle = (GLYPH_SIZE - 1) / 2
    dy, dx = yy - middle, xx - middle
    angle, radius = np.arctan2(dy, dx) - np.pi / 2, np.hypot(dy, dx)
    spike = np.abs((angle * 5 / (2 * np.pi)) % 1 - 0.5) * 2  # 1 along each of five arms, 0 between them
    masks = {
        "circle": radius <= 6.3,
        "square": (np.abs(dy) <= 5.4) & (np.abs(dx) <= 5.4),
        "triangle": (yy >= 1) & (yy <= 12) & (np.abs(dx) <= (yy - 1) * 0.56),
        "cross": (np.abs(dy) <= 1.8) | (np.abs(dx) <= 1.8),
        "star": radius <= 6.8 * (0.42 + 0.58 * spike),
    }
    return {kind: mask.astype(np.float32) for kind, mask in masks.items()}


@cache
def load_assets(size: int = GLYPH_SIZE) -> _Assets:
    """Read ``assets.npz`` once per size: glyph masks of that size, and photographs, of both splits."""
    with np.load(ASSETS) as archive:
        digits, labels, is_test = archive["digits"], archive["digit_labels"], archive["digit_is_test"]
        photos: dict[Split, tuple[UInt8Array, ...]] = {
            "train": tuple(archive[k] for k in sorted(archive.files) if k.startswith("photo_train_")),
            "test": tuple(archive[k] for k in sorted(archive.files) if k.startswith("photo_test_")),
        }
    masks = np.stack(
        [
            np.asarray(
                Image.fromarray(d.astype(np.float32) / 16).resize((size, size), Image.Resampling.BILINEAR)
            )
            for d in digits
        ]
    )
    masks = np.clip(masks * 1.35, 0, 1)  # smoothing thins the strokes; give them their weight back
    shapes = {kind: mask[None] for kind, mask in _shape_masks(size).items()}
    glyphs: dict[Split, dict[str, FloatArray]] = {"train": dict(shapes), "test": dict(shapes)}
    for value, word in enumerate(DIGITS):
        glyphs["train"][word] = masks[(labels == value) & ~is_test]
        glyphs["test"][word] = masks[(labels == value) & is_test]
    return _Assets(glyphs, photos)


def _background(rng: np.random.Generator, split: Split) -> FloatArray:
    """(96, 96, 3) float background, dark enough for the bright glyphs: photograph, gradient or texture."""
    size = IMAGE_SIZE
    choice = rng.random()
    if choice < 0.6:
        photos = load_assets().photos[split]
        photo = photos[rng.integers(len(photos))]
        y, x = (int(rng.integers(extent - size + 1)) for extent in photo.shape[:2])
        crop = photo[y : y + size, x : x + size]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        return crop.astype(np.float32) * 0.45 + 10
    low, high = rng.uniform(15, 110, (2, 3))
    if choice < 0.8:
        angle = rng.uniform(0, 2 * np.pi)
        yy, xx = np.mgrid[0:size, 0:size] / size
        ramp = np.cos(angle) * xx + np.sin(angle) * yy
        ramp = (ramp - ramp.min()) / (np.ptp(ramp) + 1e-6)
        noise = rng.normal(0, rng.uniform(0, 10), (size, size, 1))
        return np.asarray(low + (high - low) * ramp[..., None] + noise, dtype=np.float32)
    coarse = rng.random((int(rng.integers(4, 33)),) * 2).astype(np.float32)
    texture = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR))
    return np.asarray(low + (high - low) * texture[..., None], dtype=np.float32)


def _paint(image: FloatArray, obj: SceneObject, rng: np.random.Generator, split: Split) -> None:
    """Blend one glyph, drawn at random from its split's pool, into ``image`` (96, 96, 3) in place."""
    pool = load_assets(obj.size).glyphs[split][obj.kind]
    mask = pool[rng.integers(len(pool))][..., None]
    window = image[obj.y : obj.y + obj.size, obj.x : obj.x + obj.size]
    window += (np.asarray(COLORS[obj.color], dtype=np.float32) - window) * mask


def _to_uint8(image: FloatArray) -> UInt8Array:
    return np.clip(image, 0, 255).astype(np.uint8)


def _is_free(x: int, y: int, size: int, taken: Sequence[SceneObject]) -> bool:
    def apart(a: int, b: int, size_of_b: int) -> bool:
        return a + size + _MIN_GAP <= b or b + size_of_b + _MIN_GAP <= a

    return all(apart(x, other.x, other.size) or apart(y, other.y, other.size) for other in taken)


def _free_spot(rng: np.random.Generator, size: int, taken: Sequence[SceneObject]) -> tuple[int, int] | None:
    """A random free (x, y), or None when 50 throws found none."""
    for _ in range(50):
        x, y = (int(v) for v in rng.integers(0, IMAGE_SIZE - size + 1, 2))
        if _is_free(x, y, size, taken):
            return x, y
    return None


def _written_row(rng: np.random.Generator, length: int) -> list[SceneObject]:
    """``length`` different digits of one colour on one line, evenly spaced, with a pixel of vertical jitter."""
    pitch = int(rng.integers(GLYPH_SIZE + 1, GLYPH_SIZE + 6))
    x0 = int(rng.integers(0, IMAGE_SIZE - GLYPH_SIZE - pitch * (length - 1) + 1))
    y0 = int(rng.integers(1, IMAGE_SIZE - GLYPH_SIZE))
    color = COLOR_NAMES[rng.integers(len(COLORS))]
    kinds = rng.permutation(len(DIGITS))[:length]
    return [
        SceneObject(DIGITS[kind], color, x0 + i * pitch, y0 + int(rng.integers(-1, 2)))
        for i, kind in enumerate(kinds)
    ]


def make_scene(
    rng: np.random.Generator,
    split: Split = "train",
    *,
    num_objects: int | None = None,
    row_length: int = 0,
    add_digit: bool = False,
    digit_share: float = 0.55,
    scenes: SceneKind = "plain",
) -> Scene:
    """Draw one scene; the same generator state gives the same scene.

    Args:
        num_objects: how many objects in all (default: 2 to 7 at random). Crowded scenes may come out smaller.
        row_length: when > 0, write that many digits in a row; all other objects are then shapes.
        add_digit: make the last object a digit of a kind that occurs nowhere else in the scene, and keep the
            image without it in ``Scene.previous``.
        digit_share: how many of the objects outside a row are digits, on average.
        scenes: the kind of ground, see the module's docstring.
    """
    if row_length and add_digit:
        raise ValueError("a scene has a written row or a new digit, not both")
    total = int(rng.integers(2, 8)) if num_objects is None else num_objects
    ground = make_ground(rng, split) if scenes == "mosaic" else None
    canvas = _background(rng, split) if ground is None else ground.image.copy()
    objects: list[SceneObject] = _written_row(rng, row_length) if row_length else []
    for index in range(len(objects), max(total, len(objects))):
        size = GLYPH_SIZE if ground is None else int(rng.choice(MOSAIC_SIZES))
        spot = _free_spot(rng, size, objects)
        if spot is None:
            break
        is_new = add_digit and index == total - 1
        if is_new:
            unused = [d for d in DIGITS if all(d != o.kind for o in objects)]
            kind = unused[rng.integers(len(unused))]
        elif not row_length and rng.random() < digit_share:
            kind = DIGITS[rng.integers(len(DIGITS))]
        else:
            kind = SHAPES[rng.integers(len(SHAPES))]
        objects.append(SceneObject(kind, COLOR_NAMES[rng.integers(len(COLORS))], *spot, size))
    for obj in objects[: -1 if add_digit else None]:
        _paint(canvas, obj, rng, split)
    previous = None
    if add_digit:
        if len(objects) < total:  # no room for the new digit: start over with what the generator gives next
            return make_scene(
                rng, split, num_objects=num_objects, add_digit=True, digit_share=digit_share, scenes=scenes
            )
        previous = _to_uint8(canvas)
        _paint(canvas, objects[-1], rng, split)
    return Scene(_to_uint8(canvas), tuple(objects), tuple(range(row_length)), previous, ground)
