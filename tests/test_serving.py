"""What the vLLM plug-in is made of, without vLLM: settings, positions, and the choice for one image."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
import tokenprune
from tokenprune import ConfigError
from tokenprune.methods import VFlowOpt, make_method
from tokenprune.serving.vllm.choosing import choose_rows
from tokenprune.serving.vllm.positions import (
    CHANNELS,
    LARGEST,
    expanded,
    true_positions,
    with_channels,
    without_channels,
)
from tokenprune.serving.vllm.settings import read_settings
from tokenprune.tokens import Grid

IMAGE = 9


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_travel_between_processes() -> None:
    settings = read_settings({"method": "vflowopt", "keep": 0.25, "t": 1.5})
    assert isinstance(settings.method, VFlowOpt) and settings.method.t == 1.5
    assert not settings.method.size_term  # vLLM takes no biases
    assert read_settings(settings.to_dict()) == settings
    assert (settings.count(576), settings.count(576, 64), settings.count(10, 64), settings.count(3)) == (
        144,
        64,
        10,
        1,
    )


def test_bounds_and_marks() -> None:
    settings = read_settings({"method": "uniform", "keep": 0.25, "keep_min": 16, "keep_max": 0.5})
    assert read_settings(settings.to_dict()) == settings
    assert settings.count(100, 0.5) == 50 and settings.count(100, 16) == 16
    for asked, bound in ((0.51, "at most keep_max=0.5"), (15, "at least keep_min=16")):
        with pytest.raises(ValueError, match=bound):
            settings.count(100, asked)
    marks = {
        read_settings({"method": "uniform", "keep": 0.25, **more}).mark
        for more in ({}, {"keep": 0.5}, {"method": "random"}, {"keep_min": 0.1})
    }
    assert len(marks) == 4 and settings.mark == read_settings(settings.to_dict()).mark


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ([1], "must be an object"),
        ({"method": "uniform", "keep": 0.2, "keep_min": 0.3}, "in this order"),
        ({"method": "uniform", "keep": 0.2, "keep_max": 0.1}, "in this order"),
        ({"method": "uniform", "keep": 0.2, "keep_max": -1}, "keep"),
        ({"keep": 0.25}, "say which method"),
        ({"method": "uniform"}, "how much is kept"),
        ({"method": "nosuch", "keep": 0.2}, "unknown method"),
        ({"method": "uniform", "keep": 1.5}, "keep"),
        ({"method": "uniform", "keep": 0.2, "layer": 2}, "before the LLM only"),
        ({"method": "uniform", "keep": 0.2, "cuts": [(0, 0.2)]}, "before the LLM only"),
        ({"method": "uniform", "keep": 0.2, "positions": "compact"}, "not served"),
        ({"method": "vflowopt", "keep": 0.2, "size_term": True}, "biases"),
        ({"method": "fastv", "keep": 0.2}, "fastv"),
        ({"method": "entropyprune", "keep": 0.2}, "states of the decoder"),
        ({"profile": "missing.json"}, "missing.json"),
    ],
)
def test_what_is_not_served_is_refused_by_name(given: Any, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        read_settings(given)


# -- positions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_channels_survive_half_precision(dtype: torch.dtype) -> None:
    kept = torch.tensor([0, 5, 127, 128, 300, 575, 2879, LARGEST])
    places = torch.stack([kept, kept.flip(0), kept // 3], dim=1)
    rows = torch.randn(len(kept), 16, dtype=dtype)
    carried = with_channels(rows, places, 16_001)
    assert carried.shape == (8, 16 + CHANNELS) and carried.dtype == dtype
    own, found, count, whole = without_channels(carried)
    assert torch.equal(own, rows) and torch.equal(found, places)
    assert (count == 8).all() and (whole == 16_001).all()


def prompt(*parts: int | list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Text by its length, images by what is kept of them: tokens, and (offset, rows) of the images."""
    tokens: list[int] = []
    images = []
    for part in parts:
        if isinstance(part, int):
            tokens += [1] * part
        else:
            images.append((len(tokens), len(part)))
            tokens += [IMAGE] * len(part)
    return tokens, images


def unpruned(whole: int, *parts: int | list[int]) -> list[int]:
    """Where the same tokens stand in the unpruned prompt."""
    found, at = [], 0
    for part in parts:
        found += range(at, at + part) if isinstance(part, int) else [at + i for i in part]
        at += part if isinstance(part, int) else whole
    return found


PROMPTS: list[tuple[int | list[int], ...]] = [
    (3, [0, 4, 7], 4),
    ([1, 2, 9], 2, [0, 3, 5], 1),
    (2, [0, 4, 7], [1, 2, 9], 3),  # side by side
    ([8, 9], [0, 1], [2, 5], 1),
    (5,),
    (2, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 2),  # nothing is pruned
]


@pytest.mark.parametrize("parts", PROMPTS)
@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_positions_are_those_of_the_unpruned_prompt(parts: Any, chunk: int) -> None:
    """However the prompt is cut into steps."""
    whole = 10
    tokens, images = prompt(*parts)
    out, columns = expanded(tokens, [(*image, whole) for image in images])
    assert [out[i] for i in columns] == tokens
    positions = torch.tensor(columns).expand(3, -1)
    carried = [
        with_channels(torch.zeros(len(p), 4), torch.tensor(p)[:, None].expand(-1, 3), whole)
        for p in parts
        if not isinstance(p, int)
    ]
    for start in range(0, len(tokens), chunk):
        end = min(start + chunk, len(tokens))
        now = []
        for (offset, rows), own in zip(images, carried, strict=True):
            low, high = max(start, offset) - offset, min(end, offset + rows) - offset
            if low < high:
                now.append(own[low:high])
        rows, positions = true_positions(torch.tensor(tokens) == IMAGE, now, positions, start)
        assert all(row.shape[1] == 4 for row in rows)
    assert positions.tolist() == [unpruned(whole, *parts)] * 3
    last = unpruned(whole, *parts, 1)[-1]
    assert len(out) == last  # where decoding goes on


# -- the choice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("uniform", {}),
        ("vflowopt", {"size_term": False}),
        ("vflowopt", {"size_term": False, "recycling": "cells", "even": 0.0, "t": 1.0, "alpha": 0.4}),
        ("importance", {}),
    ],
)
def test_rows_are_the_librarys(method: str, parameters: dict[str, Any]) -> None:
    """The same tokens, merged alike, as a wrapped model keeps before the LLM."""
    model = tiny.llava(side=6)
    inputs = tiny.inputs(model, [["text:3", "image", "text:3"]])
    shown: dict[str, Any] = {}
    base = make_method(method, dict(parameters))

    class Spy(type(base)):  # type: ignore[misc]
        def select(self, image: Any, k: int) -> Any:
            shown.update(vision=image.vision, pixels=image.pixels, selection=super().select(image, k))
            return shown["selection"]

    spy = Spy(**parameters)
    with tokenprune.pruned(model, spy, layer=0, keep=0.3), torch.no_grad():
        model(**inputs)
    features = model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]

    seen = {name: shown[name] for name in ("vision", "pixels") if shown[name] is not None}
    with torch.no_grad():
        # Deep-stack features stand behind the embedding, and go with it.
        beside = torch.cat([features, 2 * features], dim=1)
        rows, kept = choose_rows(base, beside, int(0.3 * 36), (Grid(1, 6, 6),), seen, width=features.shape[1])
        rows, deep = rows.chunk(2, dim=1)
    selection = shown["selection"]
    assert torch.equal(kept, selection.keep)
    expected = features.clone()
    if selection.merges is not None:
        for slot in selection.merges[:, 1].unique():
            mine = selection.merges[:, 1] == slot
            sources, weights = selection.merges[mine, 0], selection.weights[mine]
            expected[slot] = (features[sources].double() * weights[:, None].double()).sum(0).float()
    assert torch.allclose(rows, expected[kept], atol=1e-5) and torch.allclose(deep, 2 * rows, atol=1e-4)


def test_all_of_an_image_is_left_alone() -> None:
    features = torch.randn(36, 8)
    rows, kept = choose_rows(make_method("vflowopt", {}), features, 36, (Grid(1, 6, 6),), {})
    assert rows is features and kept.tolist() == list(range(36))


def test_random_is_seeded_by_the_picture() -> None:
    method, features = make_method("random", {}), torch.randn(2, 36, 8)
    one, same, other = (
        choose_rows(method, f, 9, (Grid(1, 6, 6),), {})[1] for f in (features[0], features[0], features[1])
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
