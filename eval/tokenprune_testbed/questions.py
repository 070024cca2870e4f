"""Questions about scenes, their answers, and the deterministic held-out evaluation set."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tokenprune.errors import ConfigError
from tokenprune_testbed.grounds import (
    COLUMN_WORDS,
    GROUNDS,
    PLACES,
    ROW_WORDS,
    TINT_NAMES,
    Split,
    UInt8Array,
)
from tokenprune_testbed.scenes import COLOR_NAMES, DEFAULT_SCENES, DIGITS, KINDS, Scene, SceneKind, make_scene

OBJECT_FAMILIES = ("attribute", "identity", "position", "counting", "existence", "reading", "difference")
GROUND_FAMILIES = ("ground", "region", "tint")  # about what the objects stand on; mosaic scenes only
FAMILIES = OBJECT_FAMILIES + GROUND_FAMILIES
READING_QUESTION = "what does the row read ?"
DIFFERENCE_QUESTION = "which digit is new ?"
PLACE_MARGIN = 3.0  # pixels: "where" is only asked about objects this far from a border between thirds


class QA(NamedTuple):
    """A question (ends in " ?"), its answer and the family it belongs to."""

    question: str
    answer: str
    family: str


@dataclass(frozen=True)
class Sample:
    """One evaluation question: ``images`` are (96, 96, 3) uint8 arrays, two of them for "difference"."""

    images: list[UInt8Array] = field(repr=False)
    question: str
    answer: str
    family: str


def families_of(scenes: SceneKind, *, single_image: bool = False) -> tuple[str, ...]:
    """The families that can be asked about a kind of scenes."""
    families = FAMILIES if scenes == "mosaic" else OBJECT_FAMILIES
    return tuple(f for f in families if not (single_image and f == "difference"))


def vocabulary() -> list[str]:
    """Every word of every question and answer: of objects, sorted, then of grounds, which came later."""
    words = set("what color is the where which digit shape new how many digits shapes things".split())
    words |= set("there a does row read yes no ?".split())
    words |= set(COLOR_NAMES) | set(KINDS) | set(ROW_WORDS) | set(COLUMN_WORDS)
    return [*sorted(words), *sorted({"ground", "at", *GROUNDS, *TINT_NAMES})]


def known_words(question: str, more: Sequence[str] = ()) -> str:
    """A question as the small model reads it: lower-case words it was trained on, a question mark that stands alone.

    Args:
        more: words that it knows besides `vocabulary`.

    Raises:
        ConfigError: names the words it does not know.
    """
    words = re.findall(r"\?|[^\s?]+", question.lower())
    known = {*vocabulary(), *more}
    unknown = [word for word in words if word not in known]
    if unknown or not words:
        raise ConfigError(
            f"the small testbed model does not know {', '.join(map(repr, unknown)) or 'an empty question'}; ask for "
            f"example 'what color is the star ?', 'where is the seven ?' or 'how many digits ?'"
        )
    return " ".join(words)


def _attribute(scene: Scene, rng: np.random.Generator) -> Iterator[QA]:
    kinds = Counter(o.kind for o in scene.objects)
    for obj in scene.objects:
        if kinds[obj.kind] == 1:
            yield QA(f"what color is the {obj.kind} ?", obj.color, "attribute")


def _identity(scene: Scene, rng: np.random.Generator) -> Iterator[QA]:
    groups = Counter((o.is_digit, o.color) for o in scene.objects)
    for obj in scene.objects:
        if groups[obj.is_digit, obj.color] == 1:
            yield QA(f"which {'digit' if obj.is_digit else 'shape'} is {obj.color} ?", obj.kind, "identity")


def _position(scene: Scene, rng: np.random.Generator) -> Iterator[QA]:
    kinds = Counter(o.kind for o in scene.objects)
    for obj in scene.objects:
        if kinds[obj.kind] == 1 and obj.place_margin >= PLACE_MARGIN:
            yield QA(f"where is the {obj.kind} ?", obj.place, "position")


def _counting(scene: Scene, rng: np.random.Generator) -> Iterator[QA]:
    digits = sum(o.is_digit for o in scene.objects)
    counts = {"digits": digits, "shapes": len(scene.objects) - digits}
    for noun, count in counts.items():
        if count < len(DIGITS):
            yield QA(f"how many {noun} ?", DIGITS[count], "counting")
    colors = Counter(o.color for o in scene.objects)
    absent = [c for c in COLOR_NAMES if c not in colors]
    # One absent colour at most, or "zero" would be the answer to nearly every colour.
    asked = list(colors) + ([absent[rng.integers(len(absent))]] if absent else [])
    for color in asked:
        yield QA(f"how many {color} things ?", DIGITS[colors[color]], "counting")


def _existence(scene: Scene, rng: np.random.Generator) -> Iterator[QA]:
    """One "yes" and one "no" question; half of the "no" ones share the colour or the kind with an object."""
    present = {(o.kind, o.color) for o in scene.objects}
    obj = scene.objects[rng.integers(len(scene.objects))]
    yield QA(f"is there a {obj.color} {obj.kind} ?", "yes", "existence")
    while True:
        obj = scene.objects[rng.integers(len(scene.objects))]
        kind, color = KINDS[rng.integers(len(KINDS))], COLOR_NAMES[rng.integers(len(COLOR_NAMES))]
        pair = [(obj.kind, color), (kind, obj.color), (kind, color), (kind, color)][rng.integers(4)]
        if pair not in present:
            yield QA(f"is there a {pair[1]} {pair[0]} ?", "no", "existence")
            return


def _reading(scene: Scene, rng: np.random.Generator) -> Iterator[QA]:
    if scene.row:
        yield QA(READING_QUESTION, " ".join(scene.objects[i].kind for i in scene.row), "reading")


def _ground(scene: Scene, rng: np.random.Generator) -> Iterator[QA]:
    if scene.ground is not None:
        for place, kind in zip(PLACES, scene.ground.cells, strict=True):
            yield QA(f"what is the ground at the {place} ?", kind, "ground")


def _region(scene: Scene, rng: np.random.Generator) -> Iterator[QA]:
    if scene.ground is not None:
        for kind in scene.ground.tints:
            places = scene.ground.places(kind)
            if len(places) == 1:
                yield QA(f"where is the {kind} ?", places[0], "region")


def _tint(scene: Scene, rng: np.random.Generator) -> Iterator[QA]:
    if scene.ground is not None:
        for kind, tint in scene.ground.tints.items():
            yield QA(f"what color is the {kind} ?", tint, "tint")


_SINGLE_IMAGE: dict[str, Callable[[Scene, np.random.Generator], Iterator[QA]]] = {
    "attribute": _attribute,
    "identity": _identity,
    "position": _position,
    "counting": _counting,
    "existence": _existence,
    "reading": _reading,
    "ground": _ground,
    "region": _region,
    "tint": _tint,
}


def ask(scene: Scene, rng: np.random.Generator, family: str) -> list[QA]:
    """Every question of one family that this scene answers without ambiguity (possibly none)."""
    if family == "difference":
        if scene.previous is None:
            return []
        return [QA(DIFFERENCE_QUESTION, scene.objects[-1].kind, family)]
    return list(_SINGLE_IMAGE[family](scene, rng))


def auxiliary_differences(scene: Scene) -> list[QA]:
    """Training only: further questions about the new object of a two-image prompt."""
    new = scene.objects[-1]
    extra = [QA("what color is the new digit ?", new.color, "difference")]
    if new.place_margin >= PLACE_MARGIN:
        extra.append(QA("where is the new digit ?", new.place, "difference"))
    return extra


def ask_mixed(
    scene: Scene,
    rng: np.random.Generator,
    count: int,
    families: Sequence[str] = families_of("plain", single_image=True),
) -> list[QA]:
    """Up to ``count`` different single-image questions in random order, families taken in turn.

    Of a scene's many counting and ground questions no more are among them than of the other families.
    """
    pools = []
    for family in families:
        pool = ask(scene, rng, family)
        limit = max(3, count // len(families)) if family in ("counting", "ground") else len(pool)
        pools.append([pool[i] for i in rng.permutation(len(pool))[:limit]])
    turns = [qa for turn in range(max(map(len, pools))) for pool in pools for qa in pool[turn : turn + 1]]
    chosen = turns[:count]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def scene_for(
    family: str, rng: np.random.Generator, split: Split, scenes: SceneKind = DEFAULT_SCENES
) -> Scene:
    """A scene of the kind the evaluation set asks ``family`` questions about."""
    if family == "reading":
        length = int(rng.integers(2, 5))
        objects = length + int(rng.integers(0, 4))
        return make_scene(rng, split, num_objects=objects, row_length=length, scenes=scenes)
    if family == "difference":
        return make_scene(rng, split, num_objects=int(rng.integers(2, 6)), add_digit=True, scenes=scenes)
    return make_scene(rng, split, scenes=scenes)


def evaluation_set(
    n: int, seed: int = 0, split: Split = "test", per_scene: int = 2, *, scenes: SceneKind = DEFAULT_SCENES
) -> list[Sample]:
    """``n`` questions with families in equal parts, the same ones for the same arguments.

    Up to ``per_scene`` questions of one family share a scene. Existence questions are one "yes" and one "no"
    per scene, or one of them by a fair coin when only one is wanted. Of mosaic scenes three families in ten need
    the ground.
    """
    samples: list[Sample] = []
    families = families_of(scenes)
    for index, family in enumerate(families):
        wanted = n // len(families) + (index < n % len(families))
        rng = np.random.default_rng([seed, index])  # a family's questions do not depend on the others
        found: list[Sample] = []
        while len(found) < wanted:
            scene = scene_for(family, rng, split, scenes)
            pool = ask(scene, rng, family)
            images = [scene.image] if scene.previous is None else [scene.previous, scene.image]
            for i in rng.permutation(len(pool))[:per_scene]:
                found.append(Sample(images, *pool[i]))
        samples += found[:wanted]
    return samples
