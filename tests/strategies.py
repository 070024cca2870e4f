"""What the properties draw: a prompt's layout, its padding, a budget and a method, together one `Case`.

A case is small, prints as one line, and can be pasted into `@example`. The models have 4 layers of width 32 and
are built once per process.

Budgets are drawn so that every image of the case can meet them; which counts they mean is said by `counts_of`,
which shares nothing with the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from math import floor
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st

import tiny
from tokenprune.methods import ImageTokens, Method, Needs, Selection

LAYERS = 4
SIDES = {"llava-llama": 3, "llava-qwen2": 2}
FAMILIES = (*SIDES, "qwen2_5_vl")
SOURCES = ("query", "key", "value", "hidden")
Share = Fraction | int
"""A part of an image's tokens, or a number of them."""


@dataclass(frozen=True)
class RandomMerges(Method):
    """Keeps random tokens and merges random ones into them, with weights of both signs that sum to anything.

    A slot has any number of sources, is one of them or not, and may take the same one twice.
    """

    name: ClassVar[str] = "random_merges"

    seed: int = 0
    calls: list[int] = field(default_factory=list)  # no two images of a call get the same draw

    def needs(self) -> Needs:
        return Needs()

    def select(self, image: ImageTokens, k: int) -> Selection:
        generator = torch.Generator().manual_seed(1000 * self.seed + len(self.calls))
        self.calls.append(image.n)
        keep = torch.randperm(image.n, generator=generator)[:k].sort().values
        pairs = int(torch.randint(0, 2 * image.n + 1, (), generator=generator))
        source = torch.randint(0, image.n, (pairs,), generator=generator)
        slot = keep[torch.randint(0, k, (pairs,), generator=generator)]
        weights = 2 * torch.rand(pairs, generator=generator) - 1
        return Selection(keep, torch.stack([source, slot], dim=1), weights)


@dataclass(frozen=True)
class Case:
    """One call of a wrapped model.

    Attributes:
        family, attention: the model, see `model_of`.
        rows: pieces as `tiny.inputs` takes them, row by row.
        pad: "left" or "right"; without meaning where all rows are equally long.
        extra: columns of padding beyond the longest row.
        mask: whether the call brings an attention mask (always, where there is padding).
        seed: of ids and pixels; row i draws from seed + i.
        method, parameters: a name tokenprune knows, or "random_merges".
        cuts, keep, budget: as `tokenprune.wrap` takes them.
    """

    family: str
    attention: str
    rows: tuple[tuple[str, ...], ...]
    pad: str
    extra: int
    mask: bool
    seed: int
    method: str
    parameters: tuple[tuple[str, Any], ...]
    cuts: tuple[tuple[int, float | int | None], ...]
    keep: float | int | None
    budget: str

    @property
    def model(self) -> Any:
        return model_of(self.family, self.attention)

    def inputs(self) -> dict[str, torch.Tensor]:
        samples = [tiny.inputs(self.model, [row], seed=self.seed + i) for i, row in enumerate(self.rows)]
        inputs = collate(samples, self.pad, self.extra)
        if not self.mask:
            del inputs["attention_mask"]
        return inputs

    def arguments(self) -> dict[str, Any]:
        """Of `tokenprune.wrap`."""
        budget = {"cuts": self.cuts, "keep": self.keep, "budget": self.budget}
        if self.method == "random_merges":
            return {"method": RandomMerges(**dict(self.parameters)), **budget}
        return {"method": self.method, **dict(self.parameters), **budget}

    def counts(self, n: int) -> list[int]:
        """What an image of `n` tokens must keep after each cut."""
        cuts = [(layer, _share(keep)) for layer, keep in self.cuts]
        counts = counts_of(n, LAYERS, cuts, _share(self.keep), self.budget)
        assert counts is not None  # else it would not have been drawn
        return counts


@cache
def model_of(family: str, attention: str) -> Any:
    size = {"layers": LAYERS, "d": 32, "vision_layers": 1, "attn_implementation": attention}
    if family in SIDES:
        return tiny.llava(family.removeprefix("llava-"), side=SIDES[family], **size)
    return tiny.qwen2_5_vl(**size)


def collate(samples: Sequence[dict[str, torch.Tensor]], pad: str, extra: int = 0) -> dict[str, torch.Tensor]:
    """One batch of inputs of batch 1."""
    longest = max(s["input_ids"].shape[1] for s in samples) + extra
    out: dict[str, torch.Tensor] = {}
    for name, filler in (("input_ids", tiny.PAD), ("attention_mask", 0), ("mm_token_type_ids", 0)):
        if name in samples[0]:
            rows = [(s[name], longest - s[name].shape[1]) for s in samples]
            sides = [(x, (gap, 0) if pad == "left" else (0, gap)) for x, gap in rows]
            out[name] = torch.cat([torch.nn.functional.pad(x, side, value=filler) for x, side in sides])
    for name in ("pixel_values", "image_grid_thw"):
        found = [s[name] for s in samples if name in s]
        if found:
            out[name] = torch.cat(found)
    return out


def image_tokens(family: str, piece: str) -> int:
    """Visual tokens of a piece."""
    kind, _, detail = piece.partition(":")
    if kind != "image":
        return 0
    if family in SIDES:
        return SIDES[family] ** 2
    height, width = map(int, detail.split("x"))
    return height * width


def row_length(family: str, row: Sequence[str]) -> int:
    text = sum(int(piece.partition(":")[2]) for piece in row if piece.startswith("text"))
    around = 0 if family in SIDES else 2  # vision start and end
    return text + sum(image_tokens(family, p) + around for p in row if p.startswith("image"))


def counts_of(
    n: int, layers: int, cuts: Sequence[tuple[int, Share | None]], keep: Share | None, budget: str
) -> list[int] | None:
    """Contract 15 in exact fractions and by trial: what an image keeps after each cut; None where it is an error.

    Where nothing smaller than one token exists, that token is kept and is no error: an image that has only one,
    and a target below one token before the LLM.
    """

    def tokens(share: Share) -> Fraction:
        return share * n if isinstance(share, Fraction) else Fraction(min(share, n))

    counts: list[int] = []
    for layer, share in cuts:
        before = counts[-1] if counts else n
        wanted = keep if share is None else share
        assert wanted is not None
        target = tokens(wanted)
        if share is not None or budget == "after_cut":
            counts.append(max(1, floor(target + Fraction(1, 2)) if share is not None else int(target)))
            if counts[-1] > before:
                return None
            continue
        per_layer = [n] * layer
        for (start, _), count in zip(cuts, counts, strict=False):
            per_layer[start:] = [count] * (layer - start)
        spent = sum(per_layer)
        total = floor(target * layers)
        reached = [k for k in range(1, before + 1) if spent + k * (layers - layer) <= total]
        if reached and (reached[-1] < before or spent + before * (layers - layer) == target * layers):
            counts.append(reached[-1])
        elif reached and counts and target * layers - (spent + before * (layers - layer)) < layers:
            counts.append(before)  # what the cuts before lost by rounding
        elif n == 1 or (layer == 0 and target < 1):
            counts.append(1)
        else:
            return None
    return counts


def _share(keep: float | int | None) -> Share | None:
    # What was typed, not its nearest binary fraction: 0.29 of 100 is 29.
    return Fraction(keep).limit_denominator(10_000) if isinstance(keep, float) else keep


# -- strategies ---------------------------------------------------------------------------------------------------


@st.composite
def rows(draw: st.DrawFn, family: str) -> tuple[str, ...]:
    """0-3 images with 0-4 text tokens before, between and after; never empty."""
    pieces: list[str] = []
    images = draw(st.sampled_from((1, 2, 3, 0)))
    for i in range(images + 1):
        if i:
            size = draw(st.sampled_from(("2x2", "1x1", "2x3", "3x2", "1x3"))) if family not in SIDES else None
            pieces.append("image" if size is None else f"image:{size}")
        text = draw(st.integers(0 if images else 1, 4))
        if text:
            pieces.append(f"text:{text}")
    return tuple(pieces)


@st.composite
def budgets(
    draw: st.DrawFn, sizes: Sequence[int], first: int
) -> tuple[tuple[tuple[int, float | int | None], ...], float | int | None, str]:
    """(cuts, keep, budget) that every image of `sizes` tokens can meet; cuts at layers `first` and later."""
    number = draw(st.integers(1, 3))
    layers = sorted(
        draw(st.lists(st.integers(first, LAYERS - 1), min_size=number, max_size=number, unique=True))
    )
    most = min(sizes, default=4)
    fractions = draw(st.booleans()) or most == 1
    kind = draw(st.sampled_from(("explicit", "average", "after_cut")))
    stages: list[Share] = []
    for _ in layers:  # non-increasing
        if fractions:
            before = stages[-1] if stages else Fraction(19, 20)
            stages.append(Fraction(draw(st.integers(1, int(before * 20))), 20))
        else:
            stages.append(draw(st.integers(1, int(stages[-1]) if stages else most)))
    typed = [float(s) if isinstance(s, Fraction) else s for s in stages]
    explicit = tuple(zip(layers, typed, strict=True))
    if kind == "explicit":
        return explicit, None, "average"
    solved = (*explicit[:-1], (layers[-1], None))
    if kind == "after_cut":
        return solved, typed[-1], "after_cut"
    # The average that this schedule has for one image; small or rounded ones may not be able to follow.
    keep: Share
    if fractions:
        ends = [*layers[1:], LAYERS]
        shares = sum((b - a) * s for a, b, s in zip(layers, ends, stages, strict=True))
        keep = Fraction(Fraction(layers[0] + shares, LAYERS)).limit_denominator(1000)
    else:
        keep = draw(st.integers(1, most))
    exact: list[tuple[int, Share | None]] = [*zip(layers, stages[:-1], strict=False), (layers[-1], None)]
    if all(counts_of(n, LAYERS, exact, keep, "average") for n in sizes):
        return solved, float(keep) if fractions else int(keep), "average"
    return explicit, None, "average"


@st.composite
def methods(draw: st.DrawFn) -> tuple[str, tuple[tuple[str, Any], ...]]:
    name = draw(st.sampled_from(("random", "uniform", "entropyprune")))
    if name == "random":
        return name, (("seed", draw(st.integers(0, 99))),)
    if name == "uniform":
        return name, ()
    choices = {"source": SOURCES, "normalization": ("none", "trace"), "gram": ("dual", "primal")}
    return name, tuple((what, draw(st.sampled_from(values))) for what, values in choices.items())


@st.composite
def cases(
    draw: st.DrawFn,
    method: st.SearchStrategy[tuple[str, tuple[tuple[str, Any], ...]]] | None = None,
    left_only: bool = False,
) -> Case:
    """Any call.

    Args:
        draw: hypothesis'.
        method: which methods; default: those of the library.
        left_only: pad on the left only, and always bring a mask: prompts for generate().
    """
    family = draw(st.sampled_from(FAMILIES))
    attention = draw(st.sampled_from(("sdpa", "eager")))
    batch = [list(draw(rows(family))) for _ in range(draw(st.integers(1, 4)))]
    padding = draw(st.sampled_from(("left",) if left_only else ("left", "right", "none", "no mask")))
    extra = 0
    if padding in ("left", "right"):
        extra = draw(st.integers(0, 2))
    else:  # fill the shorter rows with text, in front or behind
        lengths = [row_length(family, row) for row in batch]
        for row, length in zip(batch, lengths, strict=True):
            if length < max(lengths):
                row.insert(draw(st.sampled_from((0, len(row)))), f"text:{max(lengths) - length}")
    name, parameters = draw(methods() if method is None else method)
    sizes = sorted({image_tokens(family, piece) for row in batch for piece in row} - {0})
    cuts, keep, budget = draw(budgets(sizes, first=1 if name == "entropyprune" else 0))
    return Case(
        family=family,
        attention=attention,
        rows=tuple(map(tuple, batch)),
        pad="right" if padding == "right" else "left",
        extra=extra,
        mask=padding != "no mask",
        seed=draw(st.integers(0, 999)),
        method=name,
        parameters=parameters,
        cuts=cuts,
        keep=keep,
        budget=budget,
    )


def merges() -> st.SearchStrategy[tuple[str, tuple[tuple[str, Any], ...]]]:
    """`RandomMerges`, for `cases`."""
    return st.integers(0, 999).map(lambda seed: ("random_merges", (("seed", seed),)))


@dataclass(frozen=True)
class Budget:
    """Arguments of `plan_counts`, shares as exact fractions."""

    n: int
    layers: int
    cuts: tuple[tuple[int, Share | None], ...]
    keep: Share | None
    budget: str


@st.composite
def plans(draw: st.DrawFn) -> Budget:
    """Budgets of every kind, reachable or not, many of them at the edge of what can be reached."""
    n = draw(st.one_of(st.integers(1, 12), st.integers(1, 3000)))
    layers = draw(st.integers(1, 40))
    where = draw(st.lists(st.integers(0, layers - 1), min_size=1, max_size=3, unique=True))
    shares = st.one_of(
        st.integers(1, n),
        st.integers(1, n + 2),
        st.integers(1, 100).map(lambda k: Fraction(k, 100)),
        st.tuples(st.integers(1, 64), st.integers(1, 64)).map(lambda pq: Fraction(min(pq), max(pq))),
    )
    solved = draw(st.booleans())
    keep: Share | None = draw(shares) if solved else None
    cuts: list[tuple[int, Share | None]] = []
    for i, layer in enumerate(sorted(where)):
        last = i == len(where) - 1
        cuts.append((layer, None if last and solved else draw(shares)))
    if solved and draw(st.booleans()):  # within two tokens of the smallest average
        fixed = counts_of(n, layers, cuts[:-1], None, "average") or []
        per_layer = [n] * layers
        for (layer, _), count in zip(cuts, [*fixed, 1], strict=False):
            per_layer[layer:] = [count] * (layers - layer)
        keep = min(n, max(1, sum(per_layer) // layers + draw(st.integers(-2, 2))))
    return Budget(n, layers, tuple(cuts), keep, draw(st.sampled_from(("average", "after_cut"))))
