"""Remembered features and references: what they say is what the model says, until anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
import tokenprune
from tokenprune.analysis.memory import Memory, last_state
from tokenprune.errors import ConfigError

ROWS = [["text:3", "image", "text:2"], ["image", "text:1", "image", "text:4"]]
FAMILIES: list[Callable[..., Any]] = [
    *(tiny.llava, tiny.llava_next, tiny.llava_onevision, tiny.qwen2_5_vl, tiny.qwen3_vl, tiny.internvl),
    *(tiny.idefics3, tiny.gemma3, tiny.paligemma, tiny.llama4),
]


def count(tower: Any) -> list[int]:
    """Grows whenever the tower's insides run."""
    ran: list[int] = []
    first = next(
        m for m in tower.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear | torch.nn.Conv3d)
    )
    first.register_forward_hook(lambda *_: ran.append(1))
    return ran


def tower_of(model: Any) -> Any:
    from tokenprune.models import find_family

    return find_family(model).vision_tower(model)


@pytest.mark.parametrize("build", FAMILIES, ids=lambda f: f.__name__)
def test_features_change_no_answer_in_any_family(build: Any) -> None:
    model = build(layers=4)
    inputs = tiny.inputs(model, ROWS if build is not tiny.paligemma else [["image", "text:3"]], pad="left")
    memory, found = Memory(), []
    ran = count(tower_of(model))
    with torch.no_grad():
        for arguments in ({"method": "none"}, {"method": "random", "keep": 0.6, "layer": 1}):
            with tokenprune.pruned(model, **arguments):
                stock = model(**inputs).logits
                before = len(ran)
                with memory.features(model):
                    found.append([torch.equal(model(**inputs).logits, stock) for _ in range(2)])
                once = len(ran) - before
    assert found == [[True, True], [True, True]]
    assert once == 0 and memory.hits >= 3
    assert "forward" not in vars(tower_of(model))


def test_features_are_of_these_pictures_these_weights_and_these_settings() -> None:
    model = tiny.llava(layers=4)
    inputs = tiny.inputs(model, ROWS)
    tower = tower_of(model)
    ran, memory = count(tower), Memory()

    def runs() -> int:
        before = len(ran)
        with memory.features(model), torch.no_grad():
            found = model(**inputs).logits
        assert torch.equal(found, model(**inputs).logits)
        return len(ran) - before - 1

    assert [runs(), runs()] == [1, 0]
    inputs["pixel_values"][0, 0, 0, 0] += 1
    assert [runs(), runs()] == [1, 0]
    tower.embeddings.patch_embedding.weight.data[0, 0, 0, 0] += 1  # past torch's own count of versions
    assert [runs(), runs()] == [1, 0]
    model.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    assert [runs(), runs()] == [1, 0]
    model.config.vision_feature_layer = -1
    tower.config.layer_norm_eps = 1e-3
    assert [runs(), runs()] == [1, 0]


def test_a_method_that_looks_into_the_tower_has_it_computed() -> None:
    from test_vision import Attention

    model = tiny.llava(layers=4)
    inputs, memory = tiny.inputs(model, ROWS), Memory()
    with tokenprune.pruned(model, Attention(), keep=0.5, layer=1), torch.no_grad():
        wanted = model(**inputs).logits
        with memory.features(model):
            with tokenprune.override(model, method="random"):
                model(**inputs)
            assert torch.equal(model(**inputs).logits, wanted)


@pytest.mark.parametrize("build", [tiny.llava, tiny.qwen2_5_vl], ids=["llava", "qwen2_5_vl"])
def test_references_are_the_unpruned_models(build: Any) -> None:
    model = build(layers=4)
    inputs, memory = tiny.inputs(model, ROWS, pad="left"), Memory()
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    for wrapped in (False, True):
        if wrapped:
            tokenprune.wrap(model, "random", keep=0.3, layer=1)
        found = memory.reference(model, inputs)
        torch.testing.assert_close(found.state, out.hidden_states[-1][:, -1], atol=1e-5, rtol=0)
        torch.testing.assert_close(found.logits, out.logits[:, -1], atol=1e-5, rtol=0)
    assert (memory.hits, memory.misses) == (1, 1)
    assert not torch.allclose(last_state(model, inputs).state, found.state, atol=1e-3)
    assert tokenprune.is_wrapped(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    memory.reference(model, inputs)
    assert memory.misses == 2


def test_right_padding_is_refused_and_old_entries_are_forgotten() -> None:
    model = tiny.llava(layers=4)
    memory = Memory(most_bytes=3000)
    with pytest.raises(ConfigError, match="on the left"):
        memory.reference(model, tiny.inputs(model, ROWS, pad="right"))
    for seed in range(10):
        memory.reference(model, tiny.inputs(model, ROWS, pad="left", seed=seed))
    assert 0 < memory.bytes <= 3000
