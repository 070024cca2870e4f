"""Contract 7 and 11: every way of generating, judged by the masked oracle at every decoded token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from transformers import (
    DynamicCache,
    PaliGemmaForConditionalGeneration,
    StaticCache,
)

import judge
import limits
import oracle
import tiny
import tokenprune
from tokenprune.models import find_family

OLD = version.parse(transformers.__version__) < version.parse("5.23")
FAMILIES = tiny.FAMILIES
CUTS: dict[str, dict[str, Any]] = {
    "before": {"method": "random", "layer": 0, "keep": 0.4},
    "layer2": {"method": "entropyprune", "layer": 2, "keep": 0.5},
    "two": {"method": "random", "cuts": [(0, 0.7), (3, 0.3)]},
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(family: str, request: pytest.FixtureRequest) -> Any:
    if request.param == "eager" and family in tiny.VARIANTS:
        pytest.skip("as its sibling")
    return FAMILIES[family](attn_implementation=request.param)


@pytest.fixture(params=list(CUTS))
def cut(request: pytest.FixtureRequest, model: Any) -> dict[str, Any]:
    return judge.offered(model, CUTS[request.param])


@pytest.mark.parametrize("rows", [judge.ROWS[:1], judge.ROWS], ids=["batch1", "ragged4"])
def test_greedy(model: Any, cut: dict[str, Any], rows: Any) -> None:
    inputs = tiny.inputs(model, rows, pad="left")
    difference, _, _ = judge.generate_difference(
        model, inputs, {"do_sample": False, "max_new_tokens": 5}, **cut
    )
    assert difference <= judge.tolerance(model)


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 4}, 3),
        ({"num_beams": 3, "do_sample": False, "max_new_tokens": 5}, 1),
        ({"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 4}, 2),
        ({"prompt_lookup_num_tokens": 3, "do_sample": False, "max_new_tokens": 8}, 1),
        ({"cache_implementation": "static", "do_sample": False, "max_new_tokens": 4}, 1),
        ({"use_cache": False, "do_sample": False, "max_new_tokens": 3}, 1),
    ],
    ids=["sampling", "beams", "beams2", "prompt_lookup", "static", "no_cache"],
)
def test_modes(model: Any, cut: dict[str, Any], options: dict[str, Any], times: int) -> None:
    rows = judge.ROWS[:1] if "prompt_lookup_num_tokens" in options else judge.ROWS
    expands = "num_beams" in options or "num_return_sequences" in options
    limits.check(model, options)
    if expands:
        rows = limits.expandable(model, rows)
    # PaliGemma's prompt sees itself both ways, and so also what stock prompt lookup guesses in its first step: this
    # prompt makes it guess nothing there.
    guesses = isinstance(model, PaliGemmaForConditionalGeneration) and "prompt_lookup_num_tokens" in options
    inputs = tiny.inputs(model, rows, pad="left", seed=int(guesses))
    torch.manual_seed(0)
    if options.get("num_beams", 1) > 1:
        expanded = options["num_beams"]
        with tokenprune.pruned(model, **cut):
            out = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)
            report = tokenprune.report(model)
        positions = tiny.visual_positions(model, inputs)
        # All beams of a row hold the same keep lists; take each row's first.
        cuts = [
            (layer, [lists[r * expanded] for r in range(len(rows))]) for layer, lists in judge.cuts_of(report)
        ]
        for layer_lists in judge.cuts_of(report):
            for r in range(len(rows)):
                assert all(
                    layer_lists[1][r * expanded + b] == layer_lists[1][r * expanded] for b in range(expanded)
                )
        if times > 1:
            cuts = oracle.expand_cuts(cuts, times)
            inputs = oracle.expand(inputs, times, positions)
            positions = oracle.expand_rows(positions, times)
        prompt = inputs["input_ids"].shape[1]
        judged = oracle.masked_forward(
            model, inputs, cuts, positions, generated=out.sequences[:, prompt:], positions="generate"
        ).steps()
        difference = judge.judged_beams(out, judged)
    else:
        difference, _, _ = judge.generate_difference(model, inputs, options, times, **cut)
    assert difference <= judge.tolerance(model)


def test_ragged_without_padding(model: Any) -> None:
    """Rows of one length that lose different numbers of tokens: no padding says which entries are filler."""
    image = ["text:3", "image", "text:4"]
    length = tiny.inputs(model, [image])["input_ids"].shape[1]
    inputs = tiny.inputs(model, [image, [f"text:{length}"]], pad="left")
    assert bool(inputs["attention_mask"].all())
    options = {"do_sample": False, "max_new_tokens": 4}
    difference, _, _ = judge.generate_difference(
        model, inputs, options, **judge.offered(model, CUTS["layer2"])
    )
    assert difference <= judge.tolerance(model)


@pytest.mark.parametrize("logits_to_keep", [3, torch.tensor([-1]), "last"])
def test_logits_to_keep(model: Any, cut: dict[str, Any], logits_to_keep: Any) -> None:
    inputs = tiny.inputs(model, judge.ROWS, pad="left")
    last = inputs["input_ids"].shape[1] - 1
    asked = torch.tensor([last]) if isinstance(logits_to_keep, str) else logits_to_keep
    with tokenprune.pruned(model, **cut), torch.no_grad():
        whole = model(**inputs).logits
        part = model(**inputs, logits_to_keep=asked).logits
    count = asked if isinstance(asked, int) else 1
    torch.testing.assert_close(part, whole[:, -count:], atol=1e-5, rtol=0)


def _turns(model: Any, rows: Any, seed: int) -> tuple[dict[str, Any], torch.Tensor]:
    inputs = tiny.inputs(model, rows, pad="left", seed=seed)
    batch = inputs["input_ids"].shape[0]
    question = torch.randint(
        tiny.FIRST_TEXT_ID, tiny.VOCAB, (batch, 4), generator=torch.Generator().manual_seed(seed)
    )
    return inputs, question


def _second_turn(
    model: Any, cache: Any, sequences: torch.Tensor, inputs: dict[str, Any], question: torch.Tensor
) -> tuple[Any, dict[str, Any]]:
    """Ask again with the returned cache; also the full history as the oracle wants it."""
    ids = torch.cat([sequences, question], dim=1)
    extra = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, extra), value=1)
    history = {**inputs, "input_ids": ids, "attention_mask": mask}
    call = {"input_ids": ids, "attention_mask": mask}
    if "mm_token_type_ids" in inputs:
        history["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, extra))
        call["mm_token_type_ids"] = history["mm_token_type_ids"]
    options = {
        "do_sample": False,
        "max_new_tokens": 3,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    return model.generate(**call, past_key_values=cache, **options), history


@pytest.mark.parametrize("rows", [judge.ROWS[:1], judge.ROWS], ids=["batch1", "ragged4"])
def test_interleaved_conversations(model: Any, family: str, rows: Any) -> None:
    """Contract 3 and 11: two conversations in turn, one of them on a deep copy of its cache."""
    first = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True}
    with tokenprune.pruned(model, **judge.offered(model, CUTS["layer2"])):
        talks = []
        for seed in (0, 1):
            inputs, question = _turns(model, rows, seed)
            out = model.generate(**inputs, **first)
            talks.append((inputs, question, out, tokenprune.report(model)))
        answers = []
        for seed, (inputs, question, out, report) in enumerate(talks):
            cache = copy.deepcopy(out.past_key_values) if seed == 0 else out.past_key_values
            # generate() crops the last token's absence itself: the cache lacks the last generated token
            answers.append((*_second_turn(model, cache, out.sequences, inputs, question), report))
    for again, history, report in answers:
        positions = tiny.visual_positions(model, history)
        prompt = history["input_ids"].shape[1]
        judged = oracle.masked_forward(
            model,
            history,
            judge.cuts_of(report),
            positions,
            generated=again.sequences[:, prompt:],
            positions="generate",
        ).steps()
        difference = float((torch.stack(again.logits, 1) - judged).abs().max())
        assert difference <= judge.tolerance(model)


@pytest.mark.parametrize("given", [False, True], ids=["no positions", "own positions"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_positions_belong_to_the_conversation(name: str, given: bool) -> None:
    """Steps of two conversations in turn: those of each are as if there were no other, whoever makes the positions."""
    model = tiny.build(name)
    own, other = (
        tiny.inputs(model, [["text:3", f"image:{size}", "text:8"]], seed=1) for size in ("4x6", "2x2")
    )
    length, token = own["input_ids"].shape[1], torch.full((1, 1), 40)

    def steps(between: bool) -> list[torch.Tensor]:
        cache = model(**own, use_cache=True).past_key_values
        deltas = model.model.rope_deltas
        logits = []
        for i in range(3):
            if between:
                model(**other)
            call: dict[str, Any] = {}  # no mask: stock makes positions of all of its columns
            if given:
                call["position_ids"] = (length + i + deltas)[None].expand(3, 1, 1)
            logits.append(model(input_ids=token, past_key_values=cache, **call).logits)
        return logits

    with tokenprune.pruned(model, "uniform", keep=0.7, layer=2), torch.no_grad():
        alone, interleaved = steps(between=False), steps(between=True)
    assert all(torch.equal(a, b) for a, b in zip(alone, interleaved, strict=True))


def test_positions_in_a_static_cache_are_refused_after_another_conversation() -> None:
    model = tiny.build("qwen2_5_vl")
    own, other = (
        tiny.inputs(model, [["text:3", f"image:{size}", "text:8"]], seed=1) for size in ("4x6", "2x2")
    )
    cache = StaticCache(config=model.config.text_config, max_cache_len=128)
    step = {"input_ids": torch.full((1, 1), 40)}
    with tokenprune.pruned(model, "uniform", keep=0.7, layer=2), torch.no_grad():
        model(**own, past_key_values=cache)
        model(**step, past_key_values=cache)
        model(**other)
        with pytest.raises(tokenprune.UnsupportedModeError, match=r"rope_deltas.*use a growing cache"):
            model(**step, past_key_values=cache)


def test_second_image_in_second_turn() -> None:
    """Both turns prune; the second turn's layers see the first turn's kept tokens only."""
    model = tiny.llava()
    rows = (["text:3", "image", "text:4"], ["text:2", "image", "text:6"])
    one, two = (tiny.inputs(model, rows, pad="left", seed=s) for s in (0, 1))
    with tokenprune.pruned(model, "entropyprune", layer=2, keep=0.5), torch.no_grad():
        cache = DynamicCache(config=model.config.text_config)
        model(**one, past_key_values=cache)
        first = tokenprune.report(model)
        mask = torch.cat([one["attention_mask"], two["attention_mask"]], dim=1)
        length = one["input_ids"].shape[1]
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, length:]
        logits = model(
            **{**two, "attention_mask": mask}, past_key_values=cache, position_ids=position_ids
        ).logits
        second = tokenprune.report(model)
    history = {
        "input_ids": torch.cat([one["input_ids"], two["input_ids"]], dim=1),
        "attention_mask": mask,
        # per row: turn 1's image, then turn 2's
        "pixel_values": torch.stack([one["pixel_values"], two["pixel_values"]], 1).flatten(0, 1),
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    kept = [
        [[*a, *b] for a, b in zip(x, y, strict=True)]
        for x, y in zip(first.keep_lists, second.keep_lists, strict=True)
    ]
    # position_ids of turn 1 were left to the model (arange); both rows of turn 1 are padded alike here
    one_positions = torch.arange(length).expand(2, -1)
    history["position_ids"] = torch.cat([one_positions, position_ids], dim=1)
    positions = tiny.visual_positions(model, history)
    wanted = oracle.masked_forward(model, history, [(2, kept[0])], positions).logits[:, length:]
    assert second.index is not None
    assert judge.difference_at(second.index, logits, wanted, two["attention_mask"]) <= judge.tolerance(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "llava_qwen3", "vipllava", "llava_next", "gemma3", "gemma4"])
def test_new_image_in_a_later_turn(name: str, attention: str) -> None:
    """A conversation in two calls equals the same columns in one, kept tokens held fixed (contract 9)."""
    window = {"sliding_window": 20} if name.startswith("gemma") else {}
    model = tiny.build(name, attn_implementation=attention, **window)
    whole = tiny.inputs(model, [["text:3", "image", "text:4", "image", "text:5"]])
    positions = tiny.visual_positions(model, whole)
    (layer, lists), *_ = tiny.random_cuts(positions, [2], [0.5])
    arguments = {"method": "random", "layer": layer}
    with tokenprune.pruned(model, **arguments, keep_lists=[lists]), torch.no_grad():
        wanted = model(**whole).logits
    split = int(positions[0][0][-1]) + 3
    first = {k: v[:, :split] if v.ndim == 2 and k != "image_sizes" else v[:1] for k, v in whole.items()}
    second = {k: v[:, split:] if v.ndim == 2 and k != "image_sizes" else v[1:] for k, v in whole.items()}
    second |= {k: whole[k] for k in ("attention_mask", "token_type_ids", "mm_token_type_ids") if k in whole}
    cache = DynamicCache(config=model.config.get_text_config())
    with tokenprune.pruned(model, **arguments, keep_lists=[[lists[0][:1]]]), torch.no_grad():
        model(**first, past_key_values=cache)
        with tokenprune.override(model, keep_lists=[[lists[0][1:]]]):
            second["position_ids"] = torch.arange(split, whole["input_ids"].shape[1])[None]
            found = model(**second, past_key_values=cache).logits
    assert float((found - wanted[:, -found.shape[1] :]).abs().max()) <= judge.tolerance(model)


def test_turn_after_a_cut_before_the_llm_is_refused(model: Any) -> None:
    with tokenprune.pruned(model, **CUTS["before"]):
        inputs, question = _turns(model, judge.ROWS[:1], 0)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
        with pytest.raises(tokenprune.UnsupportedModeError, match="before the LLM"):
            _second_turn(model, out.past_key_values, out.sequences, inputs, question)


def test_cache_without_its_record_is_refused(model: Any) -> None:
    """Contract 3: unequal layer lengths that nobody explains."""
    inputs = tiny.inputs(model, judge.ROWS[:1])
    with tokenprune.pruned(model, **judge.offered(model, CUTS["layer2"])), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        rebuilt = DynamicCache(config=model.config.get_text_config())
        for i, layer in enumerate(cache.layers):
            if judge.holds_keys(layer):
                rebuilt.update(layer.keys, layer.values, i)
        token = torch.full((1, 1), tiny.FIRST_TEXT_ID)
        with pytest.raises(tokenprune.UnsupportedModeError, match="says nothing of what was pruned"):
            model(input_ids=token, past_key_values=rebuilt)


def test_manual_decode_without_masks(family: str) -> None:
    """A hand-written loop that passes neither positions nor a mask (contract 6)."""
    model = FAMILIES[family]()
    if find_family(model).mrope:
        pytest.skip("the stock model computes positions from the cache here; generate() passes them")
    inputs = {k: v for k, v in tiny.inputs(model, judge.ROWS[:1]).items() if k != "attention_mask"}
    for cut in CUTS.values():
        with tokenprune.pruned(model, **judge.offered(model, cut)), torch.no_grad():
            out = model(**inputs, use_cache=True)
            report = tokenprune.report(model)
            steps, ids = [], []
            for _ in range(4):
                steps.append(out.logits[:, -1])
                ids.append(
                    tiny.FIRST_TEXT_ID + out.logits[:, -1, tiny.FIRST_TEXT_ID :].argmax(-1, keepdim=True)
                )
                out = model(input_ids=ids[-1], past_key_values=out.past_key_values)
        judged = oracle.masked_forward(
            model,
            {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])},
            judge.cuts_of(report),
            tiny.visual_positions(model, inputs),
            generated=torch.cat(ids, 1),
        ).steps()
        assert float((torch.stack(steps, 1) - judged).abs().max()) <= judge.tolerance(model)


def test_physical_cache(model: Any, cut: dict[str, Any]) -> None:
    """Contract 5: the cache's own tensors are shorter, and the report says the same."""
    inputs = tiny.inputs(model, judge.ROWS[:1])
    with tokenprune.pruned(model, **cut), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        report = tokenprune.report(model)
    length = inputs["input_ids"].shape[1]
    images = tiny.visual_positions(model, inputs)[0]
    stage, left = 0, [len(image) for image in images]
    for i, layer in enumerate(cache.layers):
        if stage < len(report.layers_cut) and report.layers_cut[stage] == i:
            left = [len(kept) for kept in report.keep_lists[stage][0]]
            stage += 1
        if not judge.holds_keys(layer):
            assert report.layers[i].kv_used == 0
            continue
        expected = length - sum(len(image) for image in images) + sum(left)
        assert layer.keys.shape[-2] == layer.values.shape[-2] == expected == report.layers[i].length
        assert report.layers[i].kv_used == 4 * (layer.keys.numel() + layer.values.numel())
    assert stage == len(report.layers_cut)


def test_static_cache_reports_used_and_allocated(family: str) -> None:
    model = FAMILIES[family]()
    inputs = tiny.inputs(model, judge.ROWS[:1])
    length = inputs["input_ids"].shape[1]
    with tokenprune.pruned(model, **judge.offered(model, CUTS["layer2"])), torch.no_grad():
        cache = StaticCache(config=model.config.text_config, max_cache_len=length + 8)
        model(**inputs, past_key_values=cache)
        report = tokenprune.report(model)
    for i, layer in enumerate(cache.layers):
        if not judge.holds_keys(layer):
            continue
        per_token = 4 * (layer.keys[:, :, 0].numel() + layer.values[:, :, 0].numel())
        assert report.layers[i].kv_allocated == per_token * layer.keys.shape[2]
        assert (
            report.layers[i].kv_used
            == per_token * report.layers[i].length
            == per_token * int(layer.get_seq_length())
        )


@pytest.mark.parametrize("cut", CUTS)
def test_a_static_cache_shrinks_and_grows_again(cut: str) -> None:
    """Layers from the first cut on are allocated for what is left; emptied, the cache takes a whole prompt again."""
    model = tiny.llava(layers=6)
    inputs, free = tiny.inputs(model, judge.ROWS, pad="left"), 100
    length = inputs["input_ids"].shape[1]
    cache = StaticCache(config=model.config.text_config, max_cache_len=length + free)
    shapes = []
    for _ in range(2):
        with tokenprune.pruned(model, **CUTS[cut]), torch.no_grad():
            out = model(**inputs, past_key_values=cache).logits
            report = tokenprune.report(model)
            wanted = model(**inputs).logits
        torch.testing.assert_close(out, wanted, atol=judge.tolerance(model), rtol=0)
        for own, layer in zip(report.layers, cache.layers, strict=True):
            room = -(-(own.length + free) // 16) * 16
            assert layer.keys.shape[2] == min(room, length + free) if own.length < length else length + free
        shapes.append([layer.keys.shape for layer in cache.layers])
        cache.reset()
    assert shapes[0] == shapes[1] and shapes[0][-1][2] < length + free
    long = torch.randint(tiny.FIRST_TEXT_ID, tiny.FIRST_TEXT_ID + 20, (len(judge.ROWS), length + free - 1))
    with tokenprune.pruned(model, **CUTS[cut]), torch.no_grad():
        out = model(input_ids=long, past_key_values=cache).logits
        torch.testing.assert_close(out, model(input_ids=long).logits, atol=judge.tolerance(model), rtol=0)


@pytest.mark.parametrize("rows", [judge.ROWS[:1], judge.ROWS], ids=["batch1", "ragged4"])
def test_second_turn_on_a_static_cache(rows: Any) -> None:
    """A static cache's length is on the device; the record counts what was decoded since the prompt."""
    model = tiny.llava()
    one, two = (tiny.inputs(model, rows, pad="left", seed=s) for s in (0, 1))
    token = torch.full((len(rows), 1), tiny.FIRST_TEXT_ID)
    logits = []
    for make in (
        lambda: DynamicCache(config=model.config.text_config),
        lambda: StaticCache(config=model.config.text_config, max_cache_len=256),
    ):
        cache, mask = make(), one["attention_mask"]
        with tokenprune.pruned(model, "uniform", layer=2, keep=0.5), torch.no_grad():
            model(**one, past_key_values=cache)
            for _ in range(3):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                position = (mask.cumsum(1) - 1)[:, -1:]
                model(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache)
            mask = torch.cat([mask, two["attention_mask"]], dim=1)
            position = (mask.cumsum(1) - 1).clamp(min=0)[:, -two["input_ids"].shape[1] :]
            call = {**two, "attention_mask": mask, "position_ids": position, "past_key_values": cache}
            turn = model(**call).logits[:, -1]
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            position = (mask.cumsum(1) - 1)[:, -1:]
            step = model(
                input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache
            ).logits
        logits.append(torch.stack([turn, step[:, -1]]))
    torch.testing.assert_close(logits[0], logits[1], atol=judge.tolerance(model), rtol=0)


def test_manual_decode_on_a_static_cache_after_a_cut_before_the_llm() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, judge.ROWS[:1])
    steps = []
    for cache in (DynamicCache(), StaticCache(config=model.config.text_config, max_cache_len=128)):
        mask = inputs["attention_mask"]
        with tokenprune.pruned(model, **CUTS["before"]), torch.no_grad():
            model(**inputs, past_key_values=cache)
            for _ in range(3):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                token = torch.full((1, 1), tiny.FIRST_TEXT_ID)
                out = model(
                    input_ids=token,
                    attention_mask=mask,
                    position_ids=(mask.cumsum(1) - 1)[:, -1:],
                    past_key_values=cache,
                )
        steps.append(out.logits)
    torch.testing.assert_close(steps[0], steps[1], atol=judge.tolerance(model), rtol=0)
