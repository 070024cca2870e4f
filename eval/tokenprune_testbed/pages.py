"""Pages of print, 96 x 96: lines of words and numbers, what stands in one of them, and what the whole page says.

Nearly every patch of a page says something that a question can ask for: it is where pruning hurts first. Letters are
of thirteen fonts (``ASSETS.md``) in four sizes, two fonts in evaluation only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from tokenprune_testbed.grounds import IMAGE_SIZE, FloatArray, Split, UInt8Array
from tokenprune_testbed.questions import QA, Sample, vocabulary
from tokenprune_testbed.scenes import DIGITS

LETTERS = Path(__file__).with_name("letters.npz")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
FONTS: dict[Split, tuple[str, ...]] = {
    "train": (
        *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSansMono"),
        *("DejaVuSansMono-Bold", "STIXGeneral", "STIXGeneralBol", "cmr10", "cmtt10", "cmb10"),
        *("DejaVuSans-BoldOblique", "DejaVuSerif-Italic", "STIXGeneralItalic", "STIXGeneralBolIta", "cmti10"),
    ),
    "test": ("DejaVuSerif-Bold", "cmss10"),
}
SIZES = (10, 11, 12, 13)  # pixels per em: a digit is 6 to 8 pixels wide, a patch 8
PRINTED = tuple(
    "total amount date page name price paid due tax item note from order bank room train gate seat city hotel".split()
)
PAGE_FAMILIES = ("line", "page")
PAGE_QUESTION = "what does the page say ?"
MAX_NEW_TOKENS = 144  # the longest page and its end
_MARGIN = 2


@dataclass(frozen=True)
class Page:
    """An image (96, 96, 3) uint8 and what is printed on it.

    Attributes:
        lines: from top to bottom, words and numbers.
        letters: of every character its place in `CHARACTERS`, its line, and the middle of its box, x and y (n, 4).
    """

    image: UInt8Array
    lines: tuple[tuple[str, ...], ...]
    letters: FloatArray


@cache
def load_letters(font: str, size: int) -> tuple[FloatArray, ...]:
    """Coverage masks (height, advance) in 0..1 of `CHARACTERS`."""
    with np.load(LETTERS) as archive:
        strip, ends = archive[f"{font}_{size}"], archive[f"{font}_{size}_ends"]
    return tuple(np.split(strip.astype(np.float32) / 255, ends[:-1], axis=1))


def page_vocabulary() -> list[str]:
    """Words of these questions and answers that no scene's question has."""
    known = set(vocabulary())
    return [word for word in sorted({*PRINTED, "written", "in", "line", "say"}) if word not in known]


def spoken(line: Sequence[str]) -> str:
    """A line as it is answered: numbers digit by digit."""
    return " ".join(DIGITS[int(c)] if c.isdigit() else c for word in line for c in _parts(word))


def _parts(word: str) -> Sequence[str]:
    return list(word) if word.isdigit() else [word]


def make_page(rng: np.random.Generator, split: Split = "train", *, numbers: float | None = None) -> Page:
    """Draw a page; the same generator state gives the same page.

    Args:
        numbers: share of numbers among what is printed (default: at random; every third page has numbers only).
    """
    font = FONTS[split][rng.integers(len(FONTS[split]))]
    size = int(rng.choice(SIZES))
    if numbers is None:
        numbers = 1.0 if rng.random() < 1 / 3 else float(rng.uniform(0.2, 0.8))
    glyphs = load_letters(font, size)
    height = glyphs[0].shape[0]
    pitch = height + int(rng.integers(0, 4))
    room = min(len(DIGITS) - 1, (IMAGE_SIZE - 2 * _MARGIN - height) // pitch + 1)  # "line nine" is the last
    count = room if rng.random() < 0.5 else int(rng.integers(2, room + 1))
    top = int(rng.integers(_MARGIN, IMAGE_SIZE - _MARGIN - height - (count - 1) * pitch + 1))
    ink = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    lines, letters = [], []
    for index in range(count):
        y, x = top + index * pitch, int(rng.integers(_MARGIN, _MARGIN + 4))
        line = []
        while True:
            word = _word(rng, numbers)
            masks = [glyphs[CHARACTERS.index(c)] for c in word]
            if x + sum(m.shape[1] for m in masks) > IMAGE_SIZE - _MARGIN:
                break
            for c, mask in zip(word, masks, strict=True):
                ink[y : y + height, x : x + mask.shape[1]] = mask
                letters.append((CHARACTERS.index(c), index, x + mask.shape[1] / 2, y + height / 2))
                x += mask.shape[1]
            line.append(word)
            x += max(3, size // 3)
            if rng.random() < 0.08:
                break
        lines.append(tuple(line))
    return Page(_print(rng, ink), tuple(lines), np.asarray(letters, dtype=np.float32))


def _word(rng: np.random.Generator, numbers: float) -> str:
    if rng.random() < numbers:
        return "".join(str(d) for d in rng.integers(0, 10, int(rng.integers(1, 5))))
    return PRINTED[rng.integers(len(PRINTED))]


def _print(rng: np.random.Generator, ink: FloatArray) -> UInt8Array:
    """Dark on light, every fourth page light on dark, with a little noise."""
    dark, light = rng.uniform(0, 70, 3), rng.uniform(190, 255, 3)
    paper, color = (dark, light) if rng.random() < 0.25 else (light, dark)
    sheet = paper + (color - paper) * ink[..., None] + rng.normal(0, rng.uniform(0, 6), (*ink.shape, 1))
    return np.clip(sheet, 0, 255).astype(np.uint8)


def ask_page(page: Page) -> list[QA]:
    """What each line says, and what the whole page says."""
    said = [spoken(line) for line in page.lines]
    asked = [
        QA(f"what is written in line {DIGITS[n + 1]} ?", answer, "line")
        for n, answer in enumerate(said)
        if answer
    ]
    return [*asked, QA(PAGE_QUESTION, " ".join(filter(None, said)), "page")]


def evaluation_pages(n: int, seed: int = 0, *, least: int = 0, split: Split = "test") -> list[Sample]:
    """``n`` questions, one per page, the two families in turn; the same ones for the same arguments.

    Args:
        least: words that the answer must have; more than ten leaves questions about whole pages only.
    """
    rng = np.random.default_rng([seed, 77])
    samples: list[Sample] = []
    while len(samples) < n:
        page = make_page(rng, split, numbers=1.0 if least > 40 else None)
        *lines, whole = ask_page(page)
        wanted = whole if least > 10 or len(samples) % 2 else lines[rng.integers(len(lines))]
        if len(wanted.answer.split()) >= least:
            samples.append(Sample([page.image], *wanted))
    return samples
