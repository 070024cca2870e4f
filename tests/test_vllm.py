"""vLLM itself with images pruned: against stock vLLM, against the library in transformers, and under load.

Run by `make test-vllm`, in an environment of its own; elsewhere skipped.
"""

from __future__ import annotations

from vllm_engine import engine  # sets what vLLM reads when it is imported

# isort: split

import json
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from vllm import LLM, SamplingParams

import tokenprune
from tokenprune_eval.checkpoints import CHAT_TEMPLATE, write_llava, write_old_layout
from tokenprune_eval.server import serving
from tokenprune_testbed import Sample, evaluate, evaluation_set, load
from tokenprune_testbed.language import chat_prompt
from tokenprune_testbed.loading import model_folder
from vllm_requests import budget, picture, post, words

pytestmark = pytest.mark.timeout(900)
COUNT = 40
# What `wrap` is asked for the same: cut once, before the LLM.
SETTINGS = {
    "uniform": {"method": "uniform", "keep": 0.25},
    "random": {"method": "random", "keep": 0.5},
    "vflowopt": {"method": "vflowopt", "keep": 0.25},
    "cells and entropy": {"method": "vflowopt", "keep": 0.15, "recycling": "cells", "alpha": 0.4, "t": 1.0},
    "a count": {"method": "vflowopt", "keep": 20},
    "looking ahead": {
        "method": "entropyprune",
        "lookahead": 2,
        "source": "hidden",
        "normalization": "trace",
        "keep": 0.4,
    },
    "looking ahead, queries": {"method": "entropyprune", "lookahead": 3, "keep": 0.6},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_old_layout(model_folder("small"), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def bed() -> tuple[Any, Any]:
    return load("small")


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    return evaluation_set(COUNT)  # the differences have two images


def ask(llm: LLM, processor: Any, samples: list[Sample], **more: Any) -> list[Any]:
    requests = [
        {
            "prompt": chat_prompt(processor, s.question, len(s.images)),
            "multi_modal_data": {"image": [Image.fromarray(image) for image in s.images]},
            **more,
        }
        for s in samples
    ]
    return list(llm.generate(requests, SamplingParams(temperature=0, max_tokens=6), use_tqdm=False))


def texts(outputs: list[Any]) -> list[str]:
    return [" ".join(out.outputs[0].text.split()) for out in outputs]


def in_transformers(bed: Any, samples: list[Sample], setting: dict[str, Any]) -> list[str]:
    more = {"size_term": False} if setting["method"] == "vflowopt" else {}
    with tokenprune.pruned(bed[0], **setting, layer=0, **more):
        return evaluate(*bed, samples, batch_size=1).answers


# -- what a server must not have ---------------------------------------------------------------------------------------


def rotary_rows(model: Any) -> int:
    """Positions that the decoder's table has; reading beyond it raises nothing."""
    return model.language_model.model.layers[0].self_attn.rotary_emb.cos_sin_cache.shape[0]


def test_no_position_lies_beyond_the_rotary_table(folder: Path, bed: Any, samples: list[Sample]) -> None:
    """A prompt that is too long unpruned is refused however few tokens it keeps; one that just fits is answered beyond
    the end of the model's own table, as the library answers; what others ask goes on as before."""
    from transformers import AutoConfig

    single = [s for s in samples if len(s.images) == 1][:6]
    length = max(len(bed[1].tokenizer(chat_prompt(bed[1], s.question, 1)).input_ids) for s in single) + 143
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = length  # decoding goes beyond it
    short = folder.with_name("short")
    shutil.copytree(folder, short)
    (short / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(short).text_config.max_position_embeddings == length
    setting = {"method": "uniform", "keep": 0.1}
    llm = engine(short, setting, max_model_len=length)
    (rows,) = llm.apply_model(rotary_rows)
    assert rows == 2 * length
    before = ask(llm, bed[1], single)
    assert texts(before) == in_transformers(bed, single, setting)
    picture = Image.fromarray(single[0].images[0])
    for count in (2, 4):
        prompt = {
            "prompt": chat_prompt(bed[1], single[0].question, count),
            "multi_modal_data": {"image": [picture] * count},
        }
        with pytest.raises(ValueError, match=rf"unpruned the prompt has .* has {length} positions"):
            llm.generate([prompt], SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
        again = ask(llm, bed[1], single)
        assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in before]


def test_a_prompt_that_ends_in_a_picture_is_refused(folder: Path, bed: Any, samples: list[Sample]) -> None:
    llm = engine(folder, {"method": "uniform", "keep": 0.5})
    one = {"prompt": "where <image>", "multi_modal_data": {"image": Image.fromarray(samples[0].images[0])}}
    with pytest.raises(ValueError, match="ends in a picture"):
        llm.generate([one], SamplingParams(max_tokens=2), use_tqdm=False)
    assert texts(ask(llm, bed[1], samples[:1]))


def test_what_is_not_served_pruned_is_refused_at_the_start() -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from tokenprune.serving import vllm as plugin

    plugin.register()
    for name in set(ModelRegistry.get_supported_archs()) - plugin.ARCHITECTURES.keys():
        if name.startswith("Tokenprune"):
            continue
        for given in ({"method": "uniform", "keep": 0.5}, "nonsense", 3):
            config = SimpleNamespace(
                additional_config={"tokenprune": given},
                model_config=SimpleNamespace(hf_config=SimpleNamespace(architectures=[name])),
            )
            with pytest.raises(tokenprune.ConfigError, match="is not served pruned; served are LlavaFor"):
                plugin.refuse(config)
        assert issubclass(MODELS_CONFIG_MAP[name], plugin._Configured)
        plugin.refuse(SimpleNamespace(additional_config={}))


def test_an_unknown_vllm_is_refused_unless_the_setting_takes_it(
    folder: Path, bed: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenprune.serving import vllm as plugin

    monkeypatch.setattr(plugin, "TESTED", ((0, 1), (0, 2)))
    with pytest.raises(Exception, match=r"was never tried with pruned images \(only 0\.1 to 0\.2\)"):
        engine(folder, {"method": "uniform", "keep": 0.5})
    llm = engine(folder, {"method": "uniform", "keep": 0.5, "any_vllm": True})
    assert texts(ask(llm, bed[1], samples[:2]))


def test_pipelines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenprune.serving import vllm as plugin

    config = SimpleNamespace(
        additional_config={"tokenprune": {"method": "uniform", "keep": 0.5}},
        speculative_config=None,
        parallel_config=SimpleNamespace(pipeline_parallel_size=2),
    )
    with pytest.raises(tokenprune.ConfigError, match="pipeline_parallel_size > 1"):
        plugin.configure(config)


def test_tensor_parallel_ranks_choose_alike(folder: Path, bed: Any, samples: list[Sample]) -> None:
    """Each rank has some of the tower's heads; scores of its own heads alone would keep other tokens."""
    setting = {"method": "vflowopt", "keep": 0.08, "even": 0.0}
    answers = [
        texts(ask(engine(folder, setting, tensor_parallel_size=ranks), bed[1], samples)) for ranks in (1, 2)
    ]
    assert answers[0] == answers[1]


def test_the_tower_is_given_no_more_than_stock_vllm_gives_it(
    folder: Path, bed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that keeps one token of a picture has not 144 times as many pictures encoded at once."""
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration as Stock

    calls: list[int] = []
    own = Stock.embed_multimodal

    def spy(model: Any, **fields: Any) -> Any:
        calls.append(len(fields["pixel_values"]))
        return own(model, **fields)

    monkeypatch.setattr(Stock, "embed_multimodal", spy)
    few = [s for s in evaluation_set(60) if len(s.images) == 1][:24]
    setting = {"method": "vflowopt", "keep": 0.5}
    llm = engine(folder, setting, max_num_batched_tokens=800, max_num_seqs=32)
    calls.clear()
    outputs = ask(llm, bed[1], few, mm_processor_kwargs={"tokenprune_keep": 1})
    assert max(calls) == 800 // 144 and sum(calls) > 10  # pictures that are alike are encoded once
    assert texts(outputs) == in_transformers(bed, few, {"method": "vflowopt", "keep": 1})


def test_a_picture_larger_than_the_encoders_cache_is_refused(
    folder: Path, bed: Any, samples: list[Sample]
) -> None:
    """It could never be scheduled, and everybody would wait behind it."""
    llm = engine(folder, {"method": "uniform", "keep": 0.1}, max_num_batched_tokens=100)
    with pytest.raises(Exception, match="encoder cache size"):
        ask(llm, bed[1], samples[:1], mm_processor_kwargs={"tokenprune_keep": 1.0})
    assert texts(ask(llm, bed[1], samples)) == in_transformers(
        bed, samples, {"method": "uniform", "keep": 0.1}
    )


def test_sizes_that_the_model_does_not_take_are_refused(
    folder: Path, bed: Any, samples: list[Sample]
) -> None:
    llm = engine(folder, {"method": "uniform", "keep": 0.25})
    before = texts(ask(llm, bed[1], samples[:6]))
    for kwargs in (
        {"size": {"height": 56, "width": 56}},
        {"images_kwargs": {"size": {"height": 300, "width": 96}}},
        {"size": {"shortest_edge": 300}, "do_center_crop": True, "crop_size": 300},
    ):
        with pytest.raises(ValueError, match="and the model takes"):
            ask(llm, bed[1], samples[:1], mm_processor_kwargs=kwargs)
    assert texts(ask(llm, bed[1], samples[:6])) == before


def test_requests_stay_within_the_servers_bounds(folder: Path, bed: Any, samples: list[Sample]) -> None:
    llm = engine(folder, {"method": "uniform", "keep": 0.25, "keep_min": 0.1, "keep_max": 72})
    token = bed[0].config.image_token_index
    for keep, rows in ((0.1, 14), (14, 14), (72, 72), (0.5, 72)):
        (out,) = ask(llm, bed[1], samples[:1], mm_processor_kwargs={"tokenprune_keep": keep})
        assert out.prompt_token_ids.count(token) == rows * len(samples[0].images)
    for keep, bound in (
        (13, "at least keep_min=0.1"),
        (0.05, "at least"),
        (73, "at most keep_max=72"),
        (1.0, "at most"),
    ):
        with pytest.raises(ValueError, match=bound):
            ask(llm, bed[1], samples[:1], mm_processor_kwargs={"tokenprune_keep": keep})


def test_a_budget_that_nobody_takes_is_refused(folder: Path, bed: Any, samples: list[Sample]) -> None:
    """On a server without the setting, and where only the processor would see it."""
    llm = engine(folder, None)
    with pytest.raises(ValueError, match="this server prunes no images"):
        ask(llm, bed[1], samples[:1], mm_processor_kwargs={"tokenprune_keep": 0.1})
    assert texts(ask(llm, bed[1], samples[:1]))
    llm = engine(folder, {"method": "uniform", "keep": 0.5})
    with pytest.raises(ValueError, match="belongs beside images_kwargs"):
        ask(llm, bed[1], samples[:1], mm_processor_kwargs={"images_kwargs": {"tokenprune_keep": 0.1}})


def test_more_places_than_pictures_are_refused(folder: Path, bed: Any, samples: list[Sample]) -> None:
    llm = engine(folder, {"method": "uniform", "keep": 0.5})
    one = {
        "prompt": "USER <image> and <image> ?",
        "multi_modal_data": {"image": [Image.fromarray(samples[0].images[0])]},
    }
    with pytest.raises(ValueError, match="places for more pictures"):
        llm.generate([one], SamplingParams(max_tokens=2), use_tqdm=False)


def test_pictures_named_by_uuid(folder: Path, bed: Any, samples: list[Sample]) -> None:
    """Sent once and named afterwards, each budget a picture of its own."""
    setting = {"method": "vflowopt", "keep": 0.25}
    llm = engine(folder, setting)
    one = next(s for s in samples if len(s.images) == 1)
    prompt = chat_prompt(bed[1], one.question, 1)

    def go(given: Any, **more: Any) -> Any:
        request = {
            "prompt": prompt,
            "multi_modal_data": {"image": [given]},
            "multi_modal_uuids": {"image": ["a"]},
            **more,
        }
        return llm.generate([request], SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)

    first = go(Image.fromarray(one.images[0]))
    assert texts(first) == in_transformers(bed, [one], setting)
    again = go(None)
    assert again[0].outputs[0].token_ids == first[0].outputs[0].token_ids
    assert again[0].prompt_token_ids == first[0].prompt_token_ids
    other = {"mm_processor_kwargs": {"tokenprune_keep": 0.1}}
    with pytest.raises(ValueError, match="data is not provided"):
        go(None, **other)
    few = go(Image.fromarray(one.images[0]), **other)
    assert texts(few) == texts(go(None, **other)) == in_transformers(bed, [one], {**setting, "keep": 0.1})


def test_stores_that_servers_share_know_the_setting(folder: Path, bed: Any, samples: list[Sample]) -> None:
    """An item's hash is other for other settings, also where the client named it."""

    def hashes(setting: Any) -> list[str]:
        llm = engine(folder, setting)
        processor = llm.llm_engine.renderer.get_mm_processor()
        items = processor.info.parse_mm_data({"image": [Image.fromarray(samples[0].images[0])]})
        token = bed[0].config.image_token_index
        found = []
        for uuids in (None, {"image": ["a"]}):
            out = processor([1, token, 1], items, mm_uuid_items=uuids)
            found += out["mm_hashes"]["image"]
        return found

    settings: list[Any] = [
        *(None, {"method": "uniform", "keep": 0.5}, {"method": "uniform", "keep": 0.25}),
        *({"method": "vflowopt", "keep": 0.25}, {"method": "vflowopt", "keep": 0.25, "t": 2.0}),
    ]
    found = [hashes(setting) for setting in settings]
    assert hashes(settings[3]) == found[3]
    for own in zip(*found, strict=True):
        assert len(set(own)) == len(settings)


def test_speculative_decoding_is_refused() -> None:
    from tokenprune.serving import vllm as plugin

    config = SimpleNamespace(
        additional_config={"tokenprune": {"method": "uniform", "keep": 0.5}},
        speculative_config=SimpleNamespace(method="eagle"),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )
    with pytest.raises(tokenprune.ConfigError, match="speculative decoding"):
        plugin.configure(config)


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.runners
def test_without_a_setting_vllm_is_untouched(folder: Path, bed: Any, samples: list[Sample]) -> None:
    llm = engine(folder, None)
    config = llm.llm_engine.vllm_config.model_config
    assert config.hf_config.architectures == ["LlavaForConditionalGeneration"]
    assert not config.uses_mrope and not hasattr(config.hf_config, "tokenprune")
    outputs = ask(llm, bed[1], samples)
    assert texts(outputs) == evaluate(*bed, samples, batch_size=1).answers
    whole = engine(folder, {"method": "vflowopt", "keep": 1.0})
    assert whole.llm_engine.vllm_config.model_config.uses_mrope
    again = ask(whole, bed[1], samples)
    assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in outputs]
    assert [o.prompt_token_ids for o in again] == [o.prompt_token_ids for o in outputs]


@pytest.mark.runners
@pytest.mark.parametrize("name", SETTINGS)
def test_answers_are_the_librarys(folder: Path, bed: Any, samples: list[Sample], name: str) -> None:
    """In transformers, with the same keep lists and the original positions."""
    setting = SETTINGS[name]
    outputs = ask(engine(folder, setting), bed[1], samples)
    token = bed[0].config.image_token_index
    keep = setting["keep"]
    kept = keep if isinstance(keep, int) else int(keep * 144)
    for out, sample in zip(outputs, samples, strict=True):
        assert out.prompt_token_ids.count(token) == kept * len(sample.images)
    if name != "random":  # seeded by what each engine sees of the picture
        expected = in_transformers(bed, samples, setting)
        same = sum(a == b for a, b in zip(texts(outputs), expected, strict=True))
        assert same == len(samples)


@pytest.mark.runners
def test_prompts_in_pieces(folder: Path, bed: Any, samples: list[Sample]) -> None:
    """A prefill cut in the middle of images gives the same answers."""
    setting = {"method": "vflowopt", "keep": 0.25}
    pieces = engine(folder, setting, max_num_batched_tokens=160, max_num_seqs=4, max_model_len=150)
    assert texts(ask(pieces, bed[1], samples)) == in_transformers(bed, samples, setting)


@pytest.mark.runners
def test_images_side_by_side(folder: Path, bed: Any) -> None:
    """No text between three pictures: each still starts where the one before it ends unpruned."""
    model, processor = bed
    (sample,) = [s for s in evaluation_set(10) if s.family == "counting"]
    images = [Image.fromarray(sample.images[0])] * 3
    text = chat_prompt(processor, "how many digits ?", 3).replace("<image> <image>", "<image><image>")
    llm = engine(folder, {"method": "uniform", "keep": 0.3})
    (out,) = llm.generate(
        [{"prompt": text, "multi_modal_data": {"image": images}}],
        SamplingParams(temperature=0, max_tokens=4, logprobs=3),
        use_tqdm=False,
    )
    inputs = processor(images=images, text=[text], return_tensors="pt", add_special_tokens=False)
    with tokenprune.pruned(model, "uniform", layer=0, keep=0.3):
        expected = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    first = next(iter(out.outputs[0].logprobs[0].values())).logprob
    wanted = expected.logits[0][0].log_softmax(-1).max().item()
    assert first == pytest.approx(wanted, abs=2e-3)
    assert out.outputs[0].token_ids[0] == int(expected.logits[0][0].argmax())


# -- budgets of requests, and caches -----------------------------------------------------------------------------------


@pytest.mark.runners
def test_budgets_of_requests(folder: Path, bed: Any, samples: list[Sample]) -> None:
    """Two budgets of one picture are two entries of every cache; asked again, each is as it was."""
    llm = engine(folder, {"method": "vflowopt", "keep": 0.25}, enable_prefix_caching=True)
    token = bed[0].config.image_token_index
    few = samples[:12]
    expected = {
        keep: in_transformers(bed, few, {"method": "vflowopt", "keep": keep}) for keep in (0.25, 0.1, 60)
    }
    for keep in (0.25, 0.1, 60, 0.1, 0.25, 60):
        outputs = ask(llm, bed[1], few, mm_processor_kwargs={"tokenprune_keep": keep})
        assert texts(outputs) == expected[keep]
        rows = keep if isinstance(keep, int) else int(keep * 144)
        assert all(
            o.prompt_token_ids.count(token) == rows * len(s.images) for o, s in zip(outputs, few, strict=True)
        )
    assert texts(ask(llm, bed[1], few)) == expected[0.25]


@pytest.mark.parametrize("keep", [0, 2.5, "much", True])
def test_a_requests_wrong_budget_is_refused(folder: Path, bed: Any, samples: list[Sample], keep: Any) -> None:
    llm = _shared(folder)
    with pytest.raises(ValueError, match="tokenprune_keep"):
        ask(llm, bed[1], samples[:1], mm_processor_kwargs={"tokenprune_keep": keep})
    assert texts(ask(llm, bed[1], samples[:2]))  # the engine goes on


_LLMS: dict[Path, LLM] = {}


def _shared(folder: Path) -> LLM:
    if folder not in _LLMS:
        _LLMS[folder] = engine(folder, {"method": "uniform", "keep": 0.25})
    return _LLMS[folder]


@pytest.mark.parametrize(
    ("setting", "advice"),
    [
        ({"method": "fastv", "keep": 0.2}, "fastv"),
        ({"method": "uniform", "keep": 0.2, "layer": 2}, "before the LLM only"),
        ({"keep": 0.2}, "which method"),
    ],
)
def test_a_wrong_setting_stops_the_start(folder: Path, setting: dict[str, Any], advice: str) -> None:
    with pytest.raises(Exception, match=advice):
        engine(folder, setting)


# -- LLaVA-NeXT --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def next_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small LLaVA-NeXT of random weights: as transformers saves it, and as vLLM reads it."""
    import torch
    from transformers import (
        AutoTokenizer,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
    )
    from transformers import LlavaNextImageProcessor as ImageProcessor

    base = write_llava(tmp_path_factory.mktemp("tokenizer"), layers=1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            **shape, num_hidden_layers=3, image_size=56, patch_size=7, projection_dim=64
        ),
        text_config=LlamaConfig(
            **shape,
            num_hidden_layers=4,
            num_key_value_heads=4,
            vocab_size=len(tokenizer),
            max_position_embeddings=2048,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
    )
    model = LlavaNextForConditionalGeneration(config)
    for name, weight in model.named_parameters():  # so that answers differ from picture to picture
        if weight.ndim > 1 and "norm" not in name:
            torch.nn.init.normal_(weight, std=0.08)
    folder = tmp_path_factory.mktemp("next")
    model.save_pretrained(folder)
    LlavaNextProcessor(
        image_processor=ImageProcessor(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder, write_old_layout(folder, tmp_path_factory.mktemp("next-old"))


@pytest.mark.runners
@pytest.mark.parametrize(
    "setting", [{"method": "uniform", "keep": 0.3}, {"method": "vflowopt", "keep": 0.2, "alpha": 0.5}]
)
def test_llava_next(next_folder: tuple[Path, Path], setting: dict[str, Any]) -> None:
    """Pictures of any resolution: newlines stay, positions are the library's, and so are the first tokens' chances."""
    import numpy as np
    import torch
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    source, folder = next_folder
    model = LlavaNextForConditionalGeneration.from_pretrained(source).eval()
    processor = AutoProcessor.from_pretrained(source)
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8))
        for h, w in ((90, 40), (60, 120), (100, 100))
    ]
    prompts = [
        (pictures[:1], "USER: <image> yes no ASSISTANT:"),
        (pictures[1:], "USER: <image> A <image> B word ASSISTANT:"),
    ]
    llm = engine(folder, setting)
    outputs = llm.generate(
        [{"prompt": text, "multi_modal_data": {"image": images}} for images, text in prompts],
        SamplingParams(temperature=0, max_tokens=3, logprobs=1, ignore_eos=True),
        use_tqdm=False,
    )
    more = {"size_term": False} if setting["method"] == "vflowopt" else {}
    token = model.config.image_token_id
    for (images, text), out in zip(prompts, outputs, strict=True):
        inputs = processor(images=images, text=[text], return_tensors="pt")
        inputs["input_ids"], inputs["attention_mask"] = _with_start(out, inputs, token)
        with tokenprune.pruned(model, **setting, layer=0, **more), torch.no_grad():
            found = model.generate(
                **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            told = tokenprune.report(model)
        rows = sum(image.kept[-1] + image.structural for image in told.images)
        assert out.prompt_token_ids.count(token) == rows
        for step, logits in zip(out.outputs[0].logprobs, found.logits, strict=True):
            (best,) = [chance.logprob for chance in step.values()][:1]
            assert best == pytest.approx(float(logits[0].log_softmax(-1).max()), abs=5e-3)
        assert list(out.outputs[0].token_ids) == found.sequences[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def internvl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small InternVL of random weights, tiles of 4 x 4 tokens."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        InternVLVisionConfig,
        PreTrainedTokenizerFast,
        Qwen2Config,
    )

    special = ["<unk>", "<pad>", "<eos>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    words = [*special, "yes", "no", "A", "B", "word", "USER:", "ASSISTANT:"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens={**marks, "video_token": "<video>"},
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    text = {**shape, "num_hidden_layers": 3, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            **shape, num_hidden_layers=2, image_size=[56, 56], patch_size=[7, 7]
        ),
        text_config=Qwen2Config(**text, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        downsample_ratio=0.5,
    )
    model = InternVLForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "norm" not in name:
            torch.nn.init.normal_(weight, std=0.08)
    folder = tmp_path_factory.mktemp("internvl")
    model.save_pretrained(folder)
    size = {"height": 56, "width": 56}
    InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=16,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


@pytest.mark.runners
@pytest.mark.parametrize(
    "setting", [{"method": "uniform", "keep": 0.3}, {"method": "vflowopt", "keep": 0.25, "alpha": 0.5}]
)
def test_internvl(internvl: Path, setting: dict[str, Any]) -> None:
    """All tiles of a picture share a budget; chances and tokens are the library's."""
    import numpy as np
    import torch
    from transformers import AutoProcessor, InternVLForConditionalGeneration

    model = InternVLForConditionalGeneration.from_pretrained(internvl).eval()
    processor = AutoProcessor.from_pretrained(internvl)
    rng, sizes = np.random.default_rng(0), ((90, 40), (60, 120), (56, 56))
    pictures = [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in sizes]
    prompts = [
        (pictures[:1], "USER: <IMG_CONTEXT> yes no ASSISTANT:"),
        (pictures[1:], "USER: <IMG_CONTEXT> A <IMG_CONTEXT> B word"),
    ]
    outputs = engine(internvl, setting).generate(
        [{"prompt": text, "multi_modal_data": {"image": images}} for images, text in prompts],
        SamplingParams(temperature=0, max_tokens=3, logprobs=1, ignore_eos=True),
        use_tqdm=False,
    )
    more = {"size_term": False} if setting["method"] == "vflowopt" else {}
    tiles = {"crop_to_patches": True, "min_patches": 1, "max_patches": 4}
    for (images, text), out in zip(prompts, outputs, strict=True):
        inputs = processor(images=images, text=[text], return_tensors="pt", **tiles)
        with tokenprune.pruned(model, **setting, layer=0, **more), torch.no_grad():
            found = model.generate(
                **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            told = tokenprune.report(model)
        assert out.prompt_token_ids.count(model.config.image_token_id) == told.kept
        for step, logits in zip(out.outputs[0].logprobs, found.logits, strict=True):
            best = max(chance.logprob for chance in step.values())
            assert best == pytest.approx(float(logits[0].log_softmax(-1).max()), abs=5e-3)
        new = found.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        assert list(out.outputs[0].token_ids) == new


@pytest.mark.parametrize("kwargs", [{"crop_to_patches": False}, {"max_patches": 2}, {"max_patches": 12}, {}])
def test_internvl_is_counted_as_it_was_made(internvl: Path, kwargs: dict[str, Any]) -> None:
    """Whatever a request has its processor do, the share is of what that made, at its positions."""
    import numpy as np
    import torch
    from transformers import AutoProcessor, InternVLForConditionalGeneration

    model = InternVLForConditionalGeneration.from_pretrained(internvl).eval()
    processor = AutoProcessor.from_pretrained(internvl)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 200, 3), dtype=np.uint8))
    prompt, setting = "USER: <IMG_CONTEXT> yes no ASSISTANT:", {"method": "uniform", "keep": 0.5}
    llm = engine(internvl, setting)
    (out,) = llm.generate(
        [{"prompt": prompt, "multi_modal_data": {"image": [image]}, "mm_processor_kwargs": kwargs}],
        SamplingParams(temperature=0, max_tokens=3, ignore_eos=True),
        use_tqdm=False,
    )
    inputs = processor(
        images=[image],
        text=[prompt],
        return_tensors="pt",
        **{"crop_to_patches": True, "min_patches": 1, "max_patches": 4, **kwargs},
    )
    with tokenprune.pruned(model, **setting, layer=0), torch.no_grad():
        found = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        told = tokenprune.report(model)
    assert out.prompt_token_ids.count(model.config.image_token_id) == told.kept
    assert list(out.outputs[0].token_ids) == found[0, inputs["input_ids"].shape[1] :].tolist()


def _with_start(out: Any, inputs: Any, token: int) -> tuple[Any, Any]:
    """vLLM's prompt, its pictures' tokens as many as transformers wants."""
    import torch

    text = [i for i in out.prompt_token_ids if i != token]
    own = inputs["input_ids"][0].tolist()
    assert [i for i in own if i != token] == text
    return inputs["input_ids"], torch.ones_like(inputs["input_ids"])


def test_different_pictures_side_by_side_are_refused(next_folder: tuple[Path, Path]) -> None:
    pictures = [Image.new("RGB", size, (9, 9, 90)) for size in ((40, 90), (120, 60))]
    llm = engine(next_folder[1], {"method": "uniform", "keep": 0.3})
    with pytest.raises(ValueError, match="side by side"):
        llm.generate(
            [{"prompt": "USER: <image><image> ASSISTANT:", "multi_modal_data": {"image": pictures}}],
            use_tqdm=False,
        )


def test_tiles_that_the_model_does_not_take_are_refused(next_folder: tuple[Path, Path]) -> None:
    import torch
    from transformers import AutoConfig

    from tokenprune.serving.vllm.llava_next import Tiled

    pictures = Tiled(AutoConfig.from_pretrained(next_folder[1]))
    tiles = torch.ones(1, 5, 3, 56, 56)
    sizes = {"image_sizes": torch.tensor([[100, 100]])}
    pictures.check({"pixel_values": tiles, **sizes})
    padded = torch.cat([tiles, torch.zeros(1, 2, 3, 56, 56)], dim=1)
    pictures.check({"pixel_values": padded, **sizes})
    for wrong in (tiles[:, :3], torch.cat([tiles, tiles], dim=1)):
        with pytest.raises(ValueError, match="leave image_grid_pinpoints out"):
            pictures.check({"pixel_values": wrong, **sizes})
    with pytest.raises(ValueError, match="the model takes 56 x 56"):
        pictures.check({"pixel_values": tiles[..., :50], **sizes})


# -- the server, under load --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    setting = json.dumps({"tokenprune": {"method": "vflowopt", "keep": 0.25}})
    words = ["--dtype", "float32", "--max-model-len", "600", "--max-num-seqs", "8"]
    words += ["--trust-request-mm-kwargs", "--limit-mm-per-prompt", '{"image": 3}']
    words += ["--additional-config", setting]
    with serving(folder, *words, VLLM_ENABLE_V1_MULTIPROCESSING="1") as url:
        yield url


def test_a_load_of_mixed_requests(server: str) -> None:
    """200 at once: text only, one picture, three, other budgets, broken pictures. Each is answered or refused."""
    rng = random.Random(0)
    samples = [s for s in evaluation_set(60) if len(s.images) == 1]
    jobs = []
    for number in range(200):
        sample, kind = rng.choice(samples), number % 5
        asked = words(sample.question)
        one = picture(sample.images[0])
        if kind == 0:
            jobs.append(([words("how many digits ?")], {}, 200, 0))
        elif kind == 1:
            jobs.append(([one, asked], {}, 200, 36))
        elif kind == 2:
            jobs.append(([one, one, picture(rng.choice(samples).images[0]), asked], {}, 200, 3 * 36))
        elif kind == 3:
            keep = rng.choice([0.1, 0.5, 20])
            rows = keep if isinstance(keep, int) else int(keep * 144)
            jobs.append(([one, asked], budget(keep), 200, rows))
        else:
            broken = picture(b"no picture at all")
            jobs.append(([broken, asked], {}, 400, 0))
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda job: post(server, job[0], **job[1]), jobs))
    text_only = min(a["usage"]["prompt_tokens"] for _, a in answers if "usage" in a)
    for (content, _, status, rows), (got, answer) in zip(jobs, answers, strict=True):
        if status == 400:
            assert 400 <= got < 600 and "error" in json.dumps(answer).lower()
            continue
        assert got == 200, answer
        assert answer["choices"][0]["message"]["content"].strip()
        length = len(content[-1]["text"].split())
        images = sum(part["type"] == "image_url" for part in content)
        # The prompt is its words, what the template puts around them, and the rows that are kept.
        assert abs(answer["usage"]["prompt_tokens"] - (text_only - 4 + length + rows)) <= 2 + images
    assert post(server, [words("how many digits ?")])[0] == 200
