"""Tiny checkpoints in folders, with the processor and a chat template of their family: what `from_pretrained` reads.

The models are those of `tiny`; a tokenizer of one token per character goes with their 128 ids. Processors of videos
need torchvision.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

import tiny
from tiny.glm import VIDEO_END, VIDEO_START
from tiny.mistral import BREAK, END
from tiny.tiles import TOKENS


def _tokenizer(special: dict[int, str], **named: str) -> Any:
    """One token per printable ASCII character, its id being its code; anything else is an unknown one.

    Args:
        special: the family's own tokens by id; ids from 9 to 31 are free for it, and 32 to 126 are characters.
        named: attributes the family's processor asks its tokenizer for, as token.
    """
    from transformers import PreTrainedTokenizerFast

    tokens = {0: "<pad>", 1: "<s>", 2: "</s>", 127: "<unk>", **special}
    known = {text: number for number, text in tokens.items()}
    known |= {chr(code): code for code in range(32, 127)}
    known |= {f"<unused{i}>": i for i in range(128) if i not in {*known.values()}}
    known["\n"] = known.pop("<unused31>")
    backend = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(text, special=True) for text in tokens.values()])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens=named,
    )
    return made


def _template(image: str, video: str = "") -> str:
    return (
        "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}"
        + image
        + "{% elif part['type'] == 'video' %}"
        + video
        + "{% else %}"
        "{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )


def _llava(model: Any) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    side = model.config.vision_config.image_size
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=_tokenizer({3: "<image>"}),
        patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("<image>\n"),
    )


def _llava_next(model: Any) -> Any:
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    side = model.config.vision_config.image_size
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=model.config.image_grid_pinpoints,
        ),
        tokenizer=_tokenizer({3: "<image>"}),
        patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("<image>\n"),
    )


def _llava_onevision(model: Any) -> Any:
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    side = model.config.vision_config.image_size
    size = {"height": side, "width": side}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=size, image_grid_pinpoints=model.config.image_grid_pinpoints
        ),
        tokenizer=_tokenizer({3: "<image>", 6: "<video>"}),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(side // model.config.vision_config.patch_size) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=model.config.vision_aspect_ratio,
        chat_template=_template("<image>\n", "<video>\n"),
    )


def _qwen(model: Any) -> Any:
    import transformers

    names = {
        "qwen2_vl": ("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
        "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
        "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
        "qwen3_5": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    }
    processor, videos = (getattr(transformers, name) for name in names[model.config.model_type])
    vision = model.config.vision_config
    made = {
        "size": {"shortest_edge": 16 * 16, "longest_edge": 48 * 48},
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    special = {3: "<|image_pad|>", 4: "<|vision_start|>", 5: "<|vision_end|>", 6: "<|video_pad|>"}
    return processor(
        image_processor=transformers.Qwen2VLImageProcessor(**made),
        tokenizer=_tokenizer(special),
        video_processor=videos(**made | {"size": {"shortest_edge": 16 * 16, "longest_edge": 48 * 48 * 4}}),
        chat_template=_template(
            "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
        ),
    )


def _internvl(model: Any) -> Any:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    side = model.config.vision_config.image_size[0]
    size = {"height": side, "width": side}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=6),
        tokenizer=_tokenizer(
            {3: "<IMG_CONTEXT>", 4: "<img>", 5: "</img>", 6: "<video>"},
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=model.config.image_seq_length,
        chat_template=_template("<IMG_CONTEXT>\n", "<video>\n"),
    )


def _idefics3(model: Any) -> Any:
    from transformers import (
        Idefics3ImageProcessor,
        Idefics3Processor,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    side = model.config.vision_config.image_size
    tiles = {8 + 3 * r + c: f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)}
    special = {3: "<image>", 6: "<video>", 7: "<fake_token_around_image>", 8: "<global-img>", **tiles}
    tokenizer = _tokenizer({**special, 30: "<end_of_utterance>"})
    size = {"size": {"longest_edge": 3 * side}, "max_image_size": {"longest_edge": side}}
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "image_seq_len": TOKENS,
        "chat_template": _template("<image>", "<video>"),
    }
    if model.config.model_type == "idefics3":
        return Idefics3Processor(image_processor=Idefics3ImageProcessor(**size), **options)
    video = SmolVLMVideoProcessor(
        size={"longest_edge": side},
        max_image_size={"longest_edge": side},
        video_sampling={"max_frames": 4, "fps": 1, "video_size": {"longest_edge": side}},
    )
    return SmolVLMProcessor(image_processor=SmolVLMImageProcessor(**size), video_processor=video, **options)


def _gemma3(model: Any) -> Any:
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    side = model.config.vision_config.image_size
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": side, "width": side}),
        tokenizer=_tokenizer(
            {3: "<image_soft_token>", 4: "<start_of_image>", 5: "<end_of_image>"},
            boi_token="<start_of_image>",
            eoi_token="<end_of_image>",
            image_token="<image_soft_token>",
        ),
        image_seq_length=model.config.mm_tokens_per_image,
        chat_template=_template("<start_of_image>"),
    )


def _mistral3(model: Any) -> Any:
    from transformers import PixtralImageProcessor, PixtralProcessor

    patch, merge = model.config.vision_config.patch_size, model.config.spatial_merge_size
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(
            size={"longest_edge": 48}, patch_size={"height": patch, "width": patch}
        ),
        tokenizer=_tokenizer({3: "[IMG]", BREAK: "[IMG_BREAK]", END: "[IMG_END]"}),
        patch_size=patch,
        spatial_merge_size=merge,
        chat_template=_template("[IMG]"),
    )


def _glm4v(model: Any) -> Any:
    from transformers import Glm4vImageProcessor, Glm4vProcessor, Glm4vVideoProcessor

    made = {"size": {"shortest_edge": 16 * 16, "longest_edge": 48 * 48 * 2}, "patch_size": 4, "merge_size": 2}
    return Glm4vProcessor(
        image_processor=Glm4vImageProcessor(**made),
        tokenizer=_tokenizer(
            {
                3: "<|image|>",
                4: "<|begin_of_image|>",
                5: "<|end_of_image|>",
                6: "<|video|>",
                VIDEO_START: "<|begin_of_video|>",
                VIDEO_END: "<|end_of_video|>",
            }
        ),
        video_processor=Glm4vVideoProcessor(**made),
        chat_template=_template(
            "<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>"
        ),
    )


PROCESSORS: dict[str, Callable[[Any], Any]] = {
    "llava": _llava,
    "vipllava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "qwen3_5": _qwen,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "gemma3": _gemma3,
    "mistral3": _mistral3,
    "glm4v": _glm4v,
}


def write(name: str, folder: Path) -> Path:
    """A checkpoint of a family of `PROCESSORS`.

    Raises:
        ImportError: its processor needs what is not installed.
    """
    model = tiny.build(name)
    model.save_pretrained(folder)
    PROCESSORS[name](model).save_pretrained(folder)
    return folder
