"""Contracts 5, 7, 9, 10, 11, 12, 15 and 16 over random layouts, paddings, cuts, budgets and methods."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import judge
import oracle
import strategies
import tiny
import tokenprune
from strategies import LAYERS, Budget, Case
from tokenprune.budget import Cut, average_kept, plan_counts
from tokenprune.methods import Grid, ImageTokens, Random

# A budget may round to every token of every image; the library then says so (tested elsewhere).
pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.NothingPrunedWarning")
STEPS = 3

# What `@example` starts from: a shrunk case, nothing in it but what is said.
PLAIN = Case(
    family="llava-llama",
    attention="sdpa",
    rows=(("image",),),
    pad="left",
    extra=0,
    mask=True,
    seed=0,
    method="uniform",
    parameters=(),
    cuts=((0, 1),),
    keep=None,
    budget="average",
)


def run(case: Case, inputs: dict[str, Any], **changes: Any) -> tuple[Any, tokenprune.Report]:
    """A pruned prefill."""
    with tokenprune.pruned(case.model, **{**case.arguments(), **changes}), torch.no_grad():
        return case.model(**inputs), tokenprune.report(case.model)


def real_columns(inputs: dict[str, Any]) -> torch.Tensor:
    """(B, L) False at padding."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def wanted_counts(case: Case, inputs: dict[str, Any]) -> list[list[list[int]]]:
    """[row][image] -> tokens after each cut, from the layout and the budget alone."""
    return [[case.counts(len(image)) for image in row] for row in tiny.visual_positions(case.model, inputs)]


def index_of(report: tokenprune.Report, inputs: dict[str, Any]) -> torch.Tensor:
    if report.index is not None:
        return report.index
    return torch.arange(inputs["input_ids"].shape[1]).expand(inputs["input_ids"].shape[0], -1)


def by_column(
    logits: torch.Tensor, index: torch.Tensor, real: torch.Tensor
) -> dict[tuple[int, int], torch.Tensor]:
    """(row, column) -> logits, at kept positions that are no padding."""
    return {
        (r, c): logits[r, place]
        for r, columns in enumerate(index.tolist())
        for place, c in enumerate(columns)
        if c >= 0 and real[r, c]
    }


def worst(a: dict[Any, torch.Tensor], b: dict[Any, torch.Tensor]) -> float:
    """Largest difference over the keys of `a`, all of which `b` must have; NaN counts as infinite."""
    both = [torch.stack([x[key] for key in a]) for x in (a, b)] if a else [torch.zeros(1)] * 2
    return float((both[0] - both[1]).abs().nan_to_num(float("inf")).max())


def check_lists(case: Case, inputs: dict[str, Any], report: tokenprune.Report) -> None:
    """The keep lists have the sizes the budget says, ascend, and are nested."""
    counts = wanted_counts(case, inputs)
    images = tiny.visual_positions(case.model, inputs)
    assert report.pruned == any(
        c[-1] < len(x) for row, own in zip(images, counts, strict=True) for x, c in zip(row, own, strict=True)
    )
    if not report.pruned:
        return
    for r, row in enumerate(images):
        for i, columns in enumerate(row):
            lists = [cut[r][i] for cut in report.keep_lists]
            assert [len(kept) for kept in lists] == counts[r][i]
            assert all(a < b for kept in lists for a, b in pairwise(kept))
            assert all(set(b) <= set(a) for a, b in pairwise([range(len(columns)), *lists]))


def check_index(case: Case, inputs: dict[str, Any], report: tokenprune.Report) -> None:
    """Contract 12: which columns are left, in order, right-aligned."""
    if report.index is None:
        assert not report.pruned
        return
    real, length = real_columns(inputs), inputs["input_ids"].shape[1]
    for r, row in enumerate(tiny.visual_positions(case.model, inputs)):
        index = report.index[r].tolist()
        columns = [c for c in index if c >= 0]
        assert index == [-1] * (len(index) - len(columns)) + columns
        kept = [int(x[k]) for x, own in zip(row, report.keep_lists[-1][r], strict=True) for k in own]
        gone = {int(c) for x in row for c in x} - set(kept)
        assert [c for c in columns if real[r, c]] == [
            c for c in range(length) if real[r, c] and c not in gone
        ]
        after = max((int(x[-1]) for x in row), default=-1) + 1
        if row:
            assert index[len(index) - (length - after) :] == list(range(after, length))


def check_prefill(case: Case) -> None:
    inputs = case.inputs()
    out, report = run(case, inputs)
    check_lists(case, inputs, report)
    check_index(case, inputs, report)
    if not report.pruned:
        with torch.no_grad():
            assert torch.equal(out.logits, case.model(**inputs).logits)  # contract 8
        return
    positions = tiny.visual_positions(case.model, inputs)
    judged = oracle.masked_forward(
        case.model, inputs, judge.cuts_of(report), positions, judge.merges_of(report, positions)
    ).logits
    assert report.index is not None and out.logits.shape[1] == report.index.shape[1]
    difference = judge.difference_at(report.index, out.logits, judged, inputs.get("attention_mask"))
    assert difference <= judge.TOLERANCE


@given(case=strategies.cases())
def test_prefill_equals_the_oracle(case: Case) -> None:
    """Contract 7 and 12."""
    check_prefill(case)


@given(case=strategies.cases(strategies.merges()))
def test_merges_equal_the_oracle(case: Case) -> None:
    """Contract 7: merges at any cut, before the LLM included."""
    check_prefill(case)


@given(case=strategies.cases(left_only=True))
@example(case=PLAIN)  # the prompt's last token is dropped
def test_generate_equals_the_oracle(case: Case) -> None:
    """Contract 7 and 11: greedy, at every decoded token."""
    inputs = case.inputs()
    options = {
        "do_sample": False,
        "max_new_tokens": STEPS,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    with tokenprune.pruned(case.model, **case.arguments()):
        out = case.model.generate(**inputs, **options)
        report = tokenprune.report(case.model)
    check_lists(case, inputs, report)
    generated = out.sequences[:, inputs["input_ids"].shape[1] :]
    positions = tiny.visual_positions(case.model, inputs)
    cuts = judge.cuts_of(report) if report.pruned else []
    oracled = oracle.masked_forward(
        case.model, inputs, cuts, positions, generated=generated, positions="generate"
    )
    judged = oracled.steps().clone()
    # A prompt may end with an image, and its last token be dropped: the first answer comes from the last one kept.
    rows, last = torch.arange(len(case.rows)), index_of(report, inputs)[:, -1]
    judged[:, 0] = oracled.logits[rows, last]
    logits = torch.stack(out.logits, dim=1)
    assert logits.shape[1] == generated.shape[1] == STEPS
    assert float((logits - judged).abs().nan_to_num(float("inf")).max()) <= judge.TOLERANCE
    # The same token, except where the oracle itself is undecided.
    allowed = judged[..., tiny.FIRST_TEXT_ID :]
    chosen = judged.gather(2, generated[..., None])[..., 0]
    assert (allowed.amax(-1) - chosen <= 2 * judge.TOLERANCE).all()


@given(case=strategies.cases(), which=st.integers(0, 3), override=st.booleans())
def test_forced_lists_and_batch_one(case: Case, which: int, override: bool) -> None:
    """Contract 10: lists from a report make the same call again, and each row is what it would be alone."""
    inputs = case.inputs()
    out, report = run(case, inputs)
    if not report.pruned:
        return
    if override:
        with tokenprune.pruned(case.model, **case.arguments()), torch.no_grad():
            with tokenprune.override(case.model, keep_lists=report.keep_lists):
                again, forced = case.model(**inputs), tokenprune.report(case.model)
    else:
        again, forced = run(case, inputs, keep_lists=report.keep_lists)
    assert forced.keep_lists == report.keep_lists and torch.equal(again.logits, out.logits)
    assert report.index is not None and forced.index is not None and torch.equal(forced.index, report.index)

    row = which % len(case.rows)
    alone = tiny.inputs(case.model, [case.rows[row]], seed=case.seed + row)
    solo, solo_report = run(case, alone, keep_lists=[[cut[row]] for cut in report.keep_lists])
    real = real_columns(inputs)
    offset = int(real[row].int().argmax())
    own = {key: x for key, x in by_column(out.logits, report.index, real).items() if key[0] == row}
    single = by_column(solo.logits, index_of(solo_report, alone), real_columns(alone))
    assert len(single) == len(own)
    assert worst(own, {(row, c + offset): x for (_, c), x in single.items()}) <= judge.TOLERANCE


@given(plan=strategies.plans())
@example(plan=Budget(2, 2, ((0, 1), (1, None)), 2, "average"))  # all of it, after a cut that took half
def test_budgets(plan: Budget) -> None:
    """Contract 15, against exact fractions."""
    wanted = strategies.counts_of(plan.n, plan.layers, plan.cuts, plan.keep, plan.budget)

    def typed(share: strategies.Share | None) -> float | int | None:
        return float(share) if isinstance(share, Fraction) else share

    cuts = [Cut(layer, typed(share)) for layer, share in plan.cuts]
    if wanted is None:
        with pytest.raises(tokenprune.BudgetError):
            plan_counts(plan.n, plan.layers, cuts, typed(plan.keep), plan.budget)
        return
    counts = plan_counts(plan.n, plan.layers, cuts, typed(plan.keep), plan.budget)
    assert counts == wanted
    assert all(1 <= b <= a for a, b in pairwise([plan.n, *counts]))
    if plan.keep is None:
        return
    target = plan.keep * plan.n if isinstance(plan.keep, Fraction) else min(plan.keep, plan.n)
    met = average_kept(plan.n, plan.layers, cuts, counts) if plan.budget == "average" else counts[-1]
    assert abs(met - target) < 1
    if plan.budget == "average" and len(cuts) == 1 and plan.n > 1 and target >= 1:
        # the reachable range as the contract writes it
        layer = cuts[0].layer
        assert target * plan.layers >= layer * plan.n + plan.layers - layer


@given(case=strategies.cases(), place=st.integers(0, 999))
def test_later_changes_change_nothing_earlier(case: Case, place: int) -> None:
    """Contract 9: with the lists held fixed; and text after the last image has no say in them."""
    inputs = case.inputs()
    out, report = run(case, inputs)
    real, images = real_columns(inputs), tiny.visual_positions(case.model, inputs)
    texts = [(r, c) for r, c in real.nonzero().tolist() if inputs["input_ids"][r, c] >= tiny.FIRST_TEXT_ID]
    pixels = [(r, i) for r, row in enumerate(images) for i in range(len(row))]
    changed = dict(inputs)
    chosen = place % (len(texts) + len(pixels))
    if chosen < len(texts):
        row, column = texts[chosen]
        last = max((int(image[-1]) for image in images[row]), default=-1)
        changed["input_ids"] = inputs["input_ids"].clone()
        changed["input_ids"][row, column] = tiny.FIRST_TEXT_ID + (
            int(inputs["input_ids"][row, column]) - tiny.FIRST_TEXT_ID + 1
        ) % (tiny.VOCAB - tiny.FIRST_TEXT_ID)
    else:
        row, image = pixels[chosen - len(texts)]
        column, last = int(images[row][image][0]), len(inputs["input_ids"][row])
        order = pixels.index((row, image))
        grids = inputs.get("image_grid_thw")
        sizes = [1] * len(pixels) if grids is None else grids.prod(-1).tolist()
        parts = list(inputs["pixel_values"].split(sizes))
        parts[order] = 0.5 - parts[order]
        changed["pixel_values"] = torch.cat(parts)
    if not report.pruned or column > last:
        again, second = run(case, changed)
        assert second.keep_lists == report.keep_lists
    else:
        again, second = run(case, changed, keep_lists=report.keep_lists)
    before = by_column(out.logits, index_of(report, inputs), real)
    after = by_column(again.logits, index_of(second, inputs), real)
    earlier = {key: x for key, x in before.items() if key[0] != row or key[1] < column}
    assert worst(earlier, after) <= 1e-6
    # or the test would see nothing
    same = [key for key in before if key[0] == row and key[1] >= column]
    assert any(not torch.equal(before[key], after[key]) for key in same) or not same


@given(case=strategies.cases())
@example(case=replace(PLAIN, rows=(("text:1",),)))  # one token: a prompt, not a decoding step
@example(case=replace(PLAIN, rows=(("text:2",),)))  # nothing to prune, and yet a cache to report
def test_cache_lengths(case: Case) -> None:
    """Contract 5: the cache's own tensors hold what the budget says, layer by layer."""
    inputs = case.inputs()
    with tokenprune.pruned(case.model, **case.arguments()), torch.no_grad():
        cache = case.model(**inputs, use_cache=True).past_key_values
        report = tokenprune.report(case.model)
    length = inputs["input_ids"].shape[1]
    counts, images = wanted_counts(case, inputs), tiny.visual_positions(case.model, inputs)
    left = real_columns(inputs).int().argmax(1).tolist()  # left padding goes, right padding stays
    assert len(cache.layers) == LAYERS
    for i, layer in enumerate(cache.layers):
        cut = sum(where <= i for where, _ in case.cuts) - 1
        wanted = length
        if cut >= 0 and report.pruned:
            rows = zip(images, counts, left, strict=True)
            wanted = max(
                length - gap - sum(map(len, own)) + sum(kept[cut] for kept in count)
                for own, count, gap in rows
            )
        assert layer.keys.shape[-2] == layer.values.shape[-2] == report.layers[i].length == wanted
        assert report.layers[i].kv_used == layer.keys.nbytes + layer.values.nbytes


@given(
    case=strategies.cases(st.integers(0, 99).map(lambda seed: ("random", (("seed", seed),)))),
    order=st.permutations(range(4)),
    batch=st.integers(1, 4),
    pad=st.sampled_from(("left", "right")),
    extra=st.integers(0, 2),
)
def test_random_does_not_see_the_batch(
    case: Case, order: list[int], batch: int, pad: str, extra: int
) -> None:
    """Contract 16: a row keeps the same tokens in any company, place and padding."""
    _, report = run(case, case.inputs())
    rows = [r for r in order if r < len(case.rows)][:batch]
    samples = [tiny.inputs(case.model, [case.rows[r]], seed=case.seed + r) for r in rows]
    _, again = run(case, strategies.collate(samples, pad, extra))
    if report.pruned and again.pruned:  # not so in a batch in which every image is a single token
        for cut, other in zip(report.keep_lists, again.keep_lists, strict=True):
            assert other == [cut[r] for r in rows]


@given(
    digest=st.integers(-(2**63), 2**63 - 1),
    seeds=st.lists(st.integers(0, 2**32), min_size=2, max_size=2, unique=True),
    n=st.integers(64, 600),
    share=st.floats(0.25, 0.75),
)
def test_random_draws_again_for_another_seed(digest: int, seeds: list[int], n: int, share: float) -> None:
    """Contract 16. Two draws of 16 or more of 64 or more tokens agree by chance once in 10^14 times."""
    image = ImageTokens(n, torch.arange(n), (Grid(1, 1, n),), digest=torch.tensor(digest))
    first, second = (Random(seed).select(image, int(share * n)).keep for seed in seeds)
    assert len(first) == len(second) and not torch.equal(first, second)
