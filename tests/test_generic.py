"""Models of types that are not known: tried on their first prompt, taken with a warning or refused with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    CohereConfig,
    SiglipVisionConfig,
)

import judge
import oracle
import tiny
import tokenprune
from tiny.base import Blocks, build_model, make_inputs, text_kwargs, vision_kwargs
from tokenprune.api import runtime_of
from tokenprune.models import find_family

TOKENS, SIDE = 9, 24  # 6 x 6 patches, shuffled 2 x 2
CUTS: dict[str, dict[str, Any]] = {
    "before": {"method": "uniform", "layer": 0, "keep": 0.4},
    "at_2": {"method": "uniform", "layer": 2, "keep": 0.6},
    "two": {"method": "random", "cuts": [(0, 0.7), (3, 0.3)]},
}


class Aya(Blocks):
    def tokens(self, config: Any) -> int:
        return TOKENS


@pytest.fixture(scope="module")
def model() -> Any:
    """A family that nobody here wrote a file for."""
    vision = SiglipVisionConfig(**vision_kwargs(2, SIDE), vision_use_head=False)
    config = AyaVisionConfig(
        vision_config=vision,
        text_config=CohereConfig(**text_kwargs(6, 64, 4, 2)),
        image_token_index=tiny.IMAGE,
        downsample_factor=2,
    )
    return build_model(AyaVisionForConditionalGeneration, config, "sdpa", torch.float32, 0)


@contextmanager
def pruned(model: Any, **arguments: Any) -> Iterator[None]:
    with pytest.warns(tokenprune.UntestedWarning, match="of no known family"):
        tokenprune.wrap(model, **arguments)
    try:
        yield
    finally:
        tokenprune.unwrap(model)


def positions(inputs: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
    return [
        [run for run in tiny.base.runs(row, tiny.IMAGE)]  # noqa: C416  # pictures do not touch here
        for row in inputs["input_ids"]
    ]


@pytest.mark.parametrize("how", ["forward", "greedy", "sampling", "static"])
@pytest.mark.parametrize("cut", CUTS)
def test_against_the_oracle(model: Any, cut: str, how: str) -> None:
    rows = [["text:5", "image", "text:3"], ["text:7"], ["text:2", "image", "text:4", "image", "text:6"]]
    inputs = make_inputs(Aya(), model, rows, "left", 0)
    own, new, times = positions(inputs), inputs["input_ids"][:, :0], 1
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": how == "sampling"}
    options |= {"cache_implementation": "static"} if how == "static" else {}
    with pruned(model, **CUTS[cut]), torch.no_grad():
        if how == "forward":
            logits = model(**inputs).logits
        else:
            out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
            new = out.sequences[:, inputs["input_ids"].shape[1] :]
            logits = torch.stack(out.logits, 1)
        report = tokenprune.report(model)
    assert report.pruned and times == 1
    wanted = oracle.masked_forward(model, inputs, judge.cuts_of(report), own, generated=new)
    if how == "forward":
        assert judge.difference_at(report.index, logits, wanted.logits, inputs["attention_mask"]) <= 1e-4
    else:
        assert float((logits - wanted.steps()).abs().max()) <= 1e-4


def test_only_the_first_prompt_runs_twice(model: Any) -> None:
    inputs = make_inputs(Aya(), model, [["text:3", "image", "text:4"]], "left", 0)
    ran: list[int] = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: ran.append(1))
    with pruned(model, **CUTS["at_2"]), torch.no_grad():
        first = model(**inputs).logits
        second = model(**inputs).logits
        total = tokenprune.report(model, total=True)
    handle.remove()
    assert len(ran) == 3 and total.prompts == 2 and torch.equal(first, second)


def test_what_is_left_out_says_why(model: Any) -> None:
    with pytest.raises(tokenprune.UnsupportedModelError, match="vision attention of generic models"):
        with pruned(model, method="vflowopt", keep=0.5):
            pass
    with pytest.raises(tokenprune.UnsupportedModelError, match="'cohere' decoders"):
        with pruned(model, method="fastv", layer=2, keep=0.7):
            pass
    with pruned(model, keep=0.5):
        assert runtime_of(model).config.method.name == "uniform"


def test_a_model_that_does_otherwise_is_refused(model: Any) -> None:
    """Its third layer adds to each state what its place in the sequence is: what is dropped changes that of others."""
    inputs = make_inputs(Aya(), model, [["text:3", "image", "text:4"]], "left", 0)
    layer = model.model.language_model.layers[3]

    def count(module: Any, args: Any, kwargs: Any) -> Any:
        places = torch.arange(args[0].shape[1], dtype=args[0].dtype)[None, :, None]
        return (args[0] + places * torch.linspace(-1, 1, args[0].shape[2]), *args[1:]), kwargs

    before = model(**inputs).logits
    handle = layer.register_forward_pre_hook(count, with_kwargs=True)
    with pruned(model, **CUTS["at_2"]), torch.no_grad():
        for _ in range(2):  # as long as it has not passed
            with pytest.raises(
                tokenprune.UnsupportedModelError, match=r"answers otherwise .* dropped tokens are masked"
            ):
                model(**inputs)
        handle.remove()
        model(**inputs)
    assert torch.equal(model(**inputs).logits, before)


def test_a_layout_that_is_not_the_usual_one() -> None:
    model = tiny.llava()
    model.config.model_type = "novel"
    with pytest.warns(tokenprune.UntestedWarning, match="model_type 'novel'"):
        assert find_family(model).name == "generic"
    del model.model.language_model.norm
    with pytest.raises(
        tokenprune.UnsupportedModelError, match=r"'novel'.*no `layers` and `norm`.*docs/family.md"
    ):
        find_family(model)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bodies_without_a_head(family: str) -> None:
    """As models that embed are: the states of what is left, the same to the bit as inside the whole model."""
    whole = tiny.build(family)
    if not hasattr(whole, "model"):
        pytest.skip("no body of its own")
    prefix = [["image", "text:12"], ["image", "text:12"]]
    inputs = tiny.inputs(whole, prefix if family == "paligemma" else judge.ROWS)
    for cut in CUTS.values():
        states = []
        for wrapped in (whole, whole.model):
            with tokenprune.pruned(wrapped, **cut), torch.no_grad():
                states.append(whole.model(**inputs).last_hidden_state)
                assert tokenprune.report(wrapped).pruned
        assert torch.equal(*states) and states[0].shape[1] < inputs["input_ids"].shape[1]


@pytest.mark.parametrize("kind", ["gemma3n", "mllama"])
def test_types_that_are_known_not_to_work(kind: str) -> None:
    model = tiny.llava()
    model.config.model_type = kind
    with pytest.raises(tokenprune.UnsupportedModelError, match=f"{kind!r}.*is not supported: its"):
        find_family(model)


def test_checkpoints_of_their_authors_own_code() -> None:
    model = tiny.internvl()
    model.config.model_type = "internvl_chat"
    with pytest.raises(
        tokenprune.UnsupportedModelError, match=r"its twin in transformers, OpenGVLab/InternVL3-8B-hf"
    ):
        find_family(model)


def test_the_small_gemma_4() -> None:
    for arguments in ({"per_layer_input": 8}, {"shared": 3}):
        model = tiny.gemma4(causal=True, **arguments)
        with pytest.raises(tokenprune.UnsupportedModelError, match=r"E2B and E4B.*26B-A4B and 31B are"):
            tokenprune.wrap(model, "uniform", keep=0.5)
