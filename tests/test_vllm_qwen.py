"""Qwen-VL pruned inside vLLM: tokens and chances are the library's in transformers, with the same keep lists.

Run by `make test-vllm`, in an environment of its own and with both of vLLM's runners; elsewhere skipped.
"""

from __future__ import annotations

from vllm_engine import V2, engine  # sets what vLLM reads when it is imported

# isort: split

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vllm import SamplingParams

import tokenprune
from tokenprune_eval.qwen_checkpoint import IMAGE, VIDEO, write_qwen

pytestmark = [pytest.mark.timeout(900), pytest.mark.runners]
KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
NEW = 8
SETTINGS: dict[str, dict[str, Any]] = {
    "uniform": {"method": "uniform", "keep": 0.3},
    "vflowopt": {"method": "vflowopt", "keep": 0.25, "recycling": "none"},
    "hopfield": {"method": "vflowopt", "keep": 0.25, "recycling": "hopfield"},
    "cells and entropy": {"method": "vflowopt", "keep": 20, "recycling": "cells", "alpha": 0.4, "t": 1.0},
}
SIZES = ((112, 168), (224, 140), (280, 280), (84, 336), (150, 97), (420, 308))


@dataclass
class Answer:
    tokens: list[int]
    chances: list[float]
    image_tokens: int = 0


def picture(number: int, size: tuple[int, int] | None = None) -> Image.Image:
    """Smooth random colours: patches differ, neighbours are alike."""
    height, width = size or SIZES[number % len(SIZES)]
    coarse = np.random.default_rng(number).integers(0, 255, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def asked(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


Prompt = tuple[str, list[Image.Image]]


def prompts() -> list[Prompt]:
    return [
        (asked(IMAGE + "What is it?"), [picture(0)]),
        (asked(f"Look: {IMAGE} and {IMAGE} which is red?"), [picture(1), picture(2)]),
        (asked(IMAGE + IMAGE + "Close together."), [picture(3), picture(4)]),
        (asked("No picture at all, only text."), []),
        (asked(f"{IMAGE} x {IMAGE} y {IMAGE} z"), [picture(5), picture(2), picture(0)]),
        (asked(IMAGE + "What is it, again?"), [picture(0)]),
    ]


@pytest.fixture(scope="session", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def bed(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


def in_transformers(
    bed: tuple[Any, Any], cases: list[Prompt], setting: dict[str, Any] | None
) -> list[Answer]:
    model, processor = bed
    more = {} if setting is None else {"layer": 0, **setting}
    if more.get("method") == "vflowopt":
        more["size_term"] = False
    found = []
    for text, images in cases:
        inputs = processor(text=[text], images=images or None, return_tensors="pt")
        prune = more and images
        with tokenprune.pruned(model, **more) if prune else nullcontext(), torch.no_grad():
            out = model.generate(
                **inputs,
                max_new_tokens=NEW,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                eos_token_id=-1,
            )
            rows = tokenprune.report(model).kept if prune else 0
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        chances = [
            float(own[0].log_softmax(-1)[token]) for own, token in zip(out.logits, tokens, strict=True)
        ]
        found.append(Answer(tokens, chances, rows))
    return found


def in_vllm(llm: Any, cases: list[Prompt], **more: Any) -> list[Answer]:
    requests = [
        {"prompt": text, **({"multi_modal_data": {"image": images}, **more} if images else {})}
        for text, images in cases
    ]
    params = SamplingParams(temperature=0, max_tokens=NEW, logprobs=1, ignore_eos=True)
    token = llm.llm_engine.vllm_config.model_config.hf_config.image_token_id
    found = []
    for out in llm.generate(requests, params, use_tqdm=False):
        own = out.outputs[0]
        chances = [step[t].logprob for step, t in zip(own.logprobs, own.token_ids, strict=True)]
        found.append(Answer(list(own.token_ids), chances, out.prompt_token_ids.count(token)))
    return found


def check(ours: list[Answer], theirs: list[Answer]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.tokens == b.tokens and a.image_tokens == b.image_tokens
        assert a.chances == pytest.approx(b.chances, abs=1e-4)


@pytest.mark.parametrize("step", [1024, 64])
@pytest.mark.parametrize("name", SETTINGS)
def test_answers_are_the_librarys(folder: Path, bed: Any, name: str, step: int) -> None:
    """In one step and in steps that cut pictures; asked again, from the caches; with a budget of the request's own."""
    setting, cases = SETTINGS[name], prompts()
    llm = engine(folder, setting, max_num_batched_tokens=step, max_num_seqs=4, enable_prefix_caching=True)
    expected = in_transformers(bed, cases, setting)
    check(in_vllm(llm, cases), expected)
    check(in_vllm(llm, cases), expected)
    own = in_vllm(llm, cases[:2], mm_processor_kwargs={"tokenprune_keep": 0.1})
    check(own, in_transformers(bed, cases[:2], {**setting, "keep": 0.1}))
    del llm


def test_without_a_setting_and_with_all_kept(folder: Path, bed: Any) -> None:
    cases = prompts()
    stock = in_vllm(engine(folder, None), cases)
    assert [a.tokens for a in stock] == [a.tokens for a in in_transformers(bed, cases, None)]
    check(in_vllm(engine(folder, {"method": "vflowopt", "keep": 1.0}), cases), stock)


def blocks_held(folder: Path, setting: dict[str, Any] | None) -> list[int]:
    """KV blocks of 32 that each prompt holds at most."""
    llm = engine(folder, setting, block_size=32, enable_prefix_caching=False, max_num_seqs=1)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool, own = scheduler.kv_cache_manager.block_pool, scheduler.schedule
    busy, held = [0], []

    def schedule(*args: Any) -> Any:
        out = own(*args)
        busy.append(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        return out

    scheduler.schedule = schedule
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    for text, images in prompts():
        busy.clear()
        request = {"prompt": text, **({"multi_modal_data": {"image": images}} if images else {})}
        (out,) = llm.generate([request], params, use_tqdm=False)
        # The last token is never written.
        assert max(busy) == -(-(len(out.prompt_token_ids) + NEW - 1) // 32)
        held.append(max(busy))
    return held


@pytest.mark.skipif(V2, reason="of the scheduler, which knows of no runner")
def test_kv_blocks_are_those_of_what_is_kept(folder: Path) -> None:
    whole, pruned = (blocks_held(folder, setting) for setting in (None, {"method": "uniform", "keep": 0.3}))
    assert all(few <= many for few, many in zip(pruned, whole, strict=True))
    assert sum(pruned) < 0.7 * sum(whole)


@pytest.mark.skipif(V2, reason="ranks are processes, to which Triton's interpreter is not handed on")
def test_tensor_parallel_ranks_choose_alike(folder: Path, bed: Any) -> None:
    setting, cases = {"method": "vflowopt", "keep": 0.1, "even": 0.0}, prompts()
    llm = engine(folder, setting, tensor_parallel_size=2)
    check(in_vllm(llm, cases), in_transformers(bed, cases, setting))


def test_embeddings_are_pruned_by_what_needs_no_picture(folder: Path) -> None:
    """And refused by the rest, before they reach the engine, which goes on."""
    rng = torch.Generator().manual_seed(0)
    embeds = torch.randn(48, 128 * (3 if folder.name.startswith("qwen3") else 1), generator=rng)
    data = {"image": {"image_embeds": embeds, "image_grid_thw": torch.tensor([[1, 12, 16]])}}
    request = {"prompt": prompts()[0][0], "multi_modal_data": data}
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    for setting in (SETTINGS["uniform"], SETTINGS["hopfield"]):
        llm = engine(folder, setting, enable_mm_embeds=True)
        before = in_vllm(llm, prompts()[:2])
        if setting["method"] == "uniform":
            (out,) = llm.generate([request], params, use_tqdm=False)
            token = llm.llm_engine.vllm_config.model_config.hf_config.image_token_id
            assert out.prompt_token_ids.count(token) == int(0.3 * 48)
        else:
            with pytest.raises(ValueError, match="not as embeddings"):
                llm.generate([request], params, use_tqdm=False)
        check(in_vllm(llm, prompts()[:2]), before)
        del llm


# -- videos ------------------------------------------------------------------------------------------------------------


KNOWN: dict[str, Any] = {
    **{"fps": 2.0, "duration": 4.0, "total_num_frames": 8, "frames_indices": list(range(8))},
    **{"video_backend": "opencv", "height": 168, "width": 224},
}


def film() -> Any:
    """(8, 168, 224, 3) frames, two of a kind."""
    return np.stack([np.asarray(picture(20 + i // 2, (168, 224))) for i in range(8)])


def processed(processor: Any, text: str, images: list[Image.Image]) -> Any:
    """A prompt with the film, and with these pictures, as transformers takes it."""
    from transformers.video_utils import VideoMetadata

    return processor(
        text=[text],
        images=images or None,
        videos=[film()],
        video_metadata=[VideoMetadata(**KNOWN)],
        do_sample_frames=False,
        return_tensors="pt",
    )


def requested(text: str, images: list[Image.Image]) -> dict[str, Any]:
    """The same as vLLM takes it."""
    video = [(film(), {**KNOWN, "do_sample_frames": False})]
    return {
        "prompt": text,
        "multi_modal_data": {**({"image": images} if images else {}), "video": video},
    }


def rope_of_qwen(ids: dict[int, str], speed: float) -> Any:
    """Positions by Qwen's own rule, which is vLLM's: text goes on behind a video's last second.

    transformers 5.19 goes on behind its width, unpruned, too, and so cannot be the judge of what follows a video.
    """

    def rope(input_ids: Any, *_: Any, second_per_grid_ts: Any = None, **more: Any) -> Any:
        grids = {
            kind: iter(more.get(f"{kind}_grid_thw", torch.empty(0, 3)).tolist()) for kind in ids.values()
        }
        seconds = iter([] if second_per_grid_ts is None else torch.as_tensor(second_per_grid_ts).tolist())
        tokens, at, after = input_ids[0].tolist(), 0, 0
        found: list[Any] = []
        while at < len(tokens):
            if (kind := ids.get(tokens[at])) is None:
                found.append(np.full((3, 1), after))
                after, at = after + 1, at + 1
                continue
            t, h, w = next(grids[kind])
            own = np.indices((t, h // 2, w // 2)).reshape(3, -1)
            if kind == "video":
                own[0] = (own[0] * next(seconds, 1.0) * speed).astype(np.int64)
            found.append(own + after)
            after, at = int(found[-1].max()) + 1, at + own.shape[1]
        positions = torch.from_numpy(np.concatenate(found, axis=1))[:, None]
        return positions, torch.tensor([[after - len(tokens)]])

    return rope


@pytest.mark.parametrize("step", [1024, 64])
@pytest.mark.parametrize("setting", [SETTINGS["uniform"], SETTINGS["hopfield"]], ids=["uniform", "hopfield"])
def test_videos(
    folder: Path, bed: Any, setting: dict[str, Any], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, and beside a picture; the share is of the whole video."""
    model, processor = bed
    if model.config.model_type == "qwen3_vl":
        pytest.skip("see below")
    ids = {getattr(model.config, f"{kind}_token_id"): kind for kind in ("image", "video")}
    speed = getattr(model.config.vision_config, "tokens_per_second", 1.0)
    monkeypatch.setattr(model.model, "get_rope_index", rope_of_qwen(ids, speed))
    cases = [(asked(VIDEO + "What happens?"), []), (asked(f"First {IMAGE} then {VIDEO} what?"), [picture(1)])]
    more = {"layer": 0, **setting}
    if setting["method"] == "vflowopt":
        more["size_term"] = False
    expected = []
    for text, images in cases:
        inputs = processed(processor, text, images)
        with tokenprune.pruned(model, **more), torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
            expected.append((out[0, inputs["input_ids"].shape[1] :].tolist(), tokenprune.report(model).kept))
    llm = engine(
        folder,
        setting,
        max_num_batched_tokens=step,
        max_num_seqs=4,
        limit_mm_per_prompt={"image": 4, "video": 1},
    )
    requests = [requested(text, images) for text, images in cases]
    found = llm.generate(
        requests, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True), use_tqdm=False
    )
    ours = [
        (list(out.outputs[0].token_ids), sum(out.prompt_token_ids.count(token) for token in ids))
        for out in found
    ]
    assert ours == expected


@pytest.mark.parametrize("step", [1024, 64])
def test_videos_of_qwen3(folder: Path, bed: Any, step: int) -> None:
    """Timestamps stand between the frames, and each has the share."""
    from tokenprune.methods.uniform import even_tokens
    from tokenprune.tokens import Grid

    model, processor = bed
    if model.config.model_type != "qwen3_vl":
        pytest.skip("of Qwen3-VL")
    text = asked(f"First {IMAGE} then {VIDEO} what?")
    inputs = processed(processor, text, [picture(1)])
    one, (t, h, w) = inputs["image_grid_thw"][0] // 2, (inputs["video_grid_thw"][0]).tolist()
    h, w, setting = h // 2, w // 2, {"method": "uniform", "keep": 0.3}
    share = even_tokens((Grid(1, h, w),), int(0.3 * h * w))
    own = even_tokens((Grid(1, int(one[1]), int(one[2])),), int(0.3 * int(one[1]) * int(one[2])))
    lists = [[[own, [frame * h * w + i for frame in range(t) for i in share]]]]
    with tokenprune.pruned(model, "uniform", layer=0, keep_lists=lists), torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
        kept = tokenprune.report(model).kept
    llm = engine(
        folder,
        setting,
        max_num_batched_tokens=step,
        max_num_seqs=4,
        limit_mm_per_prompt={"image": 4, "video": 1},
    )
    (found,) = llm.generate(
        [requested(text, [picture(1)])],
        SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True),
        use_tqdm=False,
    )
    tokens = [getattr(model.config, f"{kind}_token_id") for kind in ("image", "video")]
    assert sum(found.prompt_token_ids.count(token) for token in tokens) == kept
    assert list(found.outputs[0].token_ids) == out[0, inputs["input_ids"].shape[1] :].tolist()
