"""Calibration samples from folders, JSONL, datasets and the testbed; and everything that is none."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tokenprune.analysis.calibration import PROMPT, calibration_calls, load_calibration, make_prompt
from tokenprune.errors import ConfigError, SkippedFilesWarning
from tokenprune.images import MOST_PIXELS, open_image


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
    from tokenprune_testbed import evaluation_set

    trained = {np.asarray(s.images[0]).tobytes() for s in samples}
    assert not trained & {i.tobytes() for s in evaluation_set(70) for i in s.images}


def test_calls_are_what_the_model_takes():
    from tokenprune_testbed.modeling import IMAGE, build_processor

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


def test_broken_images_of_a_folder_are_left_out_counted_and_named(folder):
    (folder / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    (folder / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.warns(SkippedFilesWarning, match=r"2 of 7 image files .* left out: .*(0\.png|eps\.jpg)"):
        samples = load_calibration(folder)
    assert sorted(value(s.images[0]) for s in samples) == [10, 20, 30, 40, 200]
    for i in (*range(1, 5), "deeper/grey"):
        (folder / f"{i}.{'PNG' if i == 'deeper/grey' else 'png'}").write_bytes(b"")
    with pytest.warns(SkippedFilesWarning), pytest.raises(ConfigError, match="holds no images"):
        load_calibration(folder)


def test_a_broken_image_that_was_named_is_refused(folder):
    (folder / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    (folder / "samples.jsonl").write_text('{"image": "0.png"}')
    with pytest.raises(ConfigError, match=r"0\.png' is no image that can be read"):
        load_calibration(folder / "samples.jsonl")


def test_deeply_nested_lines(folder):
    (folder / "samples.jsonl").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="line 1 is not JSON"):
        load_calibration(folder / "samples.jsonl")


@pytest.mark.parametrize("source", ["x" * 5000, "~nosuchuser/pictures", "a\0b"], ids=["long", "user", "nul"])
def test_paths_that_cannot_even_be_looked_up(source):
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        load_calibration(source)
    assert len(str(caught.value)) < 300


def test_text_that_holds_the_placeholder():
    from tokenprune_testbed.modeling import build_processor

    processor = build_processor()
    with pytest.raises(ConfigError, match="stands for the picture"):
        make_prompt(processor, [picture(0)], f"what is {processor.image_token} ?")


def test_a_broken_chat_template():
    from tokenprune_testbed.modeling import build_processor

    processor = build_processor()
    for template in ("{% for x in %}", "{{ messages[7].nothing.more }}", "{{ 1 / 0 }}"):
        processor.chat_template = template
        with pytest.raises(ConfigError, match="cannot make a prompt") as caught:
            make_prompt(processor, [picture(0)], "what ?")
        assert "\n" not in str(caught.value)


# -- image files from outside ---------------------------------------------------------------------------------------


def _saved(kind, image=None, **options):
    out = io.BytesIO()
    (image or picture(100, (40, 30))).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_malformed_files_of_every_format(kind, tmp_path):
    """Cut short, and with bytes overwritten: an image, or one refusal; Pillow alone raises a dozen of kinds."""
    whole, rng = _saved(kind), np.random.default_rng(0)
    path = tmp_path / "image.bin"
    for i in range(150):
        data = bytearray(whole[: rng.integers(1, len(whole) + 1)] if i % 2 else whole)
        for place in rng.integers(0, len(data), 1 + i % 7):
            data[place] = rng.integers(0, 256)
        path.write_bytes(bytes(data))
        try:
            assert open_image(path).mode == "RGB"
        except ConfigError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_formats_that_are_not_wanted_are_never_opened(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("ran a program"))
    for name, data in (
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"),
        ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"),
        ("a.ppm", b"P6 1 1 255 abc"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match="is no image that can be read"):
            open_image(tmp_path / name)


def test_the_pixel_limit_holds_for_every_kind_of_picture(tmp_path):
    side = int(MOST_PIXELS**0.5) + 1
    Image.new("1", (side, side)).save(tmp_path / "large.png")  # a few kB in the file, 400 MB as RGB
    with pytest.raises(ConfigError, match="pixels, more than"):
        open_image(tmp_path / "large.png")
