"""Random-weight LLaVAs of a given size, and prompts for them, with the vision tower taken out of the way."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

PAD, BOS, EOS, IMAGE, FIRST_WORD = range(5)
SYSTEM = 5  # text tokens in front of the image


@dataclass(frozen=True)
class Geometry:
    """Size of a LLaVA's decoder, its prompt and its budget.

    Attributes:
        name: what `--geometry` takes.
        hidden, heads, layers, ffn, vocab: of the Llama decoder.
        side: the image has side x side visual tokens.
        text: text tokens of a prompt.
        keep, layer: visual tokens left after the cut, and the layer it enters.
        dtype: of weights and states.
    """

    name: str
    hidden: int
    heads: int
    layers: int
    ffn: int
    vocab: int
    side: int
    text: int
    keep: int
    layer: int
    dtype: torch.dtype = torch.float32

    @property
    def visual(self) -> int:
        return self.side * self.side


GEOMETRIES = {
    g.name: g
    for g in (
        Geometry("tiny", hidden=64, heads=4, layers=4, ffn=160, vocab=64, side=6, text=9, keep=12, layer=2),
        Geometry(
            "cpu", hidden=768, heads=12, layers=12, ffn=2048, vocab=32000, side=24, text=17, keep=192, layer=2
        ),
        # LLaVA-1.5-7B, 64 of 576 tokens on average over layers: for a GPU.
        Geometry(
            "7b",
            hidden=4096,
            heads=32,
            layers=32,
            ffn=11008,
            vocab=32064,
            side=24,
            text=60,
            keep=29,
            layer=2,
            dtype=torch.bfloat16,
        ),
    )
}


def build(geometry: Geometry, device: str = "cpu", attention: str = "sdpa") -> LlavaForConditionalGeneration:
    """A stock model with random weights."""
    text = LlamaConfig(
        hidden_size=geometry.hidden,
        intermediate_size=geometry.ffn,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.heads,
        vocab_size=geometry.vocab,
        max_position_embeddings=4096,
        # Larger than the usual 0.02: attention is then far from flat, and dropping the wrong token shows.
        initializer_range=1.5 * geometry.hidden**-0.5,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=14 * geometry.side,
        patch_size=14,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        image_seq_length=geometry.visual,
        vision_feature_layer=-1,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(
            config, attn_implementation=attention, dtype=geometry.dtype
        )
    torch.random.set_rng_state(state)
    return model.eval()


def prompts(geometry: Geometry, batch: int, ragged: bool = False, device: str = "cpu") -> dict[str, Tensor]:
    """Inputs of a forward: one image per row between two pieces of text, left padding, positions as generate() makes.

    Args:
        geometry: sizes.
        batch: rows.
        ragged: rows with 4 more text tokens than the one before, instead of equal ones.
        device: where to.
    """
    generator = torch.Generator().manual_seed(1)
    rows = []
    for r in range(batch):
        text = geometry.text + (4 * r if ragged else 0)
        words = torch.randint(FIRST_WORD, geometry.vocab, (text,), generator=generator)
        rows.append(torch.cat([words[:SYSTEM], torch.full((geometry.visual,), IMAGE), words[SYSTEM:]]))
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=PAD) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    size = 14 * geometry.side
    pixels = torch.randn(batch, 3, size, size, generator=generator).to(geometry.dtype)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "pixel_values": pixels,
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def fix_features(model: Any, batch: int, geometry: Geometry) -> Tensor:
    """Make the model's vision side return features made beforehand, and return them: (batch, visual, hidden).

    With it no arm of a benchmark pays for the vision tower, and none has to be subtracted.
    """
    generator = torch.Generator().manual_seed(2)
    table = model.get_input_embeddings().weight
    features = torch.randn(batch, geometry.visual, geometry.hidden, generator=generator)
    features = (features * model.config.text_config.initializer_range).to(table.device, table.dtype)
    output = BaseModelOutputWithPooling(pooler_output=list(features))

    def get_image_features(*args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        return output

    model.model.get_image_features = get_image_features
    return features


def with_budget(geometry: Geometry, keep: int | None, layer: int | None) -> Geometry:
    """The geometry with another budget where one is given."""
    return dataclasses.replace(
        geometry,
        keep=geometry.keep if keep is None else keep,
        layer=geometry.layer if layer is None else layer,
    )
