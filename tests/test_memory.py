"""Remembered features and references: what they say is what the model says, until anything changes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import tokenprune
from tokenprune.analysis import memory as memory_module
from tokenprune.analysis.batches import batched
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

    return find_family(model).vision_tower()


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


@pytest.mark.parametrize("most_bytes", [2**31, 0], ids=["held", "mapped"])
@pytest.mark.parametrize("build", FAMILIES, ids=lambda f: f.__name__)
def test_what_methods_see_of_the_tower_is_remembered_too(build: Any, most_bytes: int) -> None:
    model = build(layers=4)
    inputs = tiny.inputs(model, ROWS if build is not tiny.paligemma else [["image", "text:3"]], pad="left")
    memory, ran = Memory(most_bytes), count(tower_of(model))
    settings = (
        {"t": 0.0},
        {"t": 1.05},
        {"t": 1.05, "alpha": 0.5},
        {"t": 0.0, "method": "random"},
        {"t": 1.0},
    )
    for n, own in enumerate(settings):
        arguments = {"method": "importance", "keep": 0.5, "layer": 1, **own}
        if arguments["method"] == "random":
            arguments.pop("t")
        with tokenprune.pruned(model, **arguments), torch.no_grad():
            wanted = model(**inputs).logits
            lists = tokenprune.report(model).keep_lists
            before = len(ran)
            with memory.features(model):
                found = model(**inputs).logits
            assert torch.equal(found, wanted) and tokenprune.report(model).keep_lists == lists
            assert (len(ran) == before) == (n > 0)


def test_features_known_without_attention_are_computed_once_more_for_it() -> None:
    model = tiny.llava(layers=4)
    inputs, memory, ran = tiny.inputs(model, ROWS), Memory(), count(tower_of(model))
    with tokenprune.pruned(model, "importance", keep=0.5, layer=1), torch.no_grad(), memory.features(model):
        with tokenprune.override(model, method="none"):
            model(**inputs)
        model(**inputs)
        assert len(ran) == 2
        model(**inputs)
        assert len(ran) == 2


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


def test_nothing_is_read_twice_in_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed inside pays neither for the tower's weights nor for pixels it has seen; other pixels are read."""
    model = tiny.llava()
    inputs, read = tiny.inputs(model, ROWS), []
    for name in ("stamp", "content_digest"):
        own = getattr(memory_module, name)
        monkeypatch.setattr(
            memory_module, name, lambda *a, own=own, name=name: (read.append(name), own(*a))[1]
        )
    ran = count(tower_of(model))
    with Memory().features(model), torch.no_grad():
        for _ in range(3):
            model(**inputs)
        assert read == ["stamp", "content_digest"] and len(ran) == 1
        inputs["pixel_values"].mul_(2)
        model(**inputs)
        assert read[2:] == ["content_digest"] and len(ran) == 2


def test_right_padding_is_refused() -> None:
    model = tiny.llava(layers=4)
    with pytest.raises(ConfigError, match="on the left"):
        Memory().reference(model, tiny.inputs(model, ROWS, pad="right"))


def test_what_was_used_longest_ago_lies_in_files() -> None:
    model = tiny.llava(layers=4)
    memory, plenty = Memory(most_bytes=3000), Memory()
    prompts = [tiny.inputs(model, ROWS, pad="left", seed=seed) for seed in range(10)]
    for _ in range(2):
        for inputs in prompts:
            own, wanted = memory.reference(model, inputs), plenty.reference(model, inputs)
            assert torch.equal(own.state, wanted.state) and torch.equal(own.logits, wanted.logits)
    assert 0 < memory.bytes <= 3000 and memory.misses == 10
    folder = memory._folder
    assert folder is not None and len(list(Path(folder.name).iterdir())) >= 10
    name = folder.name
    del memory, own, folder
    gc.collect()
    assert not Path(name).exists()


@pytest.mark.parametrize(
    "build", [tiny.llava, tiny.qwen2_5_vl, tiny.internvl], ids=["llava", "qwen", "internvl"]
)
def test_batches_answer_as_their_prompts_do(build: Any) -> None:
    model = build(layers=4)
    rows = [["text:3", "image", "text:2"], ["text:1", "image", "text:7"], ["image", "text:1", "image"]]
    calls = [tiny.inputs(model, [row], seed=seed) for seed, row in enumerate(rows)]
    batches = list(batched(calls, 2, pad_id=1))
    assert [len(batch["input_ids"]) for batch in batches] == [2, 1]
    for batch, own in zip(batches, (calls[:2], calls[2:]), strict=True):
        together = last_state(model, batch).state
        alone = torch.cat([last_state(model, call).state for call in own])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    other = {**calls[1], "pixel_values": calls[1]["pixel_values"][..., :-1]}
    assert len(list(batched([calls[0], other], 8))) == 2
    unmasked = [{k: v for k, v in call.items() if k != "attention_mask"} for call in calls[:2]]
    assert len(list(batched(unmasked, 8))) == 2
