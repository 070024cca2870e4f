"""VFlowOpt: its map, its counts and its merges against float64 references written from the formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import judge
import tiny
import tokenprune
from tokenprune.methods import (
    EntropyPrune,
    Grid,
    ImageTokens,
    ImportanceMap,
    Random,
    Recycle,
    Spread,
    VFlowOpt,
    VisionAttention,
)
from tokenprune.methods.importance import FALLBACK, grey_entropy
from tokenprune.methods.recycle import ENLARGED, cells, recycle, retrieve
from tokenprune.methods.uniform import even_tokens
from tokenprune.tokens import Selection

RAGGED = (["text:5", "image", "text:3", "image", "text:4"], ["text:7"], ["text:1", "image", "text:2"])
BUDGETS: list[dict[str, Any]] = [
    {"keep": 0.5},
    {"keep": 0.3, "r1": 0.4, "r2": 0.8},
    {"keep": 0.5, "recycling": "cells", "even": 0.0, "a": 2, "protect_recycled": True},
    {"keep": 0.4, "recycling": "none", "even": 1.0},
]


# -- the importance map ------------------------------------------------------------------------------------------------


def map64(query: Tensor, key: Tensor, cls: bool, t: float) -> tuple[Tensor, bool]:
    """Section 1 of the paper, patch by patch in float64."""
    q, k = query.double(), key.double()
    logits = torch.einsum("hid,hjd->hij", q, k) / math.sqrt(q.shape[-1])
    a = logits.softmax(-1).mean(0)[int(cls) :, int(cls) :]
    n = len(a)
    c = [float(a[:, j].mean()) for j in range(n)]
    mean = sum(c) / n
    voters = [j for j in range(n) if c[j] > t * mean]
    nobody = not voters
    if nobody:
        voters = sorted(range(n), key=lambda j: -c[j])[: max(1, round(n / 100))]
    return a[voters].mean(0), nobody


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("t", [0.0, 0.9, 1.2, 2.0, 40.0])
@pytest.mark.parametrize("n", [9, 36, 169])
def test_relevance_is_the_formula(n: int, t: float, cls: bool) -> None:
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        query, key = (torch.randn(3, n + cls, 16, generator=generator) for _ in range(2))
        key[0, 5] *= 3  # a sink
        attention = VisionAttention(query, key, 1 / 4, cls)
        wanted, nobody = map64(query, key, cls, t)
        found = ImportanceMap(t=t).relevance(attention)
        torch.testing.assert_close(found[:, 0].double(), wanted, atol=1e-6, rtol=1e-5)
        assert (found[:, 1] == float(nobody)).all() and found.isfinite().all()


def test_patches_of_padding_do_not_vote() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 20, 8, generator=generator) for _ in range(2))
    real = torch.arange(20) < 13
    whole = ImportanceMap(t=1.1).relevance(VisionAttention(query, key, 0.3, False, real))
    part = ImportanceMap(t=1.1).relevance(VisionAttention(query[:, :13], key[:, :13], 0.3, False))
    torch.testing.assert_close(whole[:13], part, atol=1e-6, rtol=1e-5)


def test_entropy_is_shannons_in_bits() -> None:
    patches = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (7, 3, 8, 8), dtype=np.uint8))
    patches[2] = 9
    patches[3, :, :, :4], patches[3, :, :, 4:] = 10, 200
    found = grey_entropy(patches)
    for patch, bits in zip(patches, found, strict=True):
        grey = np.rint(patch.numpy().astype(np.float64).mean(0)).astype(int)
        share = np.bincount(grey.ravel(), minlength=256) / grey.size
        assert float(bits) == pytest.approx(-sum(p * math.log2(p) for p in share if p), abs=1e-5)
    assert float(found[2]) == 0 and float(found[3]) == pytest.approx(1)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_onevision", "internvl"])
def test_entropy_is_added_by_alpha(name: str) -> None:
    model = tiny.build(name, layers=6)
    inputs = tiny.inputs(model, RAGGED, pad="left")
    seen: dict[float, list[Tensor]] = {0.0: [], 2.5: []}

    class Watched(ImportanceMap):
        def score(self, image: ImageTokens) -> Tensor:
            seen[self.alpha].append(super().score(image))
            if self.alpha:
                assert image.pixels is not None
                seen[0.0].append(image.pixels)
            return seen[self.alpha][-1]

    for alpha in (0.0, 2.5):
        with tokenprune.pruned(model, Watched(alpha=alpha), layer=0, keep=0.5), torch.no_grad():
            model(**inputs)
    images = len(seen[2.5])
    for plain, pixels, both in zip(seen[0.0][:images], seen[0.0][images:], seen[2.5], strict=True):
        torch.testing.assert_close(both, plain + 2.5 * pixels)


# -- recycling ---------------------------------------------------------------------------------------------------------


def recycle64(
    score: list[float], grids: Any, k: int, side: float
) -> tuple[list[int], dict[int, dict[int, float]]]:
    """By trial: as few tokens dropped as make kept and merged ones k together; {slot: {source: weight}}."""
    n = len(score)
    place = [
        (g, f, r, c)
        for g, x in enumerate(grids)
        for f in range(x.frames)
        for r in range(x.height)
        for c in range(x.width)
    ]
    cell = [(g, f, int(r // side), int(c // side)) for g, f, r, c in place[:n]]
    order = sorted(range(n), key=lambda j: (score[j], -j))
    for drop in range(n + 1):
        dropped = order[:drop]
        by_cell: dict[Any, list[int]] = {}
        for j in dropped:
            by_cell.setdefault(cell[j], []).append(j)
        if n - drop + len(by_cell) == k:
            break
    merges = {}
    for members in by_cell.values():
        slot = max(members, key=lambda j: (score[j], -j))
        mass = [max(score[j], 0.0) for j in members]
        total = sum(mass)
        merges[slot] = {
            j: m / total if total else 1 / len(members) for j, m in zip(members, mass, strict=True)
        }
    return sorted(set(range(n)) - set(dropped) | set(merges)), merges


@pytest.mark.parametrize(
    "grids",
    [(Grid(1, 6, 7),), (Grid(1, 3, 3), Grid(1, 5, 8)), (Grid(4, 3, 4),)],
    ids=["one", "views", "video"],
)
@pytest.mark.parametrize("side", [1.0, 2, 2.5, 3])
def test_recycling_is_the_reference(grids: Any, side: float) -> None:
    n = sum(g.tokens for g in grids)
    rng = np.random.default_rng(0)
    for trial in range(30):
        score = torch.from_numpy(rng.normal(size=n)).round(decimals=1)  # with ties
        if trial % 3 == 0:
            score = score.abs()
        k = int(rng.integers(1, n))
        if len(set(cells(grids, n, n, side)[0])) > k:
            continue
        image = ImageTokens(n=n, raster=torch.arange(n), grids=grids)
        chosen = recycle(image, score, k, side)
        keep, merges = recycle64(score.tolist(), grids, k, side)
        assert chosen.keep.tolist() == keep and len(keep) == k
        assert chosen.merges is not None and chosen.weights is not None
        found: dict[int, dict[int, float]] = {}
        for (source, slot), weight in zip(chosen.merges.tolist(), chosen.weights.tolist(), strict=True):
            found.setdefault(slot, {})[source] = weight
        for slot, parts in found.items():
            wanted = merges.get(slot, {slot: 1.0})
            assert parts.keys() == wanted.keys()
            assert all(parts[j] == pytest.approx(wanted[j], abs=1e-6) for j in parts)
        assert chosen.notes == {ENLARGED: 0}


def test_cells_grow_until_they_fit() -> None:
    grids = (Grid(1, 8, 8),)
    for k in (1, 2, 3, 4, 9, 15, 16):
        numbers, enlarged = cells(grids, 64, k, 2.0)
        assert len(set(numbers)) <= k and enlarged == (k < 16)
        image = ImageTokens(n=64, raster=torch.arange(64), grids=grids)
        chosen = recycle(image, torch.randn(64, generator=torch.Generator().manual_seed(k)), k, 2.0)
        assert len(chosen.keep.unique()) == k and chosen.notes == {ENLARGED: int(k < 16)}
    assert cells((Grid(9, 2, 2),), 36, 4, 2.0) == ((0,) * 36, True)  # more frames than tokens


def test_retrieval_is_the_reference() -> None:
    """softmax(beta cos) of each dropped token over the two kept ones most like it; the mean of what is taken up."""
    rng = np.random.default_rng(0)
    for n, k, beta in ((20, 7, 100.0), (30, 1, 5.0), (9, 8, 0.0)):
        x = rng.normal(size=(n, 6))
        keep = np.sort(rng.permutation(n)[:k])
        image = ImageTokens(
            n=n, raster=torch.arange(n), grids=(Grid(1, 1, n),), features=torch.tensor(x, dtype=torch.float32)
        )
        found = retrieve(image, Selection(torch.tensor(keep)), beta, size_term=True)
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        mass, total = dict.fromkeys(keep.tolist(), 1.0), {j: x[j].copy() for j in keep.tolist()}
        for j in sorted(set(range(n)) - set(keep.tolist())):
            near = sorted(keep.tolist(), key=lambda i: -float(unit[i] @ unit[j]))[:2]
            share = np.exp([beta * float(unit[i] @ unit[j] - unit[near[0]] @ unit[j]) for i in near])
            for i, p in zip(near, share / share.sum(), strict=True):
                mass[i] += p
                total[i] += p * x[j]
        assert found.merges is not None and found.weights is not None and found.bias is not None
        merged = np.zeros((n, 6))
        for (source, slot), weight in zip(found.merges.tolist(), found.weights.tolist(), strict=True):
            merged[slot] += weight * x[source]
        for place, j in enumerate(keep.tolist()):
            np.testing.assert_allclose(merged[j], total[j] / mass[j], atol=1e-5)
            assert float(found.bias[place]) == pytest.approx(math.log(mass[j]), abs=1e-5)


@pytest.mark.parametrize("grids", [(Grid(1, 12, 12),), (Grid(1, 3, 3), Grid(1, 5, 8)), (Grid(4, 3, 4),)])
def test_spread_keeps_an_even_grid_and_the_best_of_the_others(grids: Any) -> None:
    n = sum(g.tokens for g in grids)
    score = torch.randn(n, generator=torch.Generator().manual_seed(0))

    class Given(ImportanceMap):
        def score(self, image: ImageTokens) -> Tensor:
            return score[image.raster]

    for share in (0.0, 0.3, 0.5, 1.0):
        method = Spread(Given(), share)
        for k in (1, 5, n // 2, n - 1):
            grid = set(even_tokens(grids, round(share * k)))
            others = sorted(set(range(n)) - grid, key=lambda j: -float(score[j]))
            wanted = sorted(grid | set(others[: k - len(grid)]))
            image = ImageTokens(n=n, raster=torch.arange(n), grids=grids, vision=torch.zeros(n, 2))
            assert method.select(image, k).keep.tolist() == wanted
            left = torch.tensor(
                wanted
            )  # at a later cut: what of the smaller grid is still there, then the best
            later = ImageTokens(n=k, raster=left, grids=grids, cut=1, vision=torch.zeros(k, 2))
            if k > 2:
                grid = set(even_tokens(grids, round(share * (k - 2)))) & set(wanted)
                others = sorted(set(wanted) - grid, key=lambda j: -float(score[j]))
                kept = sorted(grid | set(others[: k - 2 - len(grid)]))
                assert left[method.select(later, k - 2).keep].tolist() == kept
    with pytest.raises(tokenprune.ConfigError, match="from 0 to 1, not 2"):
        Spread(Random(), 2)
    with pytest.raises(tokenprune.ConfigError, match="scores tokens"):
        Spread(tokenprune.methods.Uniform())  # type: ignore[arg-type]


# -- the method --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", BUDGETS)
@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_5_vl", "internvl", "gemma3", "idefics3"])
def test_it_is_judged_and_keeps_its_budget(name: str, arguments: dict[str, Any]) -> None:
    """Section 8 (c), (d), (f): cuts at 0, L // 3 and 2 (L // 3); the average within one token per layer."""
    model = tiny.build(name, layers=6)
    inputs = tiny.inputs(model, RAGGED, pad="left")
    with tokenprune.pruned(model, "vflowopt", **arguments), torch.no_grad():
        model(**inputs)
        report = tokenprune.report(model)
        model(**tiny.inputs(model, [["text:6"]]))  # text only
    assert report.layers_cut == (0, 2, 4)
    recycled = arguments.get("recycling") != "none"
    for image in report.images:
        assert abs(image.average - arguments["keep"] * image.tokens) <= 1.5
        assert image.kept == tuple(sorted(image.kept, reverse=True))
        assert image.merged[0] == (image.tokens - image.kept[0]) * recycled and not any(image.merged[1:])
    assert judge.prefill_difference(model, inputs, method="vflowopt", **arguments) <= judge.TOLERANCE
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with tokenprune.pruned(model, "vflowopt", **arguments):
        out = model.generate(**inputs, **options, return_dict_in_generate=True)
        lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert lengths == [layer.length + 2 for layer in report.layers]


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "internvl", "smolvlm"])
@pytest.mark.parametrize("how", ["hopfield", "cells"])
def test_videos_recycle_too(name: str, how: str) -> None:
    model = tiny.build(name, layers=6)
    inputs = tiny.inputs(model, [["text:2", "video", "text:3"]])
    arguments: dict[str, Any] = {"method": "vflowopt", "keep": 0.5, "recycling": how, "a": 2}
    assert judge.prefill_difference(model, inputs, **arguments) <= judge.TOLERANCE
    with tokenprune.pruned(model, **arguments), torch.no_grad():
        model(**inputs)
        assert all(image.merged[0] for image in tokenprune.report(model).images)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_everything_is_equal_to_the_bit(attention: str) -> None:
    """Section 8 (a)."""
    model = tiny.llava(layers=6, attn_implementation=attention)
    inputs = tiny.inputs(model, RAGGED, pad="left")
    with torch.no_grad():
        stock = model(**inputs).logits
        with tokenprune.pruned(model, "vflowopt", keep=1.0, r1=1.0, r2=1.0):
            assert torch.equal(model(**inputs).logits, stock)


def test_a_picture_without_voters_is_finite_and_told() -> None:
    """Section 8 (e)."""
    model = tiny.llava(layers=6)
    inputs = tiny.inputs(model, RAGGED, pad="left")
    with tokenprune.pruned(model, "vflowopt", keep=0.4, t=1e5), torch.no_grad():
        assert model(**inputs).logits[:, -1].isfinite().all()
        for image in tokenprune.report(model).images:
            assert image.notes[FALLBACK] >= 1 and "scores that were no numbers" not in image.notes
    with tokenprune.pruned(model, "vflowopt", keep=0.4), torch.no_grad():
        model(**inputs)
        assert all(FALLBACK not in image.notes for image in tokenprune.report(model).images)


def test_text_after_the_image_changes_nothing() -> None:
    """Section 8 (b), contract 9."""
    model = tiny.llava(layers=6)
    inputs = tiny.inputs(model, [["text:3", "image", "text:4"]])
    lists = []
    for last in (11, 12):
        inputs["input_ids"][0, -1] = last
        with tokenprune.pruned(model, "vflowopt", keep=0.4), torch.no_grad():
            model(**inputs)
            lists.append(tokenprune.report(model).keep_lists)
    assert lists[0] == lists[1]


def test_its_parts_go_with_other_methods() -> None:
    model = tiny.llava(layers=6)
    inputs = tiny.inputs(model, RAGGED, pad="left")
    parts: list[dict[str, Any]] = [
        {"method": Recycle(EntropyPrune(source="hidden"), side=2), "layer": 1, "keep": 0.5},
        {"method": ImportanceMap(t=1.0), "layer": 2, "keep": 0.5},
        {"method": Recycle(Spread(Random()), how="hopfield"), "layer": 2, "keep": 0.5},
        {
            "method": Recycle(ImportanceMap(), side=3, size_term=True, protect=True),
            "cuts": [(0, 0.6), (3, 0.4)],
        },
    ]
    for arguments in parts[:3]:
        assert judge.prefill_difference(model, inputs, **arguments) <= judge.TOLERANCE
    with tokenprune.pruned(model, **parts[3]), torch.no_grad():
        model(**inputs)
        report = tokenprune.report(model)
    for key, (index, values) in report.biases[0].items():
        pairs, _ = report.merges[0][key]
        sizes = torch.bincount(pairs[:, 1], minlength=int(pairs.max()) + 1)[index]
        torch.testing.assert_close(values, sizes.float().log())
        merged = set(index[sizes > 1].tolist())  # what was merged stays
        assert merged <= set(report.keep_lists[1][key[0]][key[1]]) or len(merged) > len(
            report.keep_lists[1][key[0]][key[1]]
        )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"t": -1}, "t must be a number"),
        ({"t": float("nan")}, "t must be a number"),
        ({"alpha": "x"}, "alpha must be a number"),
        ({"voters": "all"}, "voters must be one of attended, cls"),
        ({"a": 0.5}, "side of recycling cells"),
        ({"beta": float("inf")}, "beta must be a number from 0 to 1e"),
        ({"beta": 1e39}, "beta must be a number from 0 to 1e"),
        ({"size_term": "no"}, "size_term must be True or False, not 'no'"),
        ({"size_term": None}, "size_term must be True or False, not None"),
        ({"protect_recycled": 1}, "protect_recycled must be True or False, not 1"),
        ({"recycling": "grid"}, "recycling must be one of hopfield, cells, none"),
        ({"even": 1.5}, "even grid must be a number from 0 to 1"),
        ({"r1": 2.0}, r"r1 must be a float in \(0, 1\]"),
        ({"r2": 1}, r"r2 must be a float in \(0, 1\]"),
    ],
)
def test_parameters_are_checked(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(tokenprune.ConfigError, match=text):
        VFlowOpt(**arguments)
