"""Budgets that follow the picture: the rules by hand, their calibration, and a runtime that carries them out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import judge
import tiny
import tokenprune
from tokenprune import Adaptive, ConfigError, Escalate, Profile, calibrate, calibrate_escalation
from tokenprune.adaptive import RULES, statistic
from tokenprune.analysis.budgets import mean_share, read_pictures
from tokenprune.budget import Cut, plan_counts
from tokenprune.models import find_family
from tokenprune.printed import is_print
from tokenprune_testbed.pages import make_page

FAMILIES = {"llava": tiny.llava, "qwen2_5_vl": tiny.qwen2_5_vl, "internvl": tiny.internvl}


def calls(model: Any, count: int = 6) -> list[Any]:
    return [tiny.inputs(model, [["text:3", "image", "text:4"]], seed=i) for i in range(count)]


# -- the rules, by hand -----------------------------------------------------------------------------------------------


def test_energy_by_hand() -> None:
    """Singular values 3, 2, 1: their squares hold 9/14, 13/14, 14/14 of the sum."""
    x = torch.zeros(5, 7)
    x[0, 3], x[2, 1], x[4, 6] = 3.0, 2.0, -1.0
    for tau, k in ((0.1, 1), (9 / 14 - 0.01, 1), (9 / 14 + 0.01, 2), (13 / 14 + 0.01, 3), (1.0, 3)):
        assert float(Adaptive(0.5, "energy", tau).share(x)) == pytest.approx(k / 5), tau


def test_rank_and_grey_by_hand() -> None:
    x = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert float(Adaptive(0.5, "rank", 0.5).share(x)) == pytest.approx(
        0.5 * 3 / 4
    )  # three equal directions of four
    bits = torch.tensor([0.0, 4.0, 8.0, 8.0])
    assert float(Adaptive(0.5, "grey", 0.6).share(bits)) == pytest.approx(0.6 * 5 / 8)


def test_spectra_against_float64() -> None:
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        0.8 ** torch.arange(24.0)
    )
    squares = np.linalg.svd(x.double().numpy(), compute_uv=False) ** 2
    held = statistic("energy", x)
    assert held.shape == (40,) and np.allclose(held[:24], np.cumsum(squares) / squares.sum(), atol=1e-5)
    p = squares / squares.sum()
    assert float(statistic("rank", x)) == pytest.approx(math.exp(-(p * np.log(p)).sum()) / 40, rel=1e-4)
    many = torch.randn(3000, 8)
    assert len(statistic("energy", many)) == 1024


def test_bounds_and_numbers_that_are_none() -> None:
    budget = Adaptive(0.3, "rank", 1.0, low=0.1, high=0.6)
    assert [budget.bounded(x) for x in (0.0, 0.2, 5.0, math.nan)] == [0.1, 0.2, 0.6, 0.3]
    assert Adaptive(0.3, "rank", 1.0).bounded(0.0) > 0


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"mean": 0.0}, "have to be in this order"),
        ({"mean": 1.5}, "mean must be a share"),
        ({"mean": True}, "mean must be a share"),
        ({"mean": 0.2, "low": 0.3}, "have to be in this order"),
        ({"mean": 0.2, "rule": "size"}, "rule must be one of"),
        ({"mean": 0.2, "tau": -1.0}, "tau must be a number above 0"),
        ({"mean": 0.2, "tau": 1.5}, "at most 1"),
        ({"mean": 0.2, "tau": math.nan, "rule": "rank"}, "tau must be a number above 0"),
    ],
)
def test_wrong_budgets(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Adaptive(**given)


# -- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_calibration_meets_the_mean(rule: Any) -> None:
    model = tiny.llava()
    for mean, low, high in ((0.3, 0.0, 1.0), (0.2, 0.1, 0.5)):
        asked = Adaptive(mean, rule, low=low, high=high)
        found = calibrate(model, calls(model, 12), asked)
        assert found.tau is not None and (found.mean, found.rule, found.low) == (mean, rule, low)
        shares = mean_share(asked, read_pictures(model, calls(model, 12), asked), found.tau)
        # "energy" is a whole number of singular values of 25 tokens' features, all alike here: random weights.
        assert shares == pytest.approx(mean, abs=0.05)
    assert not tokenprune.is_wrapped(model)
    with pytest.raises(ConfigError, match="no pictures"):
        calibrate(model, [], Adaptive(0.3))


# -- carried out ------------------------------------------------------------------------------------------------------


def budget_for(model: Any, rule: Any, mean: float = 0.4) -> Adaptive:
    return calibrate(model, calls(model), Adaptive(mean, rule, low=0.1, high=0.9))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_picture_keeps_what_its_rule_says(name: str, rule: Any) -> None:
    model = FAMILIES[name]()
    budget = budget_for(model, rule)
    rows = [["text:3", "image", "text:2", "image", "text:4"], ["image", "text:2"], ["text:5"]]
    inputs = tiny.inputs(model, rows, seed=5)
    layers, cuts = 6, [(0, 0.5), (2, 0.4), (4, None)]
    with tokenprune.pruned(model, "uniform", keep=budget, cuts=cuts), torch.no_grad():
        model(**inputs)
        report = tokenprune.report(model)
    for image in report.images:
        share = image.average / image.tokens
        assert 0.1 - 1 / image.tokens <= share <= 0.9 + 1e-6
        assert list(image.kept) == sorted(image.kept, reverse=True)
    shares = [
        budget.bounded(float(budget.told(one, budget.tau or 0)))
        for one in read_pictures(model, [inputs], budget)
    ]
    for image, share in zip(report.images, shares, strict=True):
        scaled = [0.5, 0.4]
        if share < 0.4:
            scaled = [s * share / 0.4 for s in scaled]
        else:
            scaled = [1 - (1 - s) * (1 - share) / 0.6 for s in scaled]
        wanted = plan_counts(
            image.tokens, layers, [Cut(0, scaled[0]), Cut(2, scaled[1]), Cut(4)], share, nearest=True
        )
        assert list(image.kept) == wanted, (share, image)


@pytest.mark.parametrize("method", ["vflowopt", "entropyprune", "fastv", "merge"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_oracle_agrees(name: str, method: str) -> None:
    model = FAMILIES[name]()
    budget = budget_for(model, "rank")
    inputs = tiny.inputs(model, [row for row in judge.ROWS if name != "internvl" or row], pad="left")
    settings = {"keep": budget, **({} if method in ("vflowopt", "merge") else {"layer": 1})}
    difference, _, report = judge.generate_difference(
        model, inputs, {"max_new_tokens": 4, "do_sample": False}, method=method, **settings
    )
    assert difference <= judge.tolerance(model)
    assert len({image.kept for image in report.images}) > 1 or name == "llava"


def test_a_video_and_stages() -> None:
    model = tiny.qwen2_5_vl()
    budget = budget_for(model, "energy")
    inputs = tiny.inputs(model, [["text:3", "video", "text:2", "image", "text:4"]])
    stages = [(0, "divprune", 0.5), (3, "fastv")]
    assert judge.prefill_difference(model, inputs, stages=stages, keep=budget) <= judge.TOLERANCE


def test_grey_beside_a_method_that_reads_pixels_itself() -> None:
    """The method sees what it would have seen without."""
    model = tiny.llava()
    inputs = tiny.inputs(model, [["text:3", "image", "text:4"]])
    budget = Adaptive(0.4, "grey", 10.0, low=0.4, high=0.4)  # every picture the same
    kept = []
    for keep in (0.4, budget):
        with tokenprune.pruned(model, "importance", alpha=0.7, layer=0, keep=keep), torch.no_grad():
            model.generate(**inputs, max_new_tokens=2)
            kept.append(tokenprune.report(model).keep_lists)
    assert kept[0] == kept[1]


def test_what_cannot_be_combined_is_refused_and_an_override_replaces_it() -> None:
    model = tiny.llava()
    budget = budget_for(model, "rank")
    for arguments, text in (
        ({"keep": Adaptive(0.3)}, r"no tau yet: tokenprune\.calibrate"),
        ({"keep": budget, "allocation": "pooled", "method": "random"}, "image by image"),
        ({"keep": budget, "cuts": [(0, 12), (2, None)]}, "give the cuts shares"),
        ({"keep": budget, "method": "prumerge", "adaptive": True}, "settles counts itself"),
        ({"keep": 0.2, "adaptive_keep": budget}, "keep is the Adaptive's mean"),
    ):
        with pytest.raises(ConfigError, match=text):
            tokenprune.wrap(model, **{"method": "uniform", **arguments})
        assert not tokenprune.is_wrapped(model)
    inputs = tiny.inputs(model, [["text:3", "image", "text:4"]])
    with tokenprune.pruned(model, "uniform", keep=budget, layer=0), torch.no_grad():
        with tokenprune.override(model, keep=0.2):
            model(**inputs)
            assert tokenprune.report(model).images[0].kept == (5,)
        with tokenprune.override(model, layer=2):  # the budget stays
            model(**inputs)
            assert tokenprune.report(model).keep == budget.mean


def test_a_profile_keeps_it(tmp_path: Any) -> None:
    model = tiny.llava()
    budget = budget_for(model, "energy", 0.4)
    own = {"rule": "energy", "tau": budget.tau, "low": 0.1, "high": 0.9}
    profile = Profile(method="uniform", cuts=({"layer": 0},), keep=0.4, model="", adaptive=own)
    path = profile.save(tmp_path / "p.json")
    assert Profile.load(path).adaptive == profile.adaptive
    plain = Profile(method="uniform", keep=0.4)
    assert (
        "adaptive" not in plain.model_dump(exclude_none=True)
        and plain.content_hash() != profile.content_hash()
    )
    inputs = tiny.inputs(model, [["image", "text:3", "image", "text:2"]])
    kept = []
    for arguments in (
        {"profile": path, "allow_mismatch": True},
        {"method": "uniform", "layer": 0, "keep": budget},
    ):
        with tokenprune.pruned(model, **arguments), torch.no_grad():
            model(**inputs)
            kept.append(tokenprune.report(model).keep_lists)
    assert kept[0] == kept[1]
    with tokenprune.pruned(model, profile=path, allow_mismatch=True, keep=0.2), torch.no_grad():
        model(**inputs)
        assert {i.kept for i in tokenprune.report(model).images} == {
            (5,)
        }  # another mean is not what it was made for


# -- escalation -------------------------------------------------------------------------------------------------------


def entropies(model: Any, inputs: Any, **settings: Any) -> list[float]:
    with tokenprune.pruned(model, **settings), torch.no_grad():
        logits = model(**inputs, logits_to_keep=1).logits[:, -1].double()
    log = logits.log_softmax(-1)
    return (-(log.exp() * log).sum(-1)).tolist()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_5", "internvl", "smolvlm"])
@pytest.mark.parametrize(
    "settings", [{"method": "vflowopt"}, {"method": "entropyprune", "layer": 2, "source": "hidden"}]
)
def test_unsure_rows_are_done_again_and_no_others(family: str, settings: dict[str, Any]) -> None:
    model = tiny.build(family)
    rows = [
        ["text:3", "image", "text:4"],
        ["image", "text:9"],
        ["text:5"],
        ["text:2", "image", "image", "text:3"],
    ]
    inputs = tiny.inputs(model, rows, pad="left")
    settings = {**settings, "keep": 0.45}
    found = entropies(model, inputs, **settings)
    visual = [found[r] for r in (0, 1, 3)]
    limit = sum(sorted(visual)[1:]) / 2  # below one of three
    with tokenprune.pruned(model, **settings), torch.no_grad():
        model(**inputs)
        before = tokenprune.report(model)
    difference, _, report = judge.generate_difference(
        model, inputs, {"max_new_tokens": 4, "do_sample": False}, escalate=(0.8, limit), **settings
    )
    assert difference <= judge.tolerance(model)
    unsure = found.index(max(visual))
    for old, new in zip(before.images, report.images, strict=True):
        assert (new.row == unsure) == any("prefilled again" in note for note in new.notes)
        if new.row == unsure:
            assert new.kept[-1] > old.kept[-1]
        else:
            assert new.kept == old.kept


def test_sure_prompts_cost_nothing_more() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, [["text:3", "image", "text:4"]])
    settings = {"method": "uniform", "layer": 0, "keep": 0.3}
    outputs = []
    for more in ({}, {"escalate": Escalate(0.8, 50.0)}):
        with tokenprune.pruned(model, **settings, **more), torch.no_grad():
            outputs.append(model(**inputs).logits)
            assert tokenprune.report(model, total=True).prompts == 1
    assert torch.equal(*outputs)


def test_later_turns_go_on_with_what_was_done_again() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, [["text:3", "image", "text:4"]])
    settings = {"method": "uniform", "layer": 2, "keep": 0.5}
    with tokenprune.pruned(model, **settings, escalate=(0.9, 0.0)):
        first = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        kept = tokenprune.report(model).keep_lists
        ids = torch.cat([first.sequences, torch.tensor([[20, 21, 22]])], dim=1)
        cache = first.past_key_values
        both = [
            model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=3, do_sample=False).tolist()
        ]
    with tokenprune.pruned(model, **{**settings, "keep": 0.9}):
        first = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        assert tokenprune.report(model).keep_lists == kept
        cache = first.past_key_values
        both.append(
            model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=3, do_sample=False).tolist()
        )
    assert both[0] == both[1]


@pytest.mark.parametrize(
    "given", [lambda model: DynamicCache(), lambda model: DynamicCache(config=model.config.text_config)]
)
def test_a_cache_of_the_users_own_is_filled_anew(given: Any) -> None:
    model = tiny.llava("mistral", sliding_window=16)
    inputs = tiny.inputs(model, [["text:3", "image", "text:4"]])
    settings = {"method": "uniform", "layer": 2}
    filled = []
    for more in ({"keep": 0.5, "escalate": (0.9, 0.0)}, {"keep": 0.9}):
        cache = given(model)
        with tokenprune.pruned(model, **settings, **more), torch.no_grad():
            out = model(**inputs, past_key_values=cache)
            assert out.past_key_values is cache
            step = model(
                input_ids=torch.tensor([[20]]),
                attention_mask=torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long),
                past_key_values=cache,
            )
        filled.append([out.logits, step.logits, *(layer.keys for layer in cache.layers)])
    for one, other in zip(*filled, strict=True):
        torch.testing.assert_close(one, other)


def test_what_cannot_be_escalated_is_refused_before_any_change() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, [["text:3", "image", "text:4"]])
    for arguments, text in (
        ({"escalate": (0.2, 1.0)}, "from a smaller share to a larger one"),
        ({"escalate": (2, 1.0)}, "a share in"),
        ({"escalate": (0.5, -1.0)}, "an entropy in nats"),
        ({"escalate": 0.5}, "takes .keep, entropy."),
        ({"escalate": (0.5, 1.0), "allocation": "pooled"}, "row by row"),
    ):
        with pytest.raises(ConfigError, match=text):
            tokenprune.wrap(model, "uniform", keep=0.3, layer=0, **arguments)
    with tokenprune.pruned(model, "uniform", keep=0.3, layer=0, escalate=(0.8, 0.0)):
        with pytest.raises(tokenprune.UnsupportedModeError, match="cannot be emptied"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        with tokenprune.override(model, keep=0.2):  # a new budget is a plain one
            model.generate(**inputs, max_new_tokens=2)
            assert tokenprune.report(model, total=True).prompts == 1


def test_the_threshold_of_a_share() -> None:
    model = tiny.llava()
    settings = {"method": "uniform", "layer": 0, "keep": 0.3}
    found = calibrate_escalation(model, calls(model, 10), 0.3, 0.6, **settings)
    above = [e for c in calls(model, 10) for e in entropies(model, c, **settings) if e > found.entropy + 1e-6]
    assert found.keep == 0.6 and len(above) == 3
    assert tokenprune.Arguments.from_text({"keep": "30%", "escalate": "60%@1.5"}).escalate == Escalate(
        0.6, 1.5
    )
    for wrong in ("60%", "60%@x", "2@1.0"):
        with pytest.raises(ConfigError, match=r"such as 33%@1\.5|a share in"):
            tokenprune.Arguments.from_text({"keep": "30%", "escalate": wrong})


def test_an_adaptive_budget_as_text() -> None:
    read = tokenprune.Arguments.from_text({"keep": "25%~rank@4.5~8%~75%"})
    assert read.adaptive_keep == Adaptive(0.25, "rank", 4.5, 0.08, 0.75) and read.keep == 0.25
    assert tokenprune.Arguments.from_text({"keep": "0.5~energy@0.9"}).adaptive_keep == Adaptive(
        0.5, "energy", 0.9
    )
    for wrong in ("25%~rank", "25%~rank@4~8%", "25%~size@1", "25%~rank@x"):
        with pytest.raises(ConfigError):
            tokenprune.Arguments.from_text({"keep": wrong})


# -- the guard for text -----------------------------------------------------------------------------------------------


def print_and_noise(model: Any) -> dict[str, Any]:
    """Two pictures' pixels, normalised as the family's are: a piece of a page, and a smooth shade."""
    inputs = tiny.inputs(model, [["text:2", "image", "text:2", "image", "text:3"]])
    mean, deviation = find_family(model).pixel_scale()
    side = inputs["pixel_values"].shape[-1]
    page = make_page(np.random.default_rng(0), numbers=1.0).image[:side, :side]
    page = torch.from_numpy(page.copy()).permute(2, 0, 1).float() / 255
    shade = torch.linspace(0.3, 0.6, side)[:, None] * torch.tensor([1.0, 0.8, 0.5])[:, None, None]
    raw = torch.stack([page, shade.expand(3, side, side)])
    scale = torch.tensor(mean)[:, None, None], torch.tensor(deviation)[:, None, None]
    inputs["pixel_values"] = (raw - scale[0]) / scale[1]
    return inputs


@pytest.mark.parametrize("method", ["uniform", "importance"])
def test_print_keeps_its_floor_and_photographs_do_not(method: str) -> None:
    model = tiny.llava()
    inputs = print_and_noise(model)
    settings: dict[str, Any] = {"method": method, "layer": 0, "keep": 0.2}
    settings |= {"alpha": 0.5} if method == "importance" else {}
    with tokenprune.pruned(model, **settings, text_floor=0.6), torch.no_grad():
        model.generate(**inputs, max_new_tokens=2)
        page, photograph = tokenprune.report(model).images
        assert page.kept == (15,) and any("dense print" in note for note in page.notes)
        assert photograph.kept == (5,) and not photograph.notes
        with tokenprune.override(model, keep=0.2):
            model(**inputs)
            assert {i.kept for i in tokenprune.report(model).images} == {(5,)}
    difference = judge.prefill_difference(model, inputs, **settings, text_floor=0.6)
    assert difference <= judge.TOLERANCE


def test_pages_and_photographs_are_told_apart() -> None:
    guard = pytest.importorskip("tokenprune_eval.studies.guard")
    pytest.importorskip("skimage")
    wrong = [
        kind
        for kind, picture in guard.pictures(1, 40, seed=3)
        if (kind in guard.PRINT) != (float(is_print(guard.judged(kind, picture))) > 0.5)
    ]
    assert len(wrong) <= 2, wrong


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"text_floor": 2}, "a share in"),
        ({"text_floor": 0.5, "keep": 12}, "give keep a share"),
        ({"text_floor": 0.5, "allocation": "pooled"}, "image by image"),
        ({"text_floor": 0.5, "keep": None, "cuts": [(0, 0.5)]}, "say keep, as a share"),
        ({"escalate": (0.5, 1.0), "keep": None, "cuts": [(0, 0.5)]}, "say keep, as a share"),
    ],
)
def test_wrong_floors(arguments: dict[str, Any], text: str) -> None:
    model = tiny.llava()
    with pytest.raises(ConfigError, match=text):
        tokenprune.wrap(model, **{"method": "uniform", "keep": 0.2, **arguments})


def test_they_are_arms_of_a_comparison() -> None:
    from tokenprune.compare.arms import make_arms, read_methods

    texts = ["vflowopt", "vflowopt,text_floor=60%", "vflowopt,escalate=50%@1.5"]
    read = read_methods(texts)
    assert read[texts[1]]["text_floor"] == 0.6 and read[texts[2]]["escalate"] == Escalate(0.5, 1.5)
    arms = make_arms(tiny.llava(), texts, [0.25], 6)
    assert [arm.arguments["keep"] for arm in arms if arm.name in texts] == [0.25] * 3
