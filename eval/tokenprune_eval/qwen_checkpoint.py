"""Small Qwen-VL checkpoints of random weights, processor and chat template included, for runs without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

CLASSES: dict[str, tuple[Any, Any, Any, Any]] = {
    "qwen2_vl": (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    ),
    "qwen2_5_vl": (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
    ),
    "qwen3_vl": (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    ),
}
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Qwen2.5-VL's own, shortened.
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}"
    + IMAGE
    + "{% elif part['type'] == 'video' %}"
    + VIDEO
    + "{% elif "
    "'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_qwen(
    kind: str, folder: Path, layers: int = 3, width: int = 128, context: int = 8192, seed: int = 0
) -> Path:
    """A model and processor as Qwen's folders hold them; the weights are wide enough for answers to differ by picture.

    Args:
        kind: of `CLASSES`.
        folder: where to.
        layers: of the decoder.
        width: of the decoder.
        context: positions of the decoder.
        seed: of the weights.
    """
    config_class, model_class, processor_class, video_class = CLASSES[kind]
    tokenizer = _tokenizer(context)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in _SPECIAL}
    vision: dict[str, Any] = {
        "depth": 4,
        "num_heads": 2,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 64,
        "max_position_embeddings": context,
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "tie_word_embeddings": False,
    }
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 64, "hidden_size": width, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": width}
    if kind == "qwen2_5_vl":
        vision |= {"window_size": 112, "fullatt_block_indexes": [1, 3]}
    if kind == "qwen3_vl":
        vision |= {"num_position_embeddings": 256, "deepstack_visual_indexes": [0, 2]}
        rope["mrope_interleaved"] = True
        text["head_dim"] = 32
    config = config_class(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(seed)
    model = model_class(config)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "norm" not in name:
            torch.nn.init.normal_(weight, std=0.08)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(folder)
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 4096}
    made: dict[str, Any] = {"size": size, "patch_size": 14, "merge_size": 2}
    if kind == "qwen3_vl":
        made |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor_class(
        image_processor=Qwen2VLImageProcessor(**made),
        tokenizer=tokenizer,
        video_processor=video_class(**made),
        chat_template=_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def _tokenizer(context: int) -> PreTrainedTokenizerFast:
    """Every byte one token: any text can be said and read back."""
    known = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=known, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(_SPECIAL),
        model_max_length=context,
    )
