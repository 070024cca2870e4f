"""Reading a model's layers: what the callbacks see is what the model itself computes, and nothing is left behind."""

import gc
import weakref

import pytest
import torch

import judge
import oracle
import tiny
import tokenprune
from tokenprune.analysis.layers import read_layers
from tokenprune.analysis.reader import Reader
from tokenprune.errors import ConfigError, TokenPruneError
from tokenprune.estimators import estimate
from tokenprune.runtime.layer_states import last_row

ROWS = [["text:5", "image", "text:3", "image", "text:4"], ["text:2", "image", "text:2"]]
MODELS = {
    "llava": lambda **k: tiny.llava(**k),
    "llava-mistral": lambda **k: tiny.llava("mistral", **k),
    "llava-qwen2-window": lambda **k: tiny.llava("qwen2", sliding_window=12, **k),
    "llava-mistral-window": lambda **k: tiny.llava("mistral", sliding_window=12, **k),
    "qwen2_5_vl": lambda **k: tiny.qwen2_5_vl(**k),
    "glm4v": tiny.glm,
    "glm4v_moe": lambda **k: tiny.glm("glm4v_moe", **k),
    "gemma4": tiny.gemma4,
    "mistral3": tiny.mistral3,
    "paddleocr_vl": tiny.paddleocr_vl,
    "internvl_qwen3_moe": lambda **k: tiny.internvl("qwen3_moe", **k),
    "internvl_gpt_oss": lambda **k: tiny.internvl("gpt_oss", **k),
}


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_hidden_states_are_the_models_own(name, pad):
    model = MODELS[name]()
    inputs = tiny.inputs(model, ROWS, pad=pad)
    with torch.inference_mode():
        own = model(**inputs, output_hidden_states=True, use_cache=False)
    seen, prompts = {}, []
    before = hooks(model)
    with Reader(
        model, hidden=lambda l, states, prompt: (seen.update({l: states}), prompts.append(prompt))
    ) as reader:
        reader.read(inputs)
    assert sorted(seen) == list(range(7))
    for l in range(6):
        assert torch.equal(seen[l], own.hidden_states[l]), l
    # the last entry of the model's own list is normalised already
    normed = model.model.language_model.norm(seen[6])
    assert torch.equal(normed, own.hidden_states[6])
    assert hooks(model) == before

    for r, (visual, text) in enumerate(zip(prompts[0].visual, prompts[0].text, strict=True)):
        ids = inputs["input_ids"][r]
        assert [len(v) for v in visual] == [i.n for i in prompts[0].images[r]]
        assert torch.equal(torch.cat(visual), (ids == tiny.IMAGE).nonzero()[:, 0])
        real = inputs["attention_mask"][r] == 1
        assert torch.equal(text, (real & (ids != tiny.IMAGE)).nonzero()[:, 0])


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("name", list(MODELS))
def test_last_row_is_the_models_own_attention(name, pad):
    model = MODELS[name](attn_implementation="eager")
    inputs = tiny.inputs(model, ROWS, pad=pad)
    with torch.inference_mode():
        own = model(**inputs, output_attentions=True, use_cache=False).attentions
    checked = []

    def compare(layer, attention, prompt):
        for r in range(2):
            columns = torch.cat([*prompt.visual[r], prompt.text[r]])
            weights = last_row(attention, r, columns, columns)
            truth = own[layer][r, :, int(columns.max())][:, columns]
            assert (weights - truth).abs().max() < 1e-5, (layer, r)
            checked.append((layer, r))

    with Reader(model, on_states=compare) as reader:
        reader.read(inputs)
    assert len(checked) == 12


def test_statistics_are_those_of_the_states():
    model = MODELS["llava"]()
    calls = [tiny.inputs(model, ROWS, seed=seed) for seed in range(3)]
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    found = read_layers(model, calls, ["von_neumann", "renyi"], maps=4)
    handle.remove()
    assert len(forwards) == len(calls)  # one prefill per sample
    assert found.visual["renyi"].shape == (9, 7) and found.text["renyi"].shape == (6, 7)
    assert found.tokens.tolist() == [25] * 9
    assert found.attention_entropy.shape == (6, 6, 4) and found.visual_share.shape == (6, 6)
    assert [m.shape for m in found.maps] == [(6, 25)] * 6 and len(found.images) == 6
    with torch.inference_mode():
        states = model(**calls[1], output_hidden_states=True).hidden_states[4]
    second = (calls[1]["input_ids"][0] == tiny.IMAGE).nonzero()[25:, 0]
    assert found.visual["von_neumann"][4, 4] == pytest.approx(float(estimate(states[0, second])), abs=1e-6)
    share = found.visual_share
    assert ((share > 0) & (share < 1)).all()
    entropy = found.attention_entropy
    assert ((entropy > 0) & (entropy < 1)).all()


def test_maps_are_the_scores_of_the_cut_after():
    """The map of layer l ranks tokens as EntropyPrune (trace) at a cut entering layer l + 1 does."""
    model = MODELS["qwen2_5_vl"]()
    inputs = tiny.inputs(model, [["text:3", "image:4x6", "text:4"]])
    values = read_layers(model, [inputs], maps=1).maps[0][1]
    with (
        tokenprune.pruned(model, "entropyprune", keep=7, budget="after_cut", layer=2, normalization="trace"),
        torch.no_grad(),
    ):
        model(**inputs)
        kept = tokenprune.report(model).keep_lists[0][0][0]
    assert sorted(values.argsort()[-7:].tolist()) == list(kept)


def test_states_are_let_go_of():
    model = MODELS["llava"]()
    alive = []

    def hidden(layer, states, prompt):
        alive.append(weakref.ref(states))
        if layer > 3:  # what enters layer 0 the text model itself holds on to
            gc.collect()
            assert alive[layer - 3]() is None, f"the states of layer {layer - 3} are still held"

    with Reader(model, hidden=hidden) as reader:
        reader.read(tiny.inputs(model, ROWS))
    assert len(alive) == 7


def test_refusals_leave_the_model_alone():
    model = MODELS["llava"]()
    model(**tiny.inputs(model, ROWS))  # transformers leaves hooks of its own at the first call
    before = hooks(model)
    with pytest.raises(ConfigError, match="have no images"):
        read_layers(model, [tiny.inputs(model, [["text:4"]])])
    with pytest.raises(ConfigError, match="unknown estimator"):
        read_layers(model, [], ["entropies"])
    with pytest.raises(RuntimeError, match="stop"):
        with Reader(model, hidden=lambda *_: (_ for _ in ()).throw(RuntimeError("stop"))) as reader:
            reader.read(tiny.inputs(model, ROWS))
    assert hooks(model) == before
    with tokenprune.pruned(model, keep=0.5, layer=1):
        with pytest.raises(TokenPruneError, match="unwrap"):
            tokenprune.detect_ecl(model, [])


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_wrapped_model_is_read_as_it_is_pruned(name, pad):
    """Every layer's states against the masked forward, and every image's places in what is left."""
    model = MODELS[name](layers=4)
    inputs = tiny.inputs(model, ROWS, pad=pad)
    hidden, heads = {}, {}

    def caught(layer, states, prompt):
        def pick(x):
            return x[0 if len(x) == 1 else 1].index_select(0, prompt.visual[1][0])

        heads[layer] = {name: states.of(name, pick) for name in ("query", "key", "value")}

    with tokenprune.pruned(model, "random", cuts=[(1, 0.6), (3, 0.3)]):
        before = hooks(model)
        with Reader(
            model, lambda l, x, p: hidden.update({l: (x, p)}), caught, ("query", "key", "value")
        ) as reader:
            reader.read(inputs)
        report = tokenprune.report(model)
        assert tokenprune.is_wrapped(model)
        with torch.no_grad():
            model(**inputs)  # nobody is shown anything any more
    assert len(hidden) == 5 and len(heads) == 4 and before
    positions = tiny.visual_positions(model, inputs)
    wanted = oracle.masked_forward(model, inputs, judge.cuts_of(report), positions, output_hidden=True).hidden
    for layer in range(4):
        states, prompt = hidden[layer]
        cut = {0: None, 1: 0, 2: 0, 3: 1}[layer]
        for r, row in enumerate(positions):
            for i, columns in enumerate(row):
                kept = list(range(len(columns))) if cut is None else report.keep_lists[cut][r][i]
                assert prompt.raster[r][i].tolist() == kept
                found = states[r, prompt.visual[r][i]]
                torch.testing.assert_close(found, wanted[layer][r, columns[kept]], atol=1e-4, rtol=0)
        # The value has no rotary embedding: it is the projection of the normed state.
        block = model.model.language_model.layers[layer]
        value = block.self_attn.v_proj(block.input_layernorm(states[1, prompt.visual[1][0]]))
        torch.testing.assert_close(heads[layer]["value"].flatten(1), value, atol=1e-5, rtol=0)
        assert len(heads[layer]["query"]) == len(prompt.visual[1][0])
