"""Vision-attention rows offered to methods: equal to eager attention, and in the right image's hands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

import judge
import tiny
import tokenprune
from tokenprune.methods import ImageTokens, Needs, ScoreMethod, VisionAttention

ROWS = (["image", "text:3"], ["text:2", "image", "image", "text:4"])


@dataclass(frozen=True)
class Attention(ScoreMethod):
    """Keeps what CLS attends to, or what receives the most attention."""

    name: ClassVar[str] = "attention"
    cls: bool = True

    def needs(self) -> Needs:
        return Needs(vision=VisionAttention.cls_row if self.cls else VisionAttention.received)

    def score(self, image: ImageTokens) -> Tensor:
        assert image.vision is not None
        return image.vision


def eager_attention(model: Any, pixels: Tensor) -> Tensor:
    """(N, heads, m, m) of the layer that yields the features (vision_feature_layer = -2)."""
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        attention = tower(pixels, output_attentions=True).attentions[-2]
    tower.set_attn_implementation("sdpa")
    return attention


@pytest.mark.parametrize("cls", [True, False], ids=["cls", "received"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("how", ["forward", "generate", "beams"])
def test_rows_equal_eager(cls: bool, layer: int, how: str) -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, ROWS, pad="left")
    with (
        tokenprune.pruned(model, Attention(cls=cls), layer=layer, keep=7, budget="after_cut"),
        torch.no_grad(),
    ):
        if how == "forward":
            model(**inputs)
        else:
            model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=2 if how == "beams" else 1)
        lists = tokenprune.report(model).keep_lists[0]
    attention = eager_attention(model, inputs["pixel_values"]).mean(1)
    score = attention[:, 0, 1:] if cls else attention[:, 1:, 1:].mean(1)
    expected = [s.sort(descending=True, stable=True).indices[:7].sort().values.tolist() for s in score]
    if how == "beams":
        if len(lists) != 4 or judge_is_old():
            pytest.skip("this version's generate() repeats images one by one")
        lists = lists[::2]
    assert [lists[0][0], *lists[1]] == expected


def judge_is_old() -> bool:
    from test_generation import OLD

    return OLD


def test_tower_without_cls() -> None:
    """SigLIP: every patch is a token, and there is no CLS row to read."""
    text = tiny.llava().config.text_config
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=20,
        patch_size=4,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tiny.IMAGE,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    inputs = {
        "input_ids": torch.tensor([[11, *[tiny.IMAGE] * 25, 12, 13]]),
        "pixel_values": torch.randn(1, 3, 20, 20),
    }
    with tokenprune.pruned(model, Attention(cls=False), layer=1, keep=6, budget="after_cut"), torch.no_grad():
        model(**inputs)
        kept = tokenprune.report(model).keep_lists[0][0][0]
    received = eager_attention(model, inputs["pixel_values"])[0].mean(0).mean(0)
    assert kept == received.sort(descending=True).indices[:6].sort().values.tolist()
    with (
        pytest.raises(tokenprune.ConfigError, match="no CLS token"),
        tokenprune.pruned(model, Attention(), layer=1, keep=6, budget="after_cut"),
        torch.no_grad(),
    ):
        model(**inputs)


def test_qwen_refuses_by_name() -> None:
    with pytest.raises(tokenprune.UnsupportedModelError, match="qwen2_5_vl"):
        tokenprune.wrap(tiny.qwen2_5_vl(), Attention(), layer=1, keep=0.5)


def test_received_sums_to_one() -> None:
    """Each of the n rows sums to 1, so the mean received attention does as well, whatever the chunk."""
    attention = VisionAttention(torch.randn(3, 50, 8), torch.randn(3, 50, 8), 8**-0.5, has_cls=False)
    torch.testing.assert_close(attention.received().sum(), torch.tensor(1.0))
    torch.testing.assert_close(attention.received(), attention.received(chunk=7))


def test_pruning_by_vision_matches_the_oracle() -> None:
    model = tiny.llava()
    for layer in (0, 2):
        inputs = tiny.inputs(model, ROWS, pad="right")
        assert (
            judge.prefill_difference(model, inputs, method=Attention(), layer=layer, keep=0.5)
            <= judge.TOLERANCE
        )
