"""What is timed: a LLaVA of a given size with random weights, or a model of one's own, and prompts for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenprune.analysis.memory import Memory

PAD, BOS, EOS, IMAGE, FIRST_WORD = range(5)
SYSTEM = 5  # text tokens in front of the image
QUESTION = "What is in the picture?"


@dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder and of its prompt.

    Attributes:
        name: what `--geometry` takes.
        hidden, heads, kv_heads, layers, ffn, vocab: of the decoder.
        side, views: a prompt has `views` images of side x side visual tokens.
        text: text tokens of a prompt.
        dtype: of weights and states.
        decoder: "llama" or "qwen2".
    """

    name: str
    hidden: int
    heads: int
    kv_heads: int
    layers: int
    ffn: int
    vocab: int
    side: int
    text: int
    views: int = 1
    dtype: torch.dtype = torch.bfloat16
    decoder: str = "llama"

    @property
    def visual(self) -> int:
        """Visual tokens of a prompt."""
        return self.views * self.side * self.side


_VICUNA: dict[str, Any] = {
    "hidden": 4096,
    "heads": 32,
    "kv_heads": 32,
    "layers": 32,
    "ffn": 11008,
    "vocab": 32064,
}
GEOMETRIES = {
    g.name: g
    for g in (
        Geometry("tiny", 64, 4, 4, 4, 160, 64, side=6, text=9, dtype=torch.float32),
        Geometry("cpu", 1024, 16, 16, 16, 2816, 32000, side=24, text=17, dtype=torch.float32),
        Geometry("llava-1.5-7b", side=24, text=60, **_VICUNA),
        # 2,880 tokens as anyres makes them: five views of 576.
        Geometry("llava-next-7b", side=24, text=60, views=5, **_VICUNA),
        # The decoder of Qwen2.5-VL-7B behind LLaVA's class: grouped-query attention, 8,064 tokens, 1-D positions.
        Geometry(
            "qwen2.5-vl-7b", 3584, 28, 4, 28, 18944, 152064, side=24, text=60, views=14, decoder="qwen2"
        ),
    )
}


@dataclass
class Subject:
    """A stock model and its prompts.

    Attributes:
        name: of the geometry or the model.
        model: not wrapped.
        prompts: (batch, ragged) -> inputs of a forward, one kind of prompt in every row.
        inside: entered around everything that is timed, so that no arm pays for the vision tower.
        features: (images, n, D) of a batch's images; None where the ideal cannot be made (it knows LLaVA's class).
    """

    name: str
    model: Any
    prompts: Callable[[int, bool], dict[str, Tensor]]
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext
    features: Callable[[int], Tensor | None] = field(default=lambda batch: None)


def random_subject(
    geometry: Geometry, device: str = "cpu", attention: str = "sdpa", looks: bool = False
) -> Subject:
    """A geometry with random weights.

    Args:
        geometry: sizes.
        device, attention: as transformers takes them.
        looks: for a method that looks at pictures. Its small tower then runs once per batch size and is remembered;
            otherwise there is none, and the vision side returns features made beforehand.
    """
    model = build(geometry, device, attention)

    def batched(batch: int, ragged: bool) -> dict[str, Tensor]:
        return prompts(geometry, batch, ragged, device)

    if looks:
        memory = Memory()
        return Subject(geometry.name, model, batched, lambda: memory.features(model))
    return Subject(geometry.name, model, batched, features=lambda batch: fix_features(model, batch, geometry))


def own_subject(name: str, model: Any, processor: Any) -> Subject:
    """Somebody's model, asked about a picture of noise. The tower runs once per batch size; then it is remembered."""
    import numpy as np
    from PIL import Image

    from tokenprune.analysis.calibration import make_prompt
    from tokenprune.models import stock_model

    noise = np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    prompt = make_prompt(processor, [Image.fromarray(noise)], QUESTION)
    inner: Any = stock_model(model)
    memory = Memory()

    def batched(batch: int, ragged: bool) -> dict[str, Tensor]:
        inputs = {
            name: torch.cat([value] * batch) for name, value in prompt.items() if isinstance(value, Tensor)
        }
        for key, value in inputs.items():
            inputs[key] = value.to(inner.device, inner.dtype if value.is_floating_point() else None)
        mask = inputs["attention_mask"]
        if isinstance(inner, LlavaForConditionalGeneration):
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return inputs

    def features(batch: int) -> Tensor | None:
        if not isinstance(inner, LlavaForConditionalGeneration):
            return None
        with torch.inference_mode():
            return torch.stack(
                list(inner.model.get_image_features(batched(batch, False)["pixel_values"]).pooler_output)
            )

    return Subject(name, inner, batched, lambda: memory.features(model), features)


def build(geometry: Geometry, device: str = "cpu", attention: str = "sdpa") -> LlavaForConditionalGeneration:
    """A stock model with random weights."""
    make = {"llama": LlamaConfig, "qwen2": Qwen2Config}[geometry.decoder]
    text = make(
        hidden_size=geometry.hidden,
        intermediate_size=geometry.ffn,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.kv_heads,
        vocab_size=geometry.vocab,
        max_position_embeddings=16384,
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
        image_seq_length=geometry.side**2,
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
    """Inputs of a forward: images between two pieces of text, left padding, positions as generate() makes them.

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
    pixels = torch.randn(batch * geometry.views, 3, size, size, generator=generator).to(geometry.dtype)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "pixel_values": pixels,
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def fix_features(model: Any, batch: int, geometry: Geometry) -> Tensor:
    """Make the model's vision side return features made beforehand, and return them: (images, n, hidden).

    With it no arm of a benchmark pays for the vision tower, and none has to be subtracted.
    """
    generator = torch.Generator().manual_seed(2)
    table = model.get_input_embeddings().weight
    size = (batch * geometry.views, geometry.side**2, geometry.hidden)
    features = torch.randn(size, generator=generator) * model.config.text_config.initializer_range
    features = features.to(table.device, table.dtype)
    output = BaseModelOutputWithPooling(pooler_output=list(features))

    def get_image_features(*args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        return output

    model.model.get_image_features = get_image_features
    return features
