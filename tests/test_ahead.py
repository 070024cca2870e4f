"""Looking ahead: EntropyPrune's scores from the first layers run on an image alone, cut before the LLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import judge
import tiny
import tokenprune
from tokenprune import ConfigError
from tokenprune.methods import EntropyPrune, ImageTokens
from tokenprune_kernels.dual_gram_entropy import reference

ROWS = judge.ROWS
FAMILIES = ("llava", "llava_qwen3", "llava_next", "internvl", "qwen2_5_vl", "qwen3_vl", "idefics3", "gemma3")


def make(family: str) -> Any:
    text = "qwen3" if family == "llava_qwen3" else None
    name = family.removesuffix("_qwen3")
    return getattr(tiny, name)(**({"text": text} if text else {}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pad", ["left", "right"])
def test_oracle(family: str, pad: str) -> None:  # contract 7
    model = make(family)
    inputs = tiny.inputs(model, ROWS, pad=pad)
    given = {"method": "entropyprune", "layer": 0, "lookahead": 2, "keep": 0.4}
    assert judge.prefill_difference(model, inputs, **given) <= judge.TOLERANCE


def test_generated_tokens() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, ROWS)
    given = {"method": "entropyprune", "layer": 0, "lookahead": 2, "keep": 0.4}
    difference, _, report = judge.generate_difference(
        model, inputs, {"max_new_tokens": 4, "do_sample": False}, **given
    )
    assert difference <= judge.TOLERANCE and report.layers_cut == (0,)


@pytest.mark.parametrize("source", ["query", "key", "value", "hidden"])
def test_scores_are_the_stock_layers(source: str) -> None:
    """By hand: the stock text model on the image's embeddings alone, and the formula on its layer's states."""
    model = tiny.llava(kv_heads=2, heads=4)
    inputs = tiny.inputs(model, [["text:3", "image", "text:4"], ["text:6", "image", "text:2"]])
    seen: list[torch.Tensor] = []
    scores: list[torch.Tensor] = []

    class Spy(EntropyPrune):
        def score(self, image: ImageTokens) -> torch.Tensor:
            scores.append(super().score(image))
            return scores[-1]

    with tokenprune.pruned(model, Spy(source=source, lookahead=2), layer=0, keep=0.3), torch.no_grad():
        model(**inputs)
    text = model.model.language_model
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        for row, embeds in enumerate(features):
            (columns,) = tiny.visual_positions(model, inputs)[row]
            ids = columns[None]
            whole = text(
                inputs_embeds=embeds[None], position_ids=ids, use_cache=False, output_hidden_states=True
            )
            layer = text.layers[1]
            normed = layer.input_layernorm(whole.hidden_states[1])
            if source == "hidden":
                states = whole.hidden_states[2][0].unflatten(-1, (4, -1))
            else:
                states = getattr(layer.self_attn, f"{source[0]}_proj")(normed)[0].unflatten(-1, (-1, 16))
            seen.append(reference.matrix_entropy(states, normalization="none").float())
    assert len(scores) == len(seen) == 2
    for ours, theirs in zip(scores, seen, strict=True):
        assert torch.allclose(
            ours.double(), theirs.double(), atol=2e-3
        )  # rotation does not change the spectrum


def test_rows_and_images_do_not_see_each_other() -> None:
    """The same picture has the same scores wherever it stands: that is what lets a server keep them with it."""
    model = tiny.llava()
    alone = tiny.inputs(model, [["image", "text:3"]])
    both = tiny.inputs(model, [["text:9", "image", "text:3"], ["image", "text:2"]])
    both["pixel_values"] = alone["pixel_values"].repeat(2, 1, 1, 1)
    kept = []
    for inputs in (alone, both):
        with tokenprune.pruned(model, "entropyprune", lookahead=2, keep=0.3), torch.no_grad():
            model(**inputs)
            kept += [lists for row in tokenprune.report(model).keep_lists[0] for lists in row]
    assert kept[0] == kept[1] == kept[2]


def test_any_average_and_the_whole_cache() -> None:
    model = tiny.llava(layers=6)
    inputs = tiny.inputs(model, [["text:3", "image", "text:3"]])
    with pytest.raises(tokenprune.BudgetError):
        tokenprune.wrap(model, "entropyprune", layer=2, keep=0.1)
    with tokenprune.pruned(model, "entropyprune", lookahead=2, keep=0.1), torch.no_grad():
        output = model(**inputs, use_cache=True)
        report = tokenprune.report(model)
    assert report.kept == 2 and {layer.length for layer in report.layers} == {8}
    assert {layer.keys.shape[-2] for layer in output.past_key_values.layers} == {8}
    assert "looking 2 layers ahead" in report.layer_reason
    with tokenprune.pruned(model, "uniform", layer=0, keep=0.1), torch.no_grad():
        model(**inputs)
        without = tokenprune.report(model).flops
    assert without < report.flops < report.flops_unpruned  # the layers that were looked at count


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"lookahead": -1}, "0 for none"),
        ({"lookahead": True}, "0 for none"),
        ({"lookahead": 2, "layer": 2}, "looking ahead"),
        ({"lookahead": 6, "layer": 0}, "at most 5 layers"),
        ({"layer": 0}, "scores states of the layer before"),
    ],
)
def test_refused(given: dict[str, Any], advice: str) -> None:
    model = tiny.llava(layers=6)
    with pytest.raises(ConfigError, match=advice):
        tokenprune.wrap(model, "entropyprune", keep=0.5, **given)
    assert not tokenprune.is_wrapped(model)


def test_an_exception_inside_leaves_a_model_that_works() -> None:  # contract 13
    model = tiny.llava()
    inputs = tiny.inputs(model, [["text:3", "image", "text:3"]])
    with torch.no_grad():
        expected = model(**inputs).logits

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    tokenprune.wrap(model, "entropyprune", lookahead=2, keep=0.5)
    handle = model.model.language_model.layers[0].mlp.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(**inputs)
    handle.remove()
    with torch.no_grad():
        model(**inputs)
        assert tokenprune.report(model).pruned
    tokenprune.unwrap(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
