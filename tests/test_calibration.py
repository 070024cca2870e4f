"""Calibration samples from folders, JSONL, datasets and the testbed; and everything that is none."""

import json

import numpy as np
import pytest
from PIL import Image

from tokenprune.analysis.calibration import PROMPT, calibration_calls, load_calibration
from tokenprune.errors import ConfigError


def picture(value: int, size=(8, 6)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def value(image) -> int:
    return int(np.asarray(image)[0, 0, 0])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures" / "deeper").mkdir(parents=True)
    for i in range(5):
        picture(10 * i).save(tmp_path / "pictures" / f"{i}.png")
    picture(200).convert("L").save(tmp_path / "pictures" / "deeper" / "grey.PNG")
    (tmp_path / "pictures" / "notes.txt").write_text("not an image")
    return tmp_path / "pictures"


def test_folder(folder):
    samples = load_calibration(folder)
    assert sorted(value(s.images[0]) for s in samples) == [0, 10, 20, 30, 40, 200]
    assert all(s.images[0].mode == "RGB" and s.prompt == PROMPT for s in samples)
    drawn = [[value(s.images[0]) for s in load_calibration(folder, 3, seed=seed)] for seed in (0, 0, 1, 2)]
    assert all(len(d) == 3 for d in drawn) and drawn[0] == drawn[1]
    assert len({tuple(d) for d in drawn}) > 1


def test_jsonl(folder):
    file = folder / "samples.jsonl"
    lines = [
        {"image": "0.png", "prompt": "what is it ?"},
        {"image": ["1.png", "deeper/grey.PNG"], "question": "which differs ?"},
        {"images": ["2.png"]},
    ]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    samples = load_calibration(str(file))
    assert [[value(i) for i in s.images] for s in samples] == [[0], [10, 200], [20]]
    assert [s.prompt for s in samples] == ["what is it ?", "which differs ?", PROMPT]
    assert len(load_calibration(file, 2)) == 2


def test_dataset_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [picture(i) for i in range(4)], "question": [f"q{i}" for i in range(4)]}
    data = datasets.Dataset.from_dict(rows)
    data = data.cast_column("image", datasets.Image())
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(test=data.select([0]), train=data.select([1, 2])).save_to_disk(tmp_path / "splits")
    samples = load_calibration(tmp_path / "plain", 3, seed=3)
    assert len(samples) == 3
    assert all(s.prompt == f"q{value(s.images[0])}" for s in samples)
    assert [s.prompt for s in load_calibration(tmp_path / "splits")] == ["q1", "q2"]


def test_dataset_on_the_hub(monkeypatch):
    """What is asked of `datasets`; the hub itself is out of reach here."""
    datasets = pytest.importorskip("datasets")
    asked = {}

    class Stream:
        def take(self, count):
            return [{"image": picture(i), "text": "look"} for i in range(count)]

    def load_dataset(name, **options):
        asked.update(name=name, **options)
        return Stream()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    samples = load_calibration("hf:someone/pictures:validation", 2)
    assert asked == {
        "name": "someone/pictures",
        "split": "validation",
        "streaming": True,
        "trust_remote_code": False,
    }
    assert [(value(s.images[0]), s.prompt) for s in samples] == [(0, "look"), (1, "look")]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(OSError("no\nnetwork"))
    )
    with pytest.raises(ConfigError, match="cannot read the dataset 'someone/pictures': no network"):
        load_calibration("hf:someone/pictures")


def test_testbed_is_its_training_split():
    samples = load_calibration("testbed", 18)
    assert len(samples) == 18 and all(len(s.images) == 1 for s in samples)
    assert len({s.prompt.split()[0] for s in samples}) >= 4  # of several families
    assert [s.prompt for s in load_calibration("testbed", 18)] == [s.prompt for s in samples]
    assert [s.prompt for s in load_calibration("testbed", 18, seed=1)] != [s.prompt for s in samples]
    from tokenprune.testbed import evaluation_set

    trained = {np.asarray(s.images[0]).tobytes() for s in samples}
    assert not trained & {i.tobytes() for s in evaluation_set(70) for i in s.images}


def test_calls_are_what_the_model_takes():
    from tokenprune.testbed.modeling import IMAGE, build_processor

    calls = list(calibration_calls(build_processor(), load_calibration("testbed", 3)))
    assert len(calls) == 3
    for inputs in calls:
        assert (inputs["input_ids"] == IMAGE).sum() == 144
        assert inputs["pixel_values"].shape == (1, 3, 96, 96)
    processor = build_processor()
    processor.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        next(calibration_calls(processor, load_calibration("testbed", 1)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"bad.jsonl, line 1 is not JSON"),
        ("[1]", r"line 1 must be an object"),
        ('\n{"picture": "0.png"}', r"line 2 has no 'image'; it has 'picture'"),
        ('{"image": 3}', r"'image' must be a path or a list of paths"),
        ('{"image": []}', r"'image' must be a path or a list of paths"),
        ('{"image": "0.png", "prompt": 5}', r"the prompt must be text, not 5"),
        ('{"image": "gone.png"}', r"there is no image file .*gone.png"),
        ('{"image": "notes.txt"}', r"notes.txt' is no image"),
        ("", r"holds no images"),
    ],
)
def test_bad_jsonl(folder, text, message):
    (folder / "bad.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_calibration(folder / "bad.jsonl")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "limit", "message"),
    [
        ("nowhere", 4, r"no calibration samples at 'nowhere'; give a folder"),
        ("nowhere.jsonl", 4, r"no calibration samples at"),
        (".", 0, r"at least 1, not 0"),
        (".", True, r"at least 1, not True"),
    ],
)
def test_refusals(tmp_path, monkeypatch, source, limit, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_calibration(source, limit)
    with pytest.raises(ConfigError, match="holds no images"):
        load_calibration(tmp_path)


def test_other_encodings(folder):
    line = json.dumps({"image": "0.png", "prompt": "wo ist das ?"})
    (folder / "bom.jsonl").write_text(line, encoding="utf-8-sig")
    assert load_calibration(folder / "bom.jsonl")[0].prompt == "wo ist das ?"
    (folder / "utf16.jsonl").write_text(line, encoding="utf-16")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_calibration(folder / "utf16.jsonl")


def test_broken_dataset_folder(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read the dataset in") as caught:
        load_calibration(tmp_path)
    assert "\n" not in str(caught.value)


def test_broken_image(folder):
    (folder / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    with pytest.raises(ConfigError, match="is no image that Pillow can read"):
        load_calibration(folder)
