"""The testbed's model and processor, built from stock Transformers classes without any download."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

try:  # the name of the PIL variant in Transformers 5; earlier versions call it just CLIPImageProcessor
    from transformers import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

from tokenprune_testbed.grounds import IMAGE_SIZE
from tokenprune_testbed.language import Language
from tokenprune_testbed.pages import page_vocabulary
from tokenprune_testbed.questions import QA, vocabulary

PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
NUM_VISUAL_TOKENS = GRID * GRID
WIDTH = 128

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<image>")
PAD, BOS, EOS, IMAGE = range(len(SPECIAL_TOKENS))
WORDS = (*SPECIAL_TOKENS, "USER", "ASSISTANT", *vocabulary())
WORD_IDS = {word: index for index, word in enumerate(WORDS)}


PAGE_WORDS = (*WORDS, *page_vocabulary())


def word_language(words: Sequence[str]) -> Language:
    """Of a model whose every word is a token."""
    ids = {word: index for index, word in enumerate(words)}

    def of(qa: QA) -> tuple[list[int], list[int]]:
        question = [ids[w] for w in f"USER {qa.question} ASSISTANT".split()]
        return question, [ids[w] for w in qa.answer.split()] + [EOS]

    return Language(prefix=(BOS,), pad=PAD, end=EOS, first=ids.__getitem__, ids=of)


SMALL, PAGES = word_language(WORDS), word_language(PAGE_WORDS)

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{% if message['content'] is string %}{{ ' USER ' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ ' <image>' }}{% endif %}{% endfor %}"
    "{{ ' USER' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ ' ' + part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{% else %}{{ ' ASSISTANT ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{{ ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT' }}{% endif %}"
)


def build_config(num_layers: int = 16, words: Sequence[str] = WORDS) -> LlavaConfig:
    """About 3.9 M parameters with 16 decoder layers; 144 visual tokens per image."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=64,
    )
    text = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 5 // 2,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(words),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return join_config(vision, text, IMAGE)


def join_config(vision: CLIPVisionConfig, text: LlamaConfig, image: int) -> LlavaConfig:
    """A LLaVA of a tower and a decoder, whose vocabulary has the image token `image`."""
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image,
        image_token_index=image,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=NUM_VISUAL_TOKENS,
        tie_word_embeddings=True,
    )


def build_model(num_layers: int = 16, words: Sequence[str] = WORDS) -> LlavaForConditionalGeneration:
    """A randomly initialised model whose word embeddings and output head are one tensor."""
    model = LlavaForConditionalGeneration(build_config(num_layers, words))
    if model.lm_head.weight is not model.get_input_embeddings().weight:
        raise RuntimeError("word embeddings and output head must be tied")
    # A larger start than CLIP's: with the usual 0.02 the tower learns to ignore where patches are.
    torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.5)
    return model


def join_processor(
    tokenizer: PreTrainedTokenizerFast, chat_template: str, image: str = "<image>"
) -> LlavaProcessor:
    """CLIP's image processor, which passes a 96 x 96 image unscaled, and a tokenizer with the image token `image`."""
    image_processor = CLIPImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=chat_template,
        image_token=image,
        num_additional_image_tokens=1,  # CLS, which "default" drops again
    )


def build_processor(words: Sequence[str] = WORDS) -> LlavaProcessor:
    """Word-level tokenizer, CLIP image processor and chat template."""
    ids = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    return join_processor(tokenizer, CHAT_TEMPLATE)
