"""Decoders of which only some layers attend: the others fold what is left into a state (Qwen3.5)."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch

import judge
import oracle
import tiny
import tokenprune
from tokenprune.analysis.memory import Memory
from tokenprune.tune.space import Space, setting_of

EVERY = 4  # as in the released models: layers 3 and 7 of 8 attend
ROWS = [["text:5", "image", "text:3"], ["text:7"], ["text:2", "image", "text:1", "image", "text:6"]]
CUTS: dict[str, dict[str, Any]] = {
    "before": {"method": "random", "layer": 0, "keep": 0.4},
    "below the first that attends": {"method": "random", "layer": 2, "keep": 0.5},
    "at it": {"method": "random", "layer": 3, "keep": 0.6},
    "behind it": {"method": "random", "layer": 4, "keep": 0.7},
    "two": {"method": "random", "cuts": [(1, 0.7), (6, 0.3)]},
    "vflowopt": {"method": "vflowopt", "keep": 0.5},
    "entropyprune": {"method": "entropyprune", "keep": 0.7},
    "fastv": {"method": "fastv", "keep": 0.7},
    "early": {"method": "random", "layer": 6, "keep": 0.85, "compact_early": True},
}


def hybrid(layers: int = 8, **more: Any) -> Any:
    return tiny.qwen3_5(layers=layers, every=EVERY, **more)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["batch1", "ragged"])
def test_against_the_oracle(rows: Any, cut: str, static: bool) -> None:
    model = hybrid()
    inputs = tiny.inputs(model, rows)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
    if static:
        options["cache_implementation"] = "static"
    assert judge.generate_difference(model, inputs, options, **CUTS[cut])[0] <= judge.tolerance(model)
    assert judge.prefill_difference(model, inputs, **CUTS[cut]) <= judge.tolerance(model)


def test_the_oracle_without_cuts_is_stock_and_padding_alone_moves_stock() -> None:
    """Why hybrids are judged by 5e-4: the same rows with and without padding, nothing pruned, nothing of ours."""
    model = hybrid()
    inputs = tiny.inputs(model, ROWS)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        padded = model(**inputs).logits
    wanted = oracle.masked_forward(model, inputs, [], tiny.visual_positions(model, inputs)).logits
    moved = float((padded - wanted).abs().amax(-1)[real].max())
    assert 1e-6 < moved <= judge.tolerance(model)


def test_what_shrinks_and_what_does_not() -> None:
    model = hybrid()
    inputs = tiny.inputs(model, ROWS[:1])
    with tokenprune.pruned(model, "random", layer=1, keep=0.5), torch.no_grad():
        whole = inputs["input_ids"].shape[1]
        cache = model(**inputs, use_cache=True).past_key_values
        report = tokenprune.report(model)
    held = [layer.keys.shape[2] if judge.holds_keys(layer) else None for layer in cache.layers]
    assert held[:3] == [None] * 3 and held[3] == held[7] == report.layers[-1].length < whole
    assert [layer.kv_used > 0 for layer in report.layers] == [False, False, False, True] * 2
    assert [layer.length for layer in report.layers] == [whole] + [report.layers[-1].length] * 7


@pytest.mark.parametrize("method", ["entropyprune", "fastv"])
def test_methods_that_score_states_cut_behind_a_layer_that_has_them(method: str) -> None:
    model = hybrid()
    with pytest.raises(tokenprune.ConfigError, match=r"layer 1 .* only layers 3, 7 .*attend; cut at 4, 8"):
        tokenprune.wrap(model, method, layer=2, keep=0.8)
    inputs = tiny.inputs(model, ROWS[:1])
    with tokenprune.pruned(model, method, keep=0.8), torch.no_grad():
        model(**inputs)
        report = tokenprune.report(model)
    assert report.layers_cut == (4,) and "behind the next layer that attends" in str(report)


def test_a_layer_that_is_recurrent_cannot_be_looked_at_from_ahead() -> None:
    with pytest.raises(tokenprune.ConfigError, match="look 4, 8 layers ahead"):
        tokenprune.wrap(hybrid(), "entropyprune", lookahead=2, keep=0.5)
    model = hybrid()
    inputs = tiny.inputs(model, ROWS)
    arguments = {"method": "entropyprune", "lookahead": 4, "keep": 0.5}
    assert judge.prefill_difference(model, inputs, **arguments) <= judge.tolerance(model)


def test_further_turns() -> None:
    """The conversation's length is read off the first layer that attends."""
    model = hybrid()
    inputs = tiny.inputs(model, ROWS[:1])
    question = torch.full((1, 4), tiny.FIRST_TEXT_ID)

    def ask(layer: int) -> tuple[Any, Any, Any]:
        with tokenprune.pruned(model, "random", layer=layer, keep=0.7), torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
            report = tokenprune.report(model)
            ids = torch.cat([inputs["input_ids"], question], 1)
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=3,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        return ids, out, report

    ids, out, report = ask(4)
    types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 4))
    history = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
    wanted = oracle.masked_forward(
        model,
        history,
        judge.cuts_of(report),
        tiny.visual_positions(model, history),
        generated=out.sequences[:, ids.shape[1] :],
        positions="generate",
    ).steps()
    assert float((torch.stack(out.logits, 1) - wanted).abs().max()) <= judge.tolerance(model)
    with pytest.raises(tokenprune.UnsupportedModeError, match="cut at layer 4 or later"):
        ask(3)


def test_a_call_that_fails_half_way_is_told() -> None:
    """No length tells that a state was written to."""
    model = hybrid()
    inputs = tiny.inputs(model, ROWS[:1])
    step = {"input_ids": torch.full((1, 1), 40), "position_ids": torch.full((3, 1, 1), 50)}

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with tokenprune.pruned(model, "random", layer=4, keep=0.7), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        handle = model.model.language_model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(**step, past_key_values=cache)
        handle.remove()
        with pytest.raises(tokenprune.UnsupportedModeError, match="failed half way"):
            model(**step, past_key_values=cache)


def test_collapse_is_not_read_off_hybrids() -> None:
    from tokenprune.analysis.reader import Reader

    model = hybrid()
    with pytest.raises(tokenprune.UnsupportedModelError, match=r"only layers 3, 7 attend"):
        with Reader(model, hidden=None, on_states=lambda *_: None):
            pass


def test_fastv_reads_the_models_own_attention() -> None:
    model = hybrid(attn_implementation="eager")
    inputs = tiny.inputs(model, ROWS[:1])
    with torch.no_grad():
        first, _ = model(**inputs, output_attentions=True, use_cache=False).attentions  # of layers 3 and 7
    (columns,) = tiny.visual_positions(model, inputs)[0]
    with tokenprune.pruned(model, "fastv", layer=4, keep=0.7), torch.no_grad():
        model(**inputs)
        (kept,) = tokenprune.report(model).keep_lists[0][0]
    best = first[0, :, -1, columns].mean(0).topk(len(kept)).indices.sort().values
    assert list(kept) == best.tolist()


def test_a_mixture_of_experts_behind_internvl_is_scored() -> None:
    for text in ("qwen3_moe", "gpt_oss"):
        model = tiny.internvl(text, attn_implementation="eager")
        inputs = tiny.inputs(model, ROWS)
        for method in ("entropyprune", "fastv"):
            arguments = {"method": method, "layer": 2, "keep": 0.6}
            options = {"do_sample": False, "max_new_tokens": 3}
            assert judge.generate_difference(model, inputs, options, **arguments)[0] <= judge.TOLERANCE


def test_searches_leave_out_what_scores_states() -> None:
    """Most layers have none to score; a decoder whose states are not offered has none at all."""
    for model in (hybrid(), tiny.kimi_k25()):
        calls = [tiny.inputs(model, ROWS[:1])]
        setting = setting_of(model, calls, 0.5, Memory())
        assert not setting.scored
        assert {"vflowopt", "uniform"} & set(Space.of(setting, None, 0.5).methods)
        assert not {"entropyprune", "fastv"} & set(Space.of(setting, None, 0.5).methods)
        with pytest.raises(tokenprune.ConfigError, match="'fastv' has nothing to search on this model"):
            Space.of(setting, ["fastv"], 0.5)
    assert setting_of(tiny.llava(), [tiny.inputs(tiny.llava(), ROWS[:1])], 0.5, Memory()).scored


@pytest.mark.parametrize("build", [hybrid, tiny.gemma4], ids=["qwen3_5", "gemma4"])
def test_weights_that_accelerate_brings_in_layer_by_layer(build: Any) -> None:
    model, twin = build(), build()
    inputs = tiny.inputs(model, ROWS)
    answers = []
    for own in (twin, accelerate.cpu_offload(model, execution_device=torch.device("cpu"))):
        with tokenprune.pruned(own, "vflowopt", keep=0.5), torch.no_grad():
            answers.append(
                (own.generate(**inputs, max_new_tokens=3, do_sample=False), tokenprune.report(own))
            )
    (a, one), (b, other) = answers
    assert torch.equal(a, b) and one.keep_lists == other.keep_lists and one.flops == other.flops
