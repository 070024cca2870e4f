"""`compact_early`: layers before the cut let go of dropped tokens after the prompt; judged by the masked oracle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import judge
import limits
import oracle
import tiny
import tokenprune
from tokenprune_kernels.kv_compact import kv_compact

FAMILIES = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl", "llama4"]
FAMILIES = [name for name in FAMILIES if name in tiny.FAMILIES]
CUTS: dict[str, dict[str, Any]] = {
    "layer2": {"method": "entropyprune", "layer": 2, "keep": 0.5},
    "two": {"method": "random", "cuts": [(2, 0.7), (3, 0.3)]},
    "merged": {"method": "vflowopt", "cuts": [(2, 0.7), (3, 0.4)]},
}
ONE, RAGGED = judge.ROWS[:1], judge.ROWS


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def attention(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, attention: str) -> Any:
    return tiny.FAMILIES[request.param](attn_implementation=attention)


@pytest.mark.parametrize("cut", ["layer2", "two"])
@pytest.mark.parametrize("rows", [ONE, RAGGED], ids=["batch1", "ragged4"])
def test_greedy(model: Any, cut: str, rows: Any) -> None:
    inputs = tiny.inputs(model, rows, pad="left")
    options = {"do_sample": False, "max_new_tokens": 5}
    difference, _, _ = judge.generate_difference(model, inputs, options, compact_early=True, **CUTS[cut])
    assert difference <= judge.tolerance(model)


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 4}, 3),
        ({"num_beams": 3, "do_sample": False, "max_new_tokens": 5}, 1),
        ({"prompt_lookup_num_tokens": 3, "do_sample": False, "max_new_tokens": 8}, 1),
        ({"cache_implementation": "static", "do_sample": False, "max_new_tokens": 4}, 1),
    ],
    ids=["sampling", "beams", "prompt_lookup", "static"],
)
@pytest.mark.parametrize("cut", ["layer2", "two"])
def test_modes(model: Any, cut: str, options: dict[str, Any], times: int) -> None:
    limits.check(model, options)
    rows = ONE if {"prompt_lookup_num_tokens", "num_beams"} & options.keys() else RAGGED
    if times > 1 or "num_beams" in options:
        rows = limits.expandable(model, rows)
    inputs = tiny.inputs(model, rows, pad="left")
    torch.manual_seed(0)
    if "num_beams" not in options:
        difference, _, _ = judge.generate_difference(
            model, inputs, options, times, compact_early=True, **CUTS[cut]
        )
        assert difference <= judge.tolerance(model)
        return
    with tokenprune.pruned(model, compact_early=True, **CUTS[cut]):
        out = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)
        report = tokenprune.report(model)
    positions, prompt = tiny.visual_positions(model, inputs), inputs["input_ids"].shape[1]
    judged = oracle.masked_forward(
        model,
        inputs,
        [(layer, lists[:: options["num_beams"]]) for layer, lists in judge.cuts_of(report)],
        positions,
        generated=out.sequences[:, prompt:],
        positions="generate",
        early=[[prompt] * len(row) for row in positions],
    ).steps()
    assert judge.judged_beams(out, judged) <= judge.tolerance(model)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_merges_and_static_cache(static: bool) -> None:
    model = tiny.llava()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
    if static:
        options["cache_implementation"] = "static"
    for rows in (ONE, RAGGED):
        inputs = tiny.inputs(model, rows, pad="left")
        difference, _, report = judge.generate_difference(
            model, inputs, options, compact_early=True, **CUTS["merged"]
        )
        assert any(report.merges) and difference <= judge.tolerance(model)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_judge_can_tell(name: str) -> None:
    """Without `compact_early` the same answer differs: the early layers' dropped columns do count."""
    model = tiny.FAMILIES[name]()
    inputs = tiny.inputs(model, ONE)
    with tokenprune.pruned(model, **CUTS["layer2"]):
        options = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True}
        out = model.generate(**inputs, output_logits=True, **options)
        report = tokenprune.report(model)
    positions, prompt = tiny.visual_positions(model, inputs), inputs["input_ids"].shape[1]
    judged = [
        oracle.masked_forward(
            model,
            inputs,
            judge.cuts_of(report),
            positions,
            generated=out.sequences[:, prompt:],
            positions="generate",
            early=early,
        ).steps()
        for early in (None, [[prompt] * len(row) for row in positions])
    ]
    logits = torch.stack(out.logits, 1)
    whole, early = (float((logits - own).abs().max()) for own in judged)
    assert whole <= judge.tolerance(model) < early


@pytest.mark.parametrize("rows", [ONE, RAGGED], ids=["batch1", "ragged4"])
@pytest.mark.parametrize("copied", [False, True])
def test_later_turn(rows: Any, copied: bool) -> None:
    """A question after the answer, on the cache itself and on a deep copy of it."""
    model = tiny.llava()
    inputs = tiny.inputs(model, rows, pad="left")
    prompt = inputs["input_ids"].shape[1]
    options = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True}
    with tokenprune.pruned(model, compact_early=True, **CUTS["layer2"]):
        first = model.generate(**inputs, **options)
        report = tokenprune.report(model)
        cache = copy.deepcopy(first.past_key_values) if copied else first.past_key_values
        question = torch.full((len(rows), 4), tiny.FIRST_TEXT_ID + 3)
        ids = torch.cat([first.sequences, question], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - prompt), value=1)
        again = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, output_logits=True, **options
        )
    history = {**inputs, "input_ids": ids, "attention_mask": mask}
    positions = tiny.visual_positions(model, history)
    judged = oracle.masked_forward(
        model,
        history,
        judge.cuts_of(report),
        positions,
        generated=again.sequences[:, ids.shape[1] :],
        positions="generate",
        early=[[prompt] * len(row) for row in positions],
    ).steps()
    assert float((torch.stack(again.logits, 1) - judged).abs().max()) <= judge.tolerance(model)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("shape", ["one", "two"])
def test_a_second_image_in_a_later_turn(shape: str, static: bool) -> None:
    """The second prompt sees all of its own image in the early layers, and what was kept of the first's."""
    model = tiny.llava()
    rows = (["text:3", "image", "text:4"], ["text:2", "image", "text:6"])[: 1 if shape == "one" else 2]
    one, two = (tiny.inputs(model, rows, pad="left", seed=s) for s in (0, 1))
    length, batch = one["input_ids"].shape[1], len(rows)
    mask = torch.cat([one["attention_mask"], two["attention_mask"]], dim=1)
    both = (mask.cumsum(1) - 1).clamp(min=0)
    step_mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    token = torch.full((batch, 1), tiny.FIRST_TEXT_ID)
    with tokenprune.pruned(model, layer=2, keep=0.5, compact_early=True, method="random"), torch.no_grad():
        cache: Any = DynamicCache(config=model.config.text_config)
        if static:
            cache = StaticCache(config=model.config.text_config, max_cache_len=256)
        model(**one, past_key_values=cache, position_ids=both[:, :length])
        first = tokenprune.report(model)
        call = {**two, "attention_mask": mask, "position_ids": both[:, length:]}
        turn = model(**call, past_key_values=cache).logits
        second = tokenprune.report(model)
        position = (step_mask.cumsum(1) - 1)[:, -1:]
        call = {"input_ids": token, "attention_mask": step_mask, "position_ids": position}
        step = model(**call, past_key_values=cache).logits
    history = {
        "input_ids": torch.cat([one["input_ids"], two["input_ids"], token], dim=1),
        "attention_mask": step_mask,
        "pixel_values": torch.stack([one["pixel_values"], two["pixel_values"]], 1).flatten(0, 1),
        "position_ids": torch.cat([both, position], dim=1),
    }
    kept = [[*a, *b] for a, b in zip(first.keep_lists[0], second.keep_lists[0], strict=True)]
    positions = tiny.visual_positions(model, history)
    ends = [[length, mask.shape[1]] for _ in rows]
    wanted = oracle.masked_forward(model, history, [(2, kept)], positions, early=ends).logits
    assert second.index is not None
    wanted_turn = wanted[:, length:-1]
    assert judge.difference_at(second.index, turn, wanted_turn, two["attention_mask"]) <= judge.tolerance(
        model
    )
    assert float((step[:, -1] - wanted[:, -1]).abs().max()) <= judge.tolerance(model)


@pytest.mark.parametrize("rows", [ONE, RAGGED], ids=["batch1", "ragged4"])
@pytest.mark.parametrize("cut", list(CUTS))
def test_the_whole_cache_shrinks(rows: Any, cut: str) -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, rows, pad="left")
    length = inputs["input_ids"].shape[1]
    with tokenprune.pruned(model, compact_early=True, **CUTS[cut]), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        report = tokenprune.report(model)
    short = cache.layers[-1].keys.shape[-2]
    assert short < length
    lengths = [layer.keys.shape[-2] for layer in cache.layers]
    assert lengths == [length] + [short] * (len(lengths) - 1)
    assert report.layers[1].length == length  # what it computed
    per_token = 2 * cache.layers[1].keys[:, :, 0].numel() * 4
    assert [layer.kv_used for layer in report.layers] == [n * per_token for n in lengths]
    # The storage is as short as the view.
    assert [layer.kv_allocated for layer in report.layers] == [n * per_token for n in lengths]


def test_a_shared_storage_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel lays compacted layers down: in one piece of memory."""

    def in_one_piece(tensors: list[torch.Tensor], index: torch.Tensor, inplace: bool = False) -> Any:
        return list(torch.stack(kv_compact(tensors, index)).unbind(0))

    model = tiny.llava()
    inputs = tiny.inputs(model, ONE)
    reports = []
    for compact in (kv_compact, in_one_piece):
        monkeypatch.setattr("tokenprune.runtime.early.kv_compact", compact)
        with tokenprune.pruned(model, "random", layer=3, keep=0.8, compact_early=True), torch.no_grad():
            model(**inputs)
            reports.append(tokenprune.report(model))
    assert reports[0].kv_allocated == reports[1].kv_allocated
    assert reports[0].kv_used == reports[1].kv_used


def test_a_static_cache_keeps_the_memory_before_a_cut() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, ONE)
    cache = StaticCache(config=model.config.text_config, max_cache_len=128)
    with tokenprune.pruned(model, compact_early=True, **CUTS["layer2"]), torch.no_grad():
        model(**inputs, past_key_values=cache)
        report = tokenprune.report(model)
    used = [int(layer.get_seq_length()) for layer in cache.layers]
    assert used[1:] == [used[-1]] * (len(used) - 1) and used[0] == inputs["input_ids"].shape[1] > used[1]
    per_token = 2 * cache.layers[1].keys[:, :, 0].numel() * 4
    assert [layer.kv_used for layer in report.layers] == [n * per_token for n in used]
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert [layer.kv_allocated for layer in report.layers] == [n * per_token for n in lengths]
    assert lengths[:2] == [128, 128] and lengths[2] < 128


def test_nothing_changes_where_nothing_is_dropped() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, RAGGED, pad="left")
    options = {
        "do_sample": False,
        "max_new_tokens": 3,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    wanted = model.generate(**inputs, **options)
    with tokenprune.pruned(model, "uniform", keep=1.0, layer=2, compact_early=True):
        found = model.generate(**inputs, **options)
    assert all(torch.equal(a, b) for a, b in zip(wanted.logits, found.logits, strict=True))


def test_a_failure_leaves_the_cache_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, ONE)
    cache = DynamicCache(config=model.config.text_config)

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    with tokenprune.pruned(model, compact_early=True, **CUTS["layer2"]), torch.no_grad():
        monkeypatch.setattr("tokenprune.runtime.early.kv_compact", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(**inputs, past_key_values=cache)
        assert cache.layers[1].keys.shape[-2] == inputs["input_ids"].shape[1]
        monkeypatch.undo()
        assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("value", [1, "yes", None])
def test_only_true_or_false(value: Any) -> None:
    with pytest.raises(tokenprune.ConfigError, match="compact_early must be True or False"):
        tokenprune.wrap(tiny.llava(), "uniform", keep=0.5, compact_early=value)
