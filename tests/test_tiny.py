"""The layouts the tests build on: which placeholders are visual tokens, judged by what stock puts there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny

ROWS = [["text:4", "image", "text:2"], ["image", "text:3", "image", "image", "text:2"], ["text:3"]]


def embedded(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The states that enter the first decoder layer."""
    seen: list[torch.Tensor] = []
    towers = ("vision", "visual")
    layer = next(
        m for n, m in model.named_modules() if n.endswith("layers.0") and not any(t in n for t in towers)
    )
    handle = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_positions_are_where_the_features_go(family: str) -> None:
    """All placeholders but newlines are in exactly one image; other pixels change these states alone."""
    model = tiny.build(family)
    a, b = tiny.inputs(model, ROWS), tiny.inputs(model, ROWS)
    b["pixel_values"] = b["pixel_values"].flip(-1)
    changed = (embedded(model, a) != embedded(model, b)).any(-1)
    positions = tiny.visual_positions(model, a)
    assert [bool(row) for row in positions] == [True, True, False]
    for row, images in enumerate(positions):
        found = torch.cat([*images, torch.tensor([], dtype=torch.long)])
        assert found.equal(found.sort().values)
        assert found.equal(changed[row].nonzero().flatten())


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_the_other_placeholders_are_newlines(family: str) -> None:
    model = tiny.build(family)
    inputs = tiny.inputs(model, ROWS)
    prunable = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, images in enumerate(tiny.visual_positions(model, inputs)):
        for image in images:
            prunable[row, image] = True
    newline = (embedded(model, inputs) == model.model.image_newline).all(-1)
    assert newline.equal((inputs["input_ids"] == tiny.IMAGE) & ~prunable)
    assert newline.any()


def test_grids_lose_their_padding() -> None:
    """6 x 6 in full; two columns or rows of it are padding; the last one is shrunk by the limit."""
    sizes = ["image:24x24", "image:24x16", "image:16x24"]
    tokens = {}
    for family in ("llava_next", "llava_onevision"):
        model = tiny.build(family)
        inputs = tiny.inputs(model, [[size, "text:2"] for size in sizes])
        tokens[family] = [len(row[0]) - 9 for row in tiny.visual_positions(model, inputs)]
    assert tokens == {"llava_next": [36, 24, 24], "llava_onevision": [25, 24, 24]}


def test_a_video_is_one_image() -> None:
    """Also where text stands between its frames; InternVL and SmolVLM count frames."""
    counts = {}
    for family in ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm"):
        model = tiny.build(family)
        inputs = tiny.inputs(model, [["text:2", "video", "text:2"]])
        (images,) = tiny.visual_positions(model, inputs)
        counts[family] = (len(images), [int(image[-1] - image[0]) >= len(image) for image in images])
    whole = (1, [False])
    assert counts == {
        "llava_onevision": whole,
        "qwen2_vl": whole,
        "qwen2_5_vl": whole,
        "qwen3_vl": (1, [True]),
        "internvl": (2, [False, False]),
        "smolvlm": (2, [False, False]),
    }


def test_padding_sides_hold_the_same_rows() -> None:
    for family in tiny.FAMILIES:
        model = tiny.build(family)
        left, right = (tiny.inputs(model, ROWS, pad=pad) for pad in ("left", "right"))
        for row in range(len(ROWS)):
            a, b = (x["input_ids"][row][x["attention_mask"][row].bool()] for x in (left, right))
            assert a.equal(b)
        assert left["pixel_values"].equal(right["pixel_values"])
