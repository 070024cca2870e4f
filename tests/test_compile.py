"""torch.compile of decoding with a static cache (what generate() does by itself on a GPU)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CompileConfig, StaticCache

import judge
import limits
import oracle
import tiny
import tokenprune

CUTS: dict[str, dict[str, Any]] = {
    "before": {"method": "random", "layer": 0, "keep": 0.4},
    "at_2": {"method": "entropyprune", "layer": 2, "keep": 0.5},
}
STATIC = {"do_sample": False, "max_new_tokens": 4, "cache_implementation": "static"}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def compiling(**options: Any) -> CompileConfig:
    config = CompileConfig(backend="aot_eager", **options)
    config._compile_all_devices = True  # generate() compiles by itself on a GPU only
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "cut"), [("llava", "before"), ("qwen3_vl", "at_2"), ("llama4", "at_2"), ("gemma3", "at_2")]
)
def test_generate_compiles_its_steps(family: str, cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build(family)
    limits.check(model, STATIC)
    inputs = tiny.inputs(model, judge.ROWS, pad="left")
    calls = []
    stock = type(model).get_compiled_call

    def counted(self: Any, config: Any) -> Any:
        calls.append(config)
        return stock(self, config)

    monkeypatch.setattr(type(model), "get_compiled_call", counted)
    options = {**STATIC, "compile_config": compiling()}
    assert judge.generate_difference(model, inputs, options, **CUTS[cut])[0] <= judge.TOLERANCE
    assert calls


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
def test_steps_compile_whole_and_once(cut: str) -> None:
    """No graph break, no recompilation from step to step; and an uncompiled turn may follow."""
    model = tiny.llava()
    inputs = tiny.inputs(model, judge.ROWS, pad="left")
    length = inputs["input_ids"].shape[1]
    cache = StaticCache(config=model.config.text_config, max_cache_len=length + 16)
    mask, ids, logits = inputs["attention_mask"], [], []
    step = torch.compile(model.__call__, backend="aot_eager", fullgraph=True)
    with tokenprune.pruned(model, **CUTS[cut]), torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(**inputs, past_key_values=cache, position_ids=positions)
        report = tokenprune.report(model)
        for n in range(8):
            logits.append(out.logits[:, -1])
            ids.append(out.logits[:, -1:, tiny.FIRST_TEXT_ID :].argmax(-1) + tiny.FIRST_TEXT_ID)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            call = {
                "input_ids": ids[-1],
                # 4D from the start, as generate() prepares it: a growing mask would be compiled anew
                "attention_mask": torch.ones(len(mask), 1, 1, length + 16, dtype=torch.bool),
                "position_ids": mask.cumsum(1)[:, -1:] - 1,
                "past_key_values": cache,
            }
            if n < 6:
                call["attention_mask"] = call["attention_mask"] & (torch.arange(length + 16) <= length + n)
                call["attention_mask"][:, :, :, :length] &= inputs["attention_mask"].bool()[:, None, None]
                if n == 2:
                    torch._dynamo.config.error_on_recompile = True
                out = step(**call)
            else:
                torch._dynamo.config.error_on_recompile = False
                out = model(**{**call, "attention_mask": mask})
    judged = oracle.masked_forward(
        model,
        inputs,
        judge.cuts_of(report),
        tiny.visual_positions(model, inputs),
        generated=torch.cat(ids, 1),
        positions="generate",
    ).steps()
    difference = (torch.stack(logits, 1) - judged).abs().amax((0, 2))
    assert difference.max() <= judge.TOLERANCE, difference


@pytest.mark.slow
@pytest.mark.parametrize("call", ["prompt", "dynamic", "window"])
def test_the_rest_breaks_the_graph_and_is_right(call: str) -> None:
    """Prompts, growing caches, and layers that look back only so far."""
    model = tiny.llava("mistral", sliding_window=20) if call == "window" else tiny.llava()
    inputs = tiny.inputs(model, judge.ROWS[:1] if call == "dynamic" else judge.ROWS, pad="left")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3}
    if call == "window":
        options |= {"cache_implementation": "static", "compile_config": compiling()}
    if call != "prompt":
        if call == "dynamic":
            model.forward = torch.compile(model.forward, backend="eager")
        assert judge.generate_difference(model, inputs, options, **CUTS["at_2"])[0] <= judge.TOLERANCE
        return
    with tokenprune.pruned(model, **CUTS["at_2"]), torch.no_grad():
        wanted = model(**inputs).logits
        found = torch.compile(model.__call__, backend="eager")(**inputs).logits
        assert tokenprune.report(model).pruned
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_code_compiled_before_wrap_is_not_used_after_it() -> None:
    """torch.compile does not watch hooks: without a reset the steps would run on the unpruned mask, silently wrong."""
    model = tiny.llava()
    inputs = tiny.inputs(model, judge.ROWS, pad="left")
    options = {**STATIC, "compile_config": compiling()}
    before = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    assert judge.generate_difference(model, inputs, options, **CUTS["at_2"])[0] <= judge.TOLERANCE
    after = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(torch.stack(before.logits), torch.stack(after.logits))
