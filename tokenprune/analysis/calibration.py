"""Calibration samples: images with a prompt each, from wherever they are, as inputs for the model.

A source is a folder of images, a JSONL file, a Hugging Face dataset, or a testbed. Nothing of it is executed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune import testbeds
from tokenprune.errors import ConfigError, SkippedFilesWarning
from tokenprune.files import given_path
from tokenprune.images import SUFFIXES, as_rgb, open_image
from tokenprune.optional import check_installed

if TYPE_CHECKING:
    from PIL import Image

PROMPT = "Describe the image."
_HUB = "hf:"
_READING = "reading a Hugging Face dataset"
_IMAGE_NAMES, _PROMPT_NAMES = ("image", "images"), ("prompt", "question", "text")
_ANSWER_NAMES, _FAMILY_NAMES = ("answers", "answer"), ("family", "category", "question_type")


@dataclass(frozen=True)
class CalibrationSample:
    """RGB images and the prompt about them; where the source says so, right answers and the kind of question.

    Attributes:
        name: where it comes from, for people: a file, or a record of a data set.
    """

    images: tuple[Image.Image, ...]
    prompt: str = PROMPT
    answers: tuple[str, ...] = ()
    family: str = ""
    name: str = ""


def load_calibration(source: str | Path, limit: int = 64, *, seed: int = 0) -> list[CalibrationSample]:
    """Up to `limit` samples of a source.

    Args:
        source: "testbed" or "testbed:NAME" (training pictures of a testbed); a folder of images; a .jsonl file with
            {"image": path or list of paths, "prompt": text} per line and perhaps "answer" and "family", paths relative
            to it; a folder that datasets' save_to_disk wrote; or "hf:OWNER/NAME", "hf:OWNER/NAME:SPLIT" for a dataset
            on the hub (needs `datasets`).
        limit: how many.
        seed: which ones, out of a folder, a dataset on disk or the testbed; a file and the hub are read from the start.

    Raises:
        ConfigError: nothing usable there; says what is wrong with it.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigError(f"the number of samples must be an int of at least 1, not {limit!r}")
    text = str(source)
    testbed = testbeds.named_by(text)
    path = Path(text) if text.startswith(_HUB) or testbed is not None else given_path(source)
    if testbed is not None:
        found = _from_testbed(testbed, limit, seed)
    elif text.startswith(_HUB):
        found = _from_hub(text[len(_HUB) :], limit)
    elif path.suffix.lower() == ".jsonl" and path.is_file():
        found = _from_jsonl(path, limit)
    elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        found = _from_disk(path, limit, seed)
    elif path.is_dir():
        found = _from_folder(path, limit, seed)
    else:
        raise ConfigError(
            f"there are no calibration samples at {text!r}; give a folder of images, a .jsonl file, a dataset "
            f"folder, 'hf:OWNER/NAME' or 'testbed'"
        )
    samples = list(found)
    if not samples:
        raise ConfigError(f"{text!r} holds no images ({', '.join(s[1:] for s in SUFFIXES)})")
    return samples


def calibration_calls(
    processor: Any, samples: Sequence[CalibrationSample], device: Any = None
) -> Iterator[Any]:
    """Each sample as inputs of the model (a batch of one), through the processor's chat template.

    Raises:
        ConfigError: the processor has no chat template.
    """
    for sample in samples:
        inputs = make_prompt(processor, sample.images, sample.prompt)
        yield inputs if device is None else inputs.to(device)


def make_prompt(processor: Any, images: Sequence[Image.Image], text: str) -> Any:
    """Inputs of a model for one question of a user about images, made by its processor's chat template.

    Raises:
        ConfigError: the processor has no chat template, or can make nothing of the text.
    """
    if getattr(processor, "chat_template", None) is None:
        raise ConfigError(
            "this model's processor has no chat template, so prompts cannot be made; use another checkpoint"
        )
    for placeholder in ("image_token", "video_token"):
        token = getattr(processor, placeholder, None)
        if isinstance(token, str) and token in text:
            raise ConfigError(
                f"the text contains {token!r}, which stands for the picture in this model's prompts; leave it out"
            )
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    try:
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    except Exception as error:  # a template is a program of the checkpoint's, run in jinja's sandbox
        raise ConfigError(f"this model's processor cannot make a prompt of it: {one_line(error)}") from error


def _from_testbed(testbed: testbeds.Testbed, limit: int, seed: int) -> Iterator[CalibrationSample]:
    from PIL import Image

    # Training questions: what was calibrated on must not be evaluated on.
    for sample in testbed.questions(limit, seed, training=True):
        images = tuple(Image.fromarray(i) for i in sample.images)
        yield CalibrationSample(images, sample.question, name=sample.question)


def _from_folder(folder: Path, limit: int, seed: int) -> Iterator[CalibrationSample]:
    try:
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    except OSError as error:
        raise ConfigError(f"cannot read the folder {str(folder)!r}: {error.strerror or error}") from None
    good: dict[int, Image.Image] = {}
    bad: list[str] = []
    for i in _order(len(paths), seed):
        if len(good) == limit:
            break
        try:
            good[i] = open_image(paths[i])
        except ConfigError:
            bad.append(paths[i].name)
    if bad:
        named = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        warnings.warn(
            f"{len(bad)} of {len(bad) + len(good)} image files of {str(folder)!r} cannot be read and were left out: "
            f"{named}",
            SkippedFilesWarning,
            stacklevel=2,
        )
    for i in sorted(good):
        yield CalibrationSample((good[i],), name=str(paths[i].relative_to(folder)))


def _from_jsonl(path: Path, limit: int) -> Iterator[CalibrationSample]:
    try:
        opened = path.open(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    with opened as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for number, line in islice(lines, limit):
            where = f"{path.name}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{where} is not JSON: {one_line(error)}") from None
            if not isinstance(record, dict):
                raise ConfigError(
                    f"{where} must be an object with 'image' and 'prompt', not {line.strip()[:60]}"
                )
            given, prompt, answers, family = _fields(record, where)
            given = given if isinstance(given, list) else [given]
            if not given or not all(isinstance(name, str) for name in given):
                raise ConfigError(f"{where}: 'image' must be a path or a list of paths")
            images = tuple(open_image(path.parent / name) for name in given)
            yield CalibrationSample(images, prompt, answers, family, f"line {number}: {', '.join(given)}")


def _from_hub(name: str, limit: int) -> Iterator[CalibrationSample]:
    dataset_name, _, split = name.partition(":")
    check_installed(_READING, "datasets", extra="tune")
    from datasets import load_dataset

    try:
        stream = load_dataset(dataset_name, split=split or "train", streaming=True, trust_remote_code=False)
        records = list(stream.take(limit))
    except Exception as error:  # what datasets raises has no common base
        raise ConfigError(f"cannot read the dataset {name!r}: {one_line(error)}") from error
    yield from (_from_record(record, f"{name}, record {i}") for i, record in enumerate(records))


def _from_disk(folder: Path, limit: int, seed: int) -> Iterator[CalibrationSample]:
    check_installed(_READING, "datasets", extra="tune")
    from datasets import load_from_disk

    try:
        data: Any = load_from_disk(str(folder))
        if isinstance(data, dict):  # a DatasetDict: its training split, or the first
            data = data.get("train", next(iter(data.values()), []))
        records = [(i, data[i]) for i in _drawn(len(data), limit, seed)]
    except Exception as error:  # what datasets raises has no common base
        raise ConfigError(f"cannot read the dataset in {str(folder)!r}: {one_line(error)}") from error
    for i, record in records:
        yield _from_record(record, f"{folder.name}, record {i}")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _from_record(record: dict[str, Any], where: str) -> CalibrationSample:
    from PIL import Image

    given, prompt, answers, family = _fields(record, where)
    images = given if isinstance(given, list) else [given]
    if not images or not all(isinstance(image, Image.Image) for image in images):
        raise ConfigError(f"{where}: 'image' must be an image feature")
    return CalibrationSample(tuple(as_rgb(image, where) for image in images), prompt, answers, family, where)


def _fields(record: dict[str, Any], where: str) -> tuple[Any, str, tuple[str, ...], str]:
    given = next((record[name] for name in _IMAGE_NAMES if name in record), None)
    if given is None:
        raise ConfigError(f"{where} has no 'image'; it has {', '.join(map(repr, record)) or 'nothing'}")
    prompt = next((record[name] for name in _PROMPT_NAMES if name in record), PROMPT)
    if not isinstance(prompt, str):
        raise ConfigError(f"{where}: the prompt must be text, not {prompt!r:.60}")
    said: Any = next((record[name] for name in _ANSWER_NAMES if name in record), [])
    listed: list[Any] = said if isinstance(said, list) else [said]
    # Some data sets have an object per annotator.
    answers = [a.get("answer") if isinstance(a, dict) else a for a in listed if a is not None]
    if not all(isinstance(a, str | int | float) for a in answers):
        raise ConfigError(f"{where}: answers must be texts or numbers, not {answers!r:.60}")
    family = next((record[name] for name in _FAMILY_NAMES if name in record), None)
    return given, prompt, tuple(map(str, answers)), "" if family is None else str(family)


def _drawn(count: int, limit: int, seed: int) -> list[int]:
    """Up to `limit` of `count` indices, ascending."""
    return sorted(_order(count, seed)[:limit])


def _order(count: int, seed: int) -> list[int]:
    import numpy as np

    return [int(i) for i in np.random.default_rng(seed).permutation(count)]
