"""tokenprune inside lmms-eval: found by it, every kind of request, its numbers, and its errors."""

from __future__ import annotations

import json
import re
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import tokenprune
from tokenprune import ConfigError
from tokenprune.cli.shell import InputError
from tokenprune.profiles.profile import Profile
from tokenprune_eval.checkpoints import write_llava
from tokenprune_testbed import evaluate, evaluation_set
from tokenprune_testbed.language import make_inputs

pytest.importorskip("lmms_eval")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import get_model
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import simple_parse_args_string

from tokenprune.lmms import manifest
from tokenprune.lmms.conversation import from_messages, sample_frames, user_turn, videos_as_frames
from tokenprune.lmms.meter import Meter
from tokenprune.lmms.model import (
    Chat,
    Simple,
    _check_hash,
    generation_options,
    limit_pixels,
    read_arguments,
)
from tokenprune_eval.lmms.run import FailedError, accuracy, run_lmms_eval
from tokenprune_eval.lmms.testbed import GROUP, task_name, write_tasks

pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.xdist_group("lmms"), pytest.mark.slow]
RED = Image.new("RGB", (96, 96), (200, 0, 0))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("tasks")
    return folder, write_tasks(folder, 20)


def small(slot: type[Any], **more: Any) -> Any:
    return slot(pretrained="small", device="cpu", dtype="float32", **{"method": "auto", "keep": 0.25, **more})


def run(model: Any, folder: Path, *names: str) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        manager = TaskManager("ERROR", include_path=[str(folder)], include_defaults=False)
        found = simple_evaluate(
            model=model,
            tasks=list(names),
            task_manager=manager,
            batch_size=model.batch_size,
            log_samples=True,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
    assert isinstance(found, dict)
    return found


# -- found by lmms-eval ------------------------------------------------------------------------------------------


def test_lmms_eval_finds_it() -> None:
    """A load error of a plug-in is but a warning there."""
    own = [point for point in entry_points(group="lmms_eval.models") if point.name == "tokenprune"]
    assert len(own) == 1 and own[0].load() is manifest
    assert get_model("tokenprune") is Chat
    assert get_model("tokenprune", force_simple=True) is Simple


# -- the testbed's tasks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", [Chat, Simple])
def test_accuracies_are_the_evaluators(tasks: Any, slot: type[Any]) -> None:
    folder, samples = tasks
    model = small(slot)
    stock = model.model  # which lmms-eval takes from the object in the end
    results = run(model, folder, GROUP)
    tokenprune.unwrap(stock)
    with tokenprune.pruned(stock, keep=0.25):
        ours = evaluate(stock, model.processor, samples, batch_size=1)
    assert {f: accuracy(results, task_name(f)) for f in ours.families} == {
        f: s.accuracy for f, s in ours.families.items()
    }
    assert accuracy(results, GROUP) == pytest.approx(ours.overall.accuracy)
    said = [
        " ".join(sample["filtered_resps"][0].split())
        for family in ours.families
        for sample in sorted(results["samples"][task_name(family)], key=lambda s: s["doc_id"])
    ]
    assert said == ours.answers
    noted = results["throughput"]
    assert noted["avg_retention_average"] == pytest.approx(0.25, abs=0.005)
    assert noted["avg_visual_tokens"] == pytest.approx(144 * 1.1)  # one question in ten has two pictures
    assert noted["avg_kept_tokens"] < 0.25 * noted["avg_visual_tokens"]
    assert 0 < noted["avg_drift"] < 0.1
    assert all(noted[f"avg_{name}"] > 0 for name in ("kv_mb", "ttft_ms", "ms_per_output_token"))


def test_batches_answer_as_one_by_one(tasks: Any) -> None:
    folder, _ = tasks
    results = [run(small(Chat, batch_size=size, drift=0), folder, GROUP) for size in (1, 7)]
    said = [
        {(name, s["doc_id"]): s["filtered_resps"] for name, own in found["samples"].items() for s in own}
        for found in results
    ]
    assert said[0] == said[1] and len(said[0]) == 20
    assert "avg_drift" not in results[0]["throughput"]
    for found in results:
        counts = [s["token_counts"][0] for own in found["samples"].values() for s in own]
        visual, kept, average = (
            [c[f"{what}_tokens"] for c in counts] for what in ("visual", "kept", "average")
        )
        assert set(visual) == {144, 288} and all(
            0 < k < a < v for k, a, v in zip(kept, average, visual, strict=True)
        )
        assert sum(kept) / len(kept) == pytest.approx(found["throughput"]["avg_kept_tokens"])
        assert "[stages, cuts at layers 0" in found["config"]["model_backend"]
        assert f"tokenprune {tokenprune.__version__}]" in found["config"]["model_backend"]


def test_an_automatic_batch_is_halved_where_memory_runs_out(
    tasks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = tasks
    model = small(Chat, batch_size="auto", max_batch_size=7, drift=0)
    generate, sizes = type(model)._generate, []

    def little_memory(self: Any, conversations: Any, *more: Any) -> Any:
        sizes.append(len(conversations))
        if len(conversations) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(self, conversations, *more)

    monkeypatch.setattr(Chat, "_generate", little_memory)
    found = run(model, folder, GROUP)
    assert sizes[:2] == [7, 3] and max(sizes[1:]) == 3
    assert sum(len(own) for own in found["samples"].values()) == sum(sizes[1:])
    fixed = small(Chat, batch_size=7, drift=0)
    with pytest.raises(torch.OutOfMemoryError):
        run(fixed, folder, GROUP)


def test_unpruned_is_the_same_path(tasks: Any) -> None:
    folder, samples = tasks
    model = small(Chat, method="none", keep=None)
    stock = model.model
    results = run(model, folder, GROUP)
    tokenprune.unwrap(stock)
    whole = evaluate(stock, model.processor, samples, batch_size=1)
    assert accuracy(results, GROUP) == pytest.approx(whole.overall.accuracy)
    assert results["throughput"]["avg_retention_average"] == 1.0
    assert results["throughput"]["avg_drift"] == pytest.approx(0, abs=1e-9)


def test_the_command(tasks: Any, tmp_path: Path) -> None:
    folder, _ = tasks
    include = ("--include_path", str(folder), "--device", "cpu")
    args = "pretrained=small,dtype=float32,method=uniform,layer=0,keep=25%"
    found = run_lmms_eval(args, task_name("tint"), tmp_path / "out", *include, batch_size=2, timeout=250)
    assert found["config"]["model"] == "tokenprune" and found["config"]["model_args"] == args
    assert found["throughput"]["avg_retention_average"] == 0.25
    with pytest.raises(FailedError, match="unknown method"):
        run_lmms_eval(
            "pretrained=small,method=nosuch,keep=0.5", task_name("tint"), tmp_path / "out", *include
        )


# -- a stranger's task and a stranger's model --------------------------------------------------------------------

FOREIGN_UTILS = """
def visuals(doc):
    from PIL import Image
    return [Image.new("RGB", (80, 50), tuple(doc["color"]))]

def rounds(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return doc["question"]
    if round_idx == 3:
        return None, None, True, previous_output, None
    return visuals(doc), "and now ?", False, previous_output, {"seen": round_idx}

def count_rounds(doc, results):
    said = results[0]
    return {"rounds": float(len(said) if isinstance(said, list) else len(said[0]))}
"""
FOREIGN = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_visual": "!function utils.visuals",
        "doc_to_text": "{{question}}",
        "doc_to_target": "gold",
        "doc_to_choice": ["yes", "no", "A B"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "talk": {
        "output_type": "generate_until_multi_round",
        "doc_to_visual": "!function utils.visuals",
        "doc_to_text": "!function utils.rounds",
        "doc_to_target": "gold",
        "process_results": "!function utils.count_rounds",
        "generation_kwargs": {"max_new_tokens": 3, "until": ["zzz"]},
        "metric_list": [{"metric": "rounds", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks as lmms-eval's own documentation has them: a YAML, a JSON file, a module of functions."""
    import yaml

    folder = tmp_path_factory.mktemp("foreign")
    (folder / "utils.py").write_text(FOREIGN_UTILS)
    documents = [
        {"question": f"is it {name} ?", "color": color, "gold": number % 3}
        for number, (name, color) in enumerate(
            {"red": (200, 0, 0), "blue": (0, 0, 200), "grey": (9, 9, 9)}.items()
        )
    ]
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    for name, task in FOREIGN.items():
        common = {"task": f"foreign_{name}", "dataset_path": "json", "test_split": "test"}
        text = yaml.safe_dump({**common, "dataset_kwargs": {"data_files": {"test": str(data)}}, **task})
        (folder / f"{name}.yaml").write_text(re.sub(r"'(!function [\w.]+)'", r"\1", text))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("llava"), layers=6, image_size=84)


@pytest.mark.parametrize(("method", "layer"), [("entropyprune", 1), ("uniform", 0)])
def test_choices_of_a_strangers_task(foreign: Path, checkpoint: Path, method: str, layer: int) -> None:
    given = {"method": method, "keep": 0.5, "layer": layer, "pretrained": str(checkpoint), "device": "cpu"}
    results = {size: run(Simple(batch_size=size, **given), foreign, "foreign_choices") for size in (1, 4)}
    assert results[1]["results"]["foreign_choices"]["acc,none"] in (0, 1 / 3, 2 / 3, 1)
    logs = {
        size: [s["filtered_resps"] for s in found["samples"]["foreign_choices"]]
        for size, found in results.items()
    }
    for one, other in zip(logs[1], logs[4], strict=True):
        assert np.array(one, float) == pytest.approx(np.array(other, float), abs=1e-4)
    assert results[1]["throughput"]["avg_kept_tokens"] < 36


@pytest.mark.parametrize("slot", [Chat, Simple])
def test_rounds_of_a_strangers_task(foreign: Path, checkpoint: Path, slot: type[Any]) -> None:
    model = slot(pretrained=str(checkpoint), device="cpu", method="vflowopt", keep=0.4)
    results = run(model, foreign, "foreign_talk")
    assert results["results"]["foreign_talk"]["rounds,none"] == 3


def test_a_strangers_model_class(tasks: Any, checkpoint: Path) -> None:
    """Somebody's own lmms class, which wraps what it has loaded as the README says."""
    from lmms_eval.api.model import lmms
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    class Mine(lmms):
        is_simple = True

        def __init__(self) -> None:
            super().__init__()
            self.processor = AutoProcessor.from_pretrained(checkpoint)
            self.model = LlavaForConditionalGeneration.from_pretrained(checkpoint)
            tokenprune.wrap(self.model, "entropyprune", keep=0.5, layer=1)
            self.kept: list[int] = []

        batch_size = 1

        def generate_until(self, requests: Any) -> list[str]:
            answers = []
            for context, _, visual, number, task, split in (r.args for r in requests):
                images = visual(self.task_dict[task][split][number])
                text = f"USER: {'<image> ' * len(images)}{context} ASSISTANT:"
                inputs = self.processor(images=images, text=text, return_tensors="pt")
                output = self.model.generate(**inputs, max_new_tokens=2, do_sample=False)
                answers.append(self.processor.decode(output[0, inputs["input_ids"].shape[1] :]))
                self.kept.append(tokenprune.report(self.model).kept)
            return answers

        def loglikelihood(self, requests: Any) -> Any:
            raise NotImplementedError

        generate_until_multi_round = loglikelihood

    model = Mine()
    found = run(model, tasks[0], GROUP)
    assert set(model.kept) == {14, 28}  # of 36 a picture, half on average over six layers, cut at the second
    assert 0 <= accuracy(found, GROUP) <= 1


def test_log_likelihood_is_the_forwards() -> None:
    """Teacher-forced in one stock forward, without pruning."""
    model = small(Simple, method="none", keep=None, drift=0)
    sample = evaluation_set(10, seed=3)[0]
    image = Image.fromarray(sample.images[0])
    model.task_dict = {"t": {"test": [None]}}
    targets = [sample.answer, "two red things", "no"]
    requests = [
        SimpleNamespace(args=(sample.question, target, lambda _: [image], 0, "t", "test"))
        for target in targets
    ]
    found = [result.text for result in model.loglikelihood(requests)]
    inputs = make_inputs(model.processor, [sample])
    for target, (log, greedy) in zip(targets, found, strict=True):
        ids = torch.tensor([model.tokenizer(target, add_special_tokens=False)["input_ids"]])
        whole = torch.cat([inputs["input_ids"], ids], 1)
        with torch.inference_mode():
            logits = model.model(
                input_ids=whole, pixel_values=inputs["pixel_values"], attention_mask=torch.ones_like(whole)
            ).logits[:, -ids.shape[1] - 1 : -1]
        expected = logits.log_softmax(-1).gather(2, ids[..., None]).sum()
        assert log == pytest.approx(float(expected), abs=1e-3)
        assert greedy is bool((logits.argmax(-1) == ids).all())
    assert found[0][1] and not found[1][1]


# -- what a conversation is made of ------------------------------------------------------------------------------


def test_marks_say_where_pictures_stand() -> None:
    (turn,) = user_turn([RED, [RED]], "first <image 1> then <image 2> ?")
    assert [part["type"] for part in turn["content"]] == ["text", "image", "text", "image", "text"]
    (turn,) = user_turn([RED], "what is <image 1> to <image 2> ?")
    assert [part["type"] for part in turn["content"]] == ["image", "text"]
    assert user_turn(None, "q")[0]["content"] == [{"type": "text", "text": "q"}]


def test_messages_of_lmms_eval() -> None:
    given = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}, {"type": "text", "text": "q"}]}]
    assert from_messages(given)[0]["content"][0] == {"type": "video", "video": "a.mp4"}
    with pytest.raises(ConfigError, match="audio"):
        from_messages([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}])


def test_videos_of_models_that_see_pictures_only(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 96, "yuv420p"
        for level in range(0, 200, 10):
            frame = av.VideoFrame.from_ndarray(np.full((96, 96, 3), level, np.uint8), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    frames = sample_frames(str(path), 4)
    levels = [np.asarray(frame).mean() for frame in frames]
    assert levels == pytest.approx([0, 50, 100, 150], abs=8)
    assert len(sample_frames(frames, 9)) == 4
    turns = videos_as_frames(user_turn([str(path)], "q"), 3)
    assert [part["type"] for part in turns[0]["content"]] == ["image"] * 3 + ["text"]
    with pytest.raises(ConfigError, match="cannot be read"):
        sample_frames(str(tmp_path / "missing.mp4"), 3)
    model = small(Chat, max_num_frames=3, drift=0)
    said = model._generate([user_turn([str(path)], "how many digits ?")], {"max_new_tokens": 2}, Meter())
    assert said[0].text and tokenprune.report(model.model).tokens == 3 * 144


class VideoProcessor:
    """Notes what a processor with eyes for videos would be asked."""

    chat_template, video_processor, tokenizer = "x", object(), None

    def apply_chat_template(self, turns: Any, **options: Any) -> Any:
        self.turns, self.options = turns, options
        return SimpleNamespace(to=lambda *_, **__: "inputs")


def test_videos_of_models_that_see_them() -> None:
    model = small(Chat, max_num_frames=5)
    model.processor = VideoProcessor()
    assert model._inputs([user_turn(["v.mp4"], "q")]) == "inputs"
    assert model.processor.options["num_frames"] == 5
    assert model.processor.turns[0][0]["content"][0] == {"type": "video", "video": "v.mp4"}


# -- arguments and errors ----------------------------------------------------------------------------------------


def test_arguments_as_lmms_eval_reads_them() -> None:
    asked = read_arguments(
        {"method": "entropyprune", "keep": 192, "layer": 2, "strict": True, "source": "hidden"}
    )
    assert (asked.method, asked.keep, asked.layer, asked.strict) == ("entropyprune", 192, 2, True)
    assert dict(asked.parameters) == {"source": "hidden"}
    assert read_arguments({"profile": "auto", "keep": 0.25}).method == "auto"
    assert read_arguments({"method": "uniform", "cuts": "'2:50%,9:25%'".strip("'")}).cuts is not None


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"method": "nosuch", "keep": 0.5}, "unknown method"),
        ({"method": "uniform"}, "how much"),
        ({"method": "uniform", "keep": 0.5, "batch_size": "many"}, "batch_size"),
        ({"method": "uniform", "keep": 0.5, "batch_size": 0}, "batch_size"),
        ({"method": "uniform", "keep": 0.5, "profile_hash": "ab"}, "profile_hash"),
        ({"method": "uniform", "keep": 0.5, "attn_implementation": "fast"}, "attention"),
        ({"profile": "missing.json"}, "missing.json"),
    ],
)
def test_wrong_arguments(given: dict[str, Any], advice: str) -> None:
    with pytest.raises(tokenprune.TokenPruneError, match=advice):
        Chat(pretrained="small", device="cpu", **given)


def test_a_profile_and_its_hash(tmp_path: Path) -> None:
    from tokenprune_testbed import load

    known = next(iter(Path(tokenprune.profiles.__file__).parent.glob("bundled/*.json")))
    profile = Profile.load(known)
    model, _ = load("small")
    from tokenprune.fingerprint import fingerprint

    if profile.model != fingerprint(model):
        profile = next(
            p for p in map(Profile.load, known.parent.glob("*.json")) if p.model == fingerprint(model)
        )
    path = profile.save(tmp_path / "p.json")
    given = {"pretrained": "small", "device": "cpu", "profile": str(path)}
    wrapped = Chat(**given, profile_hash=profile.hash[:12])
    assert tokenprune.is_wrapped(wrapped.model)
    for wrong in ("0" * 12, "", 123, 1e10):
        with pytest.raises(ConfigError, match="hash"):
            Chat(**given, profile_hash=wrong)


@pytest.mark.parametrize("start", ["123456", "00420a", "12e456", "1e5abc", "7"])
def test_a_hash_that_looks_like_a_number(start: str) -> None:
    """lmms-eval reads 123456 and 12e4 as numbers before the adapter sees them."""
    profile = SimpleNamespace(hash=(start + "f" * 64)[:64])
    for n in range(1, len(start) + 1):
        read = simple_parse_args_string(f"profile_hash={profile.hash[:n]}")["profile_hash"]
        _check_hash(profile, read)
    with pytest.raises(ConfigError, match="hash"):
        _check_hash(profile, 31415)


def test_pixels_are_limited_where_a_processor_scales_to_them() -> None:
    processor = SimpleNamespace(image_processor=Qwen2VLImageProcessorPil())
    limit_pixels(processor, 1003520, 1003520)
    assert dict(processor.image_processor.size)["longest_edge"] == 1003520
    picture = Image.new("RGB", (1600, 900))
    grid = processor.image_processor(picture, return_tensors="pt")["image_grid_thw"][0]
    assert abs(int(grid.prod()) * 14 * 14 / 1003520 - 1) < 0.05
    for least, most, text in ((5, 4, "more than"), ("x", None, "number of pixels"), (0, None, "number of")):
        with pytest.raises(ConfigError, match=text):
            limit_pixels(processor, least, most)
    with pytest.raises(ConfigError, match="takes no min_pixels or max_pixels"):
        Chat(pretrained="small", device="cpu", keep=0.25, min_pixels=1003520, max_pixels=1003520)


def test_bad_model_arguments() -> None:
    with pytest.raises(ConfigError, match="say which model: --model_args pretrained="):
        Chat(keep=0.25)
    with pytest.raises(InputError, match="dtype is auto, float32"):
        Chat(pretrained="small", dtype="float128", keep=0.25)
    with pytest.raises(ConfigError, match="temperature takes a number, not 'hot'"):
        generation_options({"temperature": "hot"})


def test_generation_options() -> None:
    assert generation_options({"until": ["\n"], "image_aspect_ratio": "pad"}) == {
        "do_sample": False,
        "max_new_tokens": 1024,
    }
    assert generation_options({"temperature": 0, "top_p": 0.9, "max_new_tokens": 5}) == {
        "do_sample": False,
        "max_new_tokens": 5,
    }
    sampled = generation_options({"temperature": 0.7, "top_p": 0.9, "do_sample": True, "num_beams": 1})
    assert sampled["do_sample"] is True and sampled["temperature"] == 0.7
