"""The processor: saved, loaded by AutoProcessor, and feeding the model what training fed it."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from tokenprune_testbed import evaluation_set
from tokenprune_testbed.dense import pixel_values
from tokenprune_testbed.language import chat_prompt
from tokenprune_testbed.modeling import (
    BOS,
    EOS,
    IMAGE,
    NUM_VISUAL_TOKENS,
    PAD,
    SMALL,
    WORD_IDS,
    build_processor,
)
from tokenprune_testbed.questions import QA
from tokenprune_testbed.scenes import make_scene


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    build_processor().save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture
def image():
    return make_scene(np.random.default_rng(0)).image


def test_prompt_is_encoded_word_by_word(processor, image):
    inputs = processor(
        images=[image], text=[chat_prompt(processor, "where is the star ?")], return_tensors="pt"
    )
    question, _ = SMALL.ids(QA("where is the star ?", "top left", "position"))
    assert inputs["input_ids"][0].tolist() == [BOS] + [IMAGE] * NUM_VISUAL_TOKENS + question
    assert WORD_IDS["<pad>"] == PAD == processor.tokenizer.pad_token_id
    assert processor.tokenizer.eos_token_id == EOS


def test_a_96_pixel_image_passes_unscaled(processor, image):
    pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, pixel_values([image]), atol=1e-5, rtol=1e-5)


def test_other_sizes_are_resized_whole(processor, image):
    large = Image.fromarray(image).resize((300, 200))
    inputs = processor(
        images=[large], text=[chat_prompt(processor, "where is the star ?")], return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)
    assert (inputs["input_ids"] == IMAGE).sum() == NUM_VISUAL_TOKENS


def test_two_images_and_left_padding(processor, image):
    texts = [
        chat_prompt(processor, "which digit is new ?", 2),
        chat_prompt(processor, "how many digits ?", 1),
    ]
    inputs = processor(images=[image] * 3, text=texts, return_tensors="pt", padding=True)
    assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [2 * NUM_VISUAL_TOKENS, NUM_VISUAL_TOKENS]
    assert inputs["pixel_values"].shape[0] == 3
    assert inputs["input_ids"][1, 0] == PAD
    assert inputs["attention_mask"][1, 0] == 0
    assert inputs["attention_mask"][:, -1].all()


@pytest.mark.parametrize("num_images", [1, 2])
def test_chat_template_gives_the_training_prompt(processor, image, num_images):
    question = QA("which digit is new ?", "two", "difference")
    text = [chat_prompt(processor, question.question, num_images)]
    templated = processor(images=[image] * num_images, text=text, add_special_tokens=False)["input_ids"][0]
    assert templated == [*SMALL.prefix, *[IMAGE] * (num_images * NUM_VISUAL_TOKENS), *SMALL.ids(question)[0]]


def test_chat_template_tokenizes_images_and_several_turns(processor, image):
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": Image.fromarray(image)},
                {"type": "text", "text": "how many digits ?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
        {"role": "user", "content": "where is the star ?"},
    ]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    first = SMALL.ids(QA("how many digits ?", "two", "counting"))
    second = SMALL.ids(QA("where is the star ?", "top left", "position"))
    expected = [BOS] + [IMAGE] * NUM_VISUAL_TOKENS + first[0] + first[1] + second[0]
    assert inputs["input_ids"][0].tolist() == expected
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)


def test_answers_survive_the_round_trip(processor):
    for sample in evaluation_set(70):
        ids = processor.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
        assert processor.decode([*ids, EOS, PAD], skip_special_tokens=True).split() == sample.answer.split()
