"""The command line: every command as JSON and as text, and one clear line for whatever is wrong."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import tokenprune
from tokenprune.arguments import Arguments, read_keep
from tokenprune.cli import app
from tokenprune.cli.loading import load_model
from tokenprune.cli.shell import short_warnings
from tokenprune.errors import ConfigError, NothingPrunedWarning
from tokenprune.estimators import ESTIMATORS
from tokenprune.fingerprint import fingerprint
from tokenprune.images import as_seen
from tokenprune.methods import METHODS
from tokenprune.models import FAMILIES
from tokenprune_eval import demo as demo_module
from tokenprune_testbed import loading

QUESTION = "where is the seven ?"


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's folder, or one of random weights where the checkpoint is not there."""
    if (loading.MODEL_DIR / "config.json").is_file():
        return loading.MODEL_DIR
    from tokenprune_testbed.modeling import build_model, build_processor

    folder = tmp_path_factory.mktemp("testbed")
    torch.manual_seed(0)
    build_model().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def model(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loading, "MODEL_DIR", stand_in)
    return stand_in


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(path)
    return path


def call(*args: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


def read(*args: object) -> Any:
    """The document a command prints with --json; nothing else may be on stdout."""
    result = call(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*args: object) -> str:
    """The one line of a refusal."""
    result = call(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    # What says how far something is ends with its dots.
    lines = [line for line in result.stderr.splitlines(keepends=True) if not line.endswith(" ...\n")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and lines[0].endswith("\n"), result.stderr
    return lines[0]


# -- reading values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("25%", 0.25),
        ("12.5 %", 0.125),
        ("0.25", 0.25),
        (".5", 0.5),
        ("192", 192),
        ("1", 1),
        ("1.0", 1.0),
        ("100%", 1.0),
    ],
)
def test_keep_reads_fractions_and_counts(text: str, keep: float) -> None:  # contract 15
    assert read_keep(text) == keep
    assert type(read_keep(text)) is type(keep)


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "-1",
        "-0.5",
        "1.5",
        "0.0",
        "nan",
        "inf",
        "abc",
        "",
        "%",
        "0%",
        "-5%",
        "120%",
        "1e-1",
        "+5",
        "1_0",
        "true",
        "٣",
    ],
)
def test_keep_refuses_everything_else(text: str) -> None:  # contract 15
    with pytest.raises(
        ConfigError, match=r"keep takes a fraction \(25% or 0.25, at most 100%\) or a number of tokens"
    ):
        read_keep(text)


def test_texts_take_the_type_of_their_default() -> None:
    texts = {"voters": "cls", "size_term": "no", "keep": "25%", "frame_floor": "2", "strict": "yes"}
    read = Arguments.from_text(texts)  # of auto, which is VFlowOpt where parameters are given
    assert read == Arguments(
        keep=0.25,
        frame_floor=2,
        strict=True,
        parameters={"voters": "cls", "size_term": False},
    )
    assert Arguments.from_text({"method": "random", "seed": "7"}).parameters == {"seed": 7}
    # r1 has no default of its own, but a type.
    assert Arguments.from_text({"method": "vflowopt", "r1": "0.3"}).parameters == {"r1": 0.3}
    assert Arguments.from_text({"stages": "0:vflowopt(r1=0.3):20%"}).stages[0].parameters == {"r1": 0.3}  # type: ignore[index,union-attr]
    assert Arguments.from_text({"cuts": "2:50%, 9:36,18", "keep": "0.2"}).cuts == (
        tokenprune.Cut(2, 0.5),
        tokenprune.Cut(9, 36),
        tokenprune.Cut(18),
    )
    assert Arguments.from_text({"layer": "auto", "allocation": "pooled"}).given() == {
        "method": "auto",
        "layer": "auto",
        "allocation": "pooled",
    }


@pytest.mark.parametrize(
    ("name", "text", "advice"),
    [
        ("layer", "two", "a whole number"),
        ("cuts", "2;50%", "such as 2:50%"),
        ("cuts", "9:10%,2:5%", "ascending order"),
        ("strict", "maybe", "true or false"),
        ("frame_floor", "1.5", "a whole number"),
        ("allocation", "shared", "'image' or 'pooled'"),
        ("keep_lists", "[[1]]", "cannot be given as text"),
    ],
)
def test_texts_that_cannot_be_read(name: str, text: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        Arguments.from_text({name: text})


# -- every command as JSON, and as text -----------------------------------------------------------------------------


def test_methods() -> None:
    facts = {one["name"]: one for one in read("methods")}
    assert facts.keys() == METHODS.keys()
    assert facts["entropyprune"]["paper"] == "arXiv 2602.17196"
    assert facts["entropyprune"]["min_layer"] == 1
    assert facts["entropyprune"]["parameters"][1] == {
        "name": "normalization",
        "default": "none",
        "choices": ["none", "trace"],
    }
    text = call("methods").stdout
    assert all(name in text for name in METHODS)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_one_method(name: str) -> None:
    one = read("methods", name)
    assert one["name"] == name and one["summary"]
    assert one["description"].splitlines()[0] in call("methods", name).stdout


def test_models() -> None:
    facts = {one["name"]: one for one in read("models")}
    assert facts.keys() == FAMILIES.keys()
    assert facts["llava"]["published_layer"] == 2 and facts["qwen2_5_vl"]["mrope"]
    assert "qwen2_5_vl" in call("models").stdout


def test_env() -> None:
    facts = read("env")
    assert facts["torch"] == torch.__version__ and facts["tokenprune"] == tokenprune.__version__
    assert {
        "python",
        "transformers",
        "triton",
        "flash-attn",
        "accelerate",
        "lmms-eval",
        "cpu",
        "threads",
    } <= facts.keys()
    assert torch.__version__ in call("env").stdout


def test_run_answers_and_reports(model: Path, image: Path, tmp_path: Path) -> None:
    picture = tmp_path / "kept.png"
    options = (
        "--method",
        "entropyprune",
        "--keep",
        "25%",
        "--layer",
        1,
        "--compare",
        "--picture",
        picture,
        "--max-new-tokens",
        6,
    )
    document = read("run", "small", image, "Where is the seven?", *options)
    assert document["question"] == QUESTION  # its words, as the bundled model knows them
    assert {"answer", "unpruned_answer"} <= document.keys()
    assert document["report"]["method"] == "entropyprune" and document["report"]["pruned"]
    (kept,) = document["report"]["images"][0]["kept"]
    assert len(document["keep_lists"][0][0][0]) == kept
    with Image.open(picture) as drawn:
        assert drawn.width == 384
    text = call("run", "small", image, QUESTION, *options).stdout
    assert "unpruned" in text and "visual tokens 2" in text


def test_run_passes_every_option_on(model: Path, image: Path) -> None:
    document = read(
        *("run", "small", image, image, QUESTION, "--method", "random", "--keep", 20, "--layer", 0),
        *(
            "--budget",
            "after_cut",
            "--param",
            "seed=3",
            "--dtype",
            "bfloat16",
            "--device",
            "cpu",
            "--max-new-tokens",
            2,
        ),
    )
    report = document["report"]
    assert [one["kept"] for one in report["images"]] == [[20], [20]]
    assert report["layers_cut"] == [0] and report["parameters"] == {"seed": 3}
    assert report["budget"] == "after_cut"
    assert len(document["answer"].split()) <= 2


def test_run_with_a_folder_of_the_user(stand_in: Path, image: Path) -> None:
    document = read("run", stand_in, image, QUESTION, "--method", "none", "--max-new-tokens", 2)
    assert not document["report"]["pruned"]


def test_all_tokens_is_one_point_zero(model: Path, image: Path) -> None:  # contract 8, 15
    assert not read("run", "small", image, QUESTION, "--keep", "1.0", "--max-new-tokens", 1)["report"][
        "pruned"
    ]
    (kept,) = read(
        *("run", "small", image, QUESTION, "--method", "entropyprune", "--keep", "1"),
        *("--budget", "after_cut", "--max-new-tokens", 1),
    )["report"]["images"][0]["kept"]
    assert kept == 1


def test_our_warnings_take_one_line_and_others_are_silent(
    capsys: pytest.CaptureFixture[str],
) -> None:  # contract 18
    with short_warnings(debug=False):
        warnings.warn("someone else's", DeprecationWarning, stacklevel=1)
        warnings.warn("nothing was pruned:\nno budget", NothingPrunedWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: nothing was pruned: no budget\n"


@pytest.mark.slow
def test_demo(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = replace(demo_module.SETTINGS["small"], quick_rounds=1)
    monkeypatch.setitem(demo_module.SETTINGS, "small", once)
    monkeypatch.setattr(demo_module, "TIMED_PROMPTS", 2)
    out = tmp_path / "pictures"
    document = read("demo", "--model", "small", "--quick", "--questions", 10, "--out", out)
    assert document["questions"] == 10
    whole, *pruned = document["rows"]
    for keep in demo_module.BUDGETS:
        shown = [row["method"] for row in pruned if row["keep"] == keep]
        assert shown == ["auto", "vflowopt", "entropyprune", *demo_module.CONTROLS]
    assert len(pruned) == 5 * len(demo_module.BUDGETS)
    assert all(row["accuracy"] == row["correct"] / document["questions"] for row in document["rows"])
    assert whole["method"] == "none" and whole["keep"] is None and whole["kept"] == 1
    for row in pruned:
        # contract 15: the mean over layers is within one token of what was asked for
        assert abs(row["keep"] - row["kept"]) < 1 / 144
        assert row["kv_bytes"] < whole["kv_bytes"] and row["first_token_ms"] > 0
    committed = {(one["method"], one["keep"]): one["accuracy"] for one in document["compared"]}
    assert committed.keys() == {(row["method"], row["keep"]) for row in document["rows"]}
    for keep in demo_module.BUDGETS:  # what a newcomer sees is what the evidence says
        assert committed["auto", keep] > max(committed["uniform", keep], committed["random", keep])
    assert [one["family"] for one in document["shown"]] == list(demo_module.QUICK_SHOWN)
    assert all(len(one["answers"]) == len(document["rows"]) for one in document["shown"])
    assert sorted(map(str, out.iterdir())) == sorted(document["pictures"])
    assert "1 thread" in document["measured"] and torch.__version__ in document["measured"]


@pytest.mark.slow
def test_demo_as_text(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = replace(demo_module.SETTINGS["small"], quick_rounds=1)
    monkeypatch.setitem(demo_module.SETTINGS, "small", once)
    monkeypatch.setattr(demo_module, "TIMED_PROMPTS", 1)
    monkeypatch.setattr(demo_module, "BUDGETS", (0.33,))
    result = call("demo", "--model", "small", "--quick", "--questions", 1, "--out", tmp_path)
    assert result.exit_code == 0 and result.stderr.startswith("loading the model ...\n")
    for word in (
        "true answer",
        "): entropyprune",
        "accuracy in % of",
        "first token, ms: none",
        "KV cache",
        "Measured on",
    ):
        assert word in result.stdout


# -- refusals: one line that says what to do, exit code 2 -------------------------------------------------------------


@pytest.mark.parametrize("keep", ["0", "-1", "1.5", "nan", "NaN", "abc", "0%", "120%"])
def test_bad_keep(image: Path, keep: str) -> None:
    assert "25% or 0.25" in refused("run", "small", image, QUESTION, "--keep", keep)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ([], "--keep 25%"),
        (["--keep", "50%", "--method", "nosuch"], "choose one of cdpruner, dart"),
        (["--keep", "50%", "--param", "nosuch=1"], "it has t, alpha, voters"),
        (["--keep", "50%", "--param", "source"], "name=value"),
        (["--keep", "50%", "--param", "voters=nose"], "must be one of attended, cls"),
        (["--keep", "50%", "--param", "size_term=2"], "true or false"),
        (["--keep", "50%", "--param", "source=key", "--param", "source=key"], "give it once"),
        (["--keep", "50%", "--method", "random", "--param", "seed=x"], "a whole number"),
        (["--keep", "50%", "--method", "none"], "leave --keep out"),
        (["--keep", "50%", "--budget", "nosuch"], "'average', 'after_cut'"),
        (["--keep", "50%", "--dtype", "int3"], "'bfloat16'"),
        (["--keep", "50%", "--layer", "two"], "a whole number"),
        (["--keep", "50%", "--nosuch"], "run --help"),
        (["--keep", "50%", "--max-new-tokens", "0"], "run --help"),
        (["--keep", "50%", "--device", "abacus"], "give cpu, cuda"),
        (["--keep", "50%", "--device", "meta"], "give cpu, cuda"),
        (["--keep", "50%", "--picture", "x" * 5000 + ".png"], "cannot be used: File name too long"),
        (["--keep", "50%", "--picture", "~nosuchuser/kept.png"], "cannot be used"),
        (["--keep", "50%", "--picture", "kept.jpg"], "ends in .png"),
        (["--keep", "50%", "--picture", "no/such/kept.png"], "make it first"),
    ],
)
def test_bad_options(image: Path, options: list[str], advice: str) -> None:
    assert advice in refused("run", "small", image, QUESTION, *options)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--keep", "145", "--param", "strict=true"], "pass at most 144, or a fraction"),
        (["--keep", "5%", "--layer", "2"], "the reachable range starts above {floor:.1%}"),
        (["--keep", "9", "--layer", "2"], "the reachable range is"),
        (["--keep", "50%", "--method", "entropyprune", "--layer", "0"], "at layers 1 to {last}"),
        (["--keep", "50%", "--layer", "99"], "at layers 0 to {last}"),
    ],
)
def test_what_only_the_model_can_refuse(model: Path, image: Path, options: list[str], advice: str) -> None:
    layers = json.loads((model / "config.json").read_text())["text_config"]["num_hidden_layers"]
    advice = advice.format(floor=2 / layers, last=layers - 1)
    assert advice in refused("run", "small", image, QUESTION, *options)


def test_bad_images(tmp_path: Path, image: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_text("no image")
    cut = tmp_path / "cut.png"
    cut.write_bytes(image.read_bytes()[:2000])
    for bad in (text, cut):
        assert "is no image that can be read" in refused("run", "small", bad, QUESTION, "--keep", "50%")
    for bad in (tmp_path / "missing.png", tmp_path):
        assert "check the path" in refused("run", "small", image, bad, QUESTION, "--keep", "50%")
    assert "Missing argument 'IMAGE'" in refused("run", "small", QUESTION, "--keep", "50%")


def test_words_the_bundled_model_never_saw(image: Path) -> None:
    line = refused("run", "small", image, "Where is Wally?", "--keep", "50%")
    assert "'wally'" in line and "where is the seven ?" in line


def _text_only(folder: Path) -> None:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, **size)).save_pretrained(folder)


def _empty(folder: Path) -> None:
    folder.mkdir()


def _of_type(kind: str, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))


def _nonsense(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "nosuch"}')


def _no_processor(folder: Path) -> None:
    from tokenprune_testbed.modeling import build_config

    build_config(1).save_pretrained(folder)


def _damaged(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import shutil

        from tokenprune_testbed.modeling import build_model, build_processor

        torch.manual_seed(0)
        build_model().save_pretrained(folder)
        build_processor().save_pretrained(folder)
        if name == "pytorch_model.bin":
            (folder / "model.safetensors").unlink()
            (folder / name).write_bytes(change(b""))
            shutil.copy(folder / name, folder / "again.bin")
        else:
            (folder / name).write_bytes(change((folder / name).read_bytes()))

    return make


class _Runs:
    """Unpickled, it would end the tests."""

    def __reduce__(self) -> Any:
        import os

        return os._exit, (7,)


DAMAGED = [
    (_damaged("model.safetensors", lambda data: data[: len(data) // 2]), "cannot load"),
    (_damaged("model.safetensors", lambda data: b""), "cannot load"),
    (_damaged("pytorch_model.bin", lambda data: pickle.dumps(_Runs())), "cannot load"),
    (_damaged("config.json", lambda data: data[:100]), "cannot load"),
    (_damaged("config.json", lambda data: b"[]"), "cannot load"),
    (_damaged("config.json", lambda data: b"[" * 100_000), "cannot load"),
    (_damaged("tokenizer.json", lambda data: data[:100]), "cannot load"),
    (_damaged("chat_template.jinja", lambda data: b"{% for x in %}"), "cannot make a prompt"),
]


@pytest.mark.parametrize(("make", "advice"), DAMAGED)
def test_damaged_model_folders(
    tmp_path: Path, image: Path, make: Callable[[Path], None], advice: str
) -> None:
    make(tmp_path / "model")
    line = refused("run", tmp_path / "model", image, QUESTION, "--keep", "50%")
    assert advice in line and len(line) < 600


def test_the_attention_a_checkpoint_asks_for_is_not_fetched(tmp_path: Path) -> None:
    def ask(data: bytes) -> bytes:
        config = json.loads(data)
        for own in (config, config["text_config"], config["vision_config"]):
            own["attn_implementation"] = own["_attn_implementation"] = "somebody/kernel"
        return json.dumps(config).encode()

    _damaged("config.json", ask)(tmp_path / "model")
    loaded, _ = load_model(str(tmp_path / "model"))
    for config in (loaded.config, loaded.config.text_config, loaded.config.vision_config):
        assert config._attn_implementation == "sdpa"


def test_a_question_that_holds_the_placeholder(stand_in: Path, image: Path) -> None:
    line = refused("run", stand_in, image, "what is <image> ?", "--keep", "50%")
    assert "stands for the picture" in line


@pytest.mark.parametrize("name", ["~nosuchuser/m", "x" * 5000], ids=["user", "long"])
def test_paths_of_models_that_cannot_be_looked_up(image: Path, name: str) -> None:
    assert "cannot be used" in refused("run", name, image, QUESTION, "--keep", "50%")
    assert "cannot be used" in refused("run", "small", name, QUESTION, "--keep", "50%")


def test_an_error_in_json(image: Path) -> None:
    result = call("run", "small", image, QUESTION, "--keep", "nan", "--json")
    assert result.exit_code == 2
    assert "25% or 0.25" in json.loads(result.stdout)["error"]
    assert result.stderr.count("\n") == 1


def test_errors_hold_no_escapes_for_the_terminal(image: Path) -> None:
    line = refused("run", "a\x1b[31mred\x07", image, QUESTION, "--keep", "50%")
    assert "\x1b" not in line and "\x07" not in line


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (_text_only, "is a 'llama' model, which reads no images; 'tokenprune models' lists "),
        (_empty, "give a model folder"),
        (_nonsense, "is a 'nosuch' model, which transformers 5."),
        (partial(_of_type, "llava_llama"), "its twin is llava-hf/llava-1.5-7b-hf"),
        (partial(_of_type, "llava_qwen"), "its twin is llava-hf/llava-onevision-qwen2-7b-ov-hf"),
        (partial(_of_type, "internvl_chat"), "its twin is OpenGVLab/InternVL3-8B-hf"),
        (_no_processor, "give a "),
    ],
)
def test_unusable_model_folders(
    tmp_path: Path, image: Path, make: Callable[[Path], None], advice: str
) -> None:
    make(tmp_path / "model")
    assert advice in refused("run", tmp_path / "model", image, QUESTION, "--keep", "50%")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nosuch", "nosuch/nosuch", "no such model"])
def test_missing_models(image: Path, name: str) -> None:
    line = refused("run", name, image, QUESTION, "--keep", "50%")
    assert repr(name) in line and "'small' or 'smol'" in line


def test_a_missing_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "MODEL_DIR", tmp_path)
    with pytest.raises(ConfigError, match="reinstall"):
        load_model("small")
    assert "reinstall" in refused("demo", "--model", "small", "--out", tmp_path / "out")


def test_a_broken_plug_in_leaves_the_other_commands_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from tokenprune.cli import _add

    monkeypatch.setattr(app, "registered_commands", [*app.registered_commands])
    _add(EntryPoint("extra", "nosuch.module:command", "tokenprune.commands"))
    assert "'extra' (nosuch.module:command) cannot be loaded: No module named 'nosuch'" in refused(
        "extra", "--x", 3
    )
    assert call("methods").exit_code == 0


def test_other_commands_refuse_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "name another" in refused("demo", "--out", tmp_path / "file" / "folder")
    assert "demo --help" in refused("demo", "--questions", 0)
    assert "choose one of cdpruner, dart" in refused("methods", "nosuch")
    assert "Did you mean 'methods'" in refused("method")
    assert "'tokenprune --help'" in refused("--nosuch")


# -- ecl ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ecl_measures_and_keeps_the_layer(model: Path, tmp_path: Path, cache: Path, image: Path) -> None:
    names = ["curve.png", "attention.png", "maps.png"]
    figures = zip(("--figure", "--attention-figure", "--maps"), (tmp_path / n for n in names), strict=True)
    options = [part for figure in figures for part in figure]
    common = ("ecl", "small", "--data", "testbed", "--samples", 16, "--fallback-layer", 3)
    document = read(*common, "--estimator", "all", *options)
    assert set(document["collapse"]) == set(ESTIMATORS) == set(document["text"])
    found = document["collapse"]["von_neumann"]
    assert len(found["mean"]) == 17 and found["images"] == 16 and "collapse: H drops" in found["verdict"]
    assert len(document["attention_entropy"]) == len(document["visual_share"]) == 16
    for name in names:
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 300
    assert len(list(cache.rglob("*.json"))) == 1

    told = read("run", "small", image, QUESTION, "--keep", "60%", "--layer", "auto")
    assert told["report"]["layers_cut"] == [found["layer"]]
    result = call(*common)
    assert result.exit_code == 0
    assert f"layer {found['layer']} is kept" in result.stdout and "collapse: H drops" in result.stdout


@pytest.mark.slow
def test_ecl_without_a_clear_collapse_shows_the_curve_and_fails(model: Path, cache: Path) -> None:
    # The condition number of these states sits at the rank tolerance in every layer.
    result = call("ecl", "small", "--data", "testbed", "--samples", 16, "--estimator", "condition_number")
    assert result.exit_code == 2
    assert "95 %" in result.stdout
    assert result.stderr.splitlines()[-1].startswith("error: no clear collapse")
    assert "give --fallback-layer" in result.stderr
    assert not list(cache.rglob("*.json"))


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--data", "nowhere"], "give a folder of images"),
        (["--data", "testbed", "--samples", "15"], "ecl --help"),
        (["--data", "testbed", "--estimator", "entropy"], "choose one of von_neumann"),
        (["--data", "testbed", "--figure", "curve.pdf"], "ends in .png"),
        (["--data", "testbed", "--maps", "no/such/folder/maps.png"], "make it first"),
        (["--data", "testbed", "--samples", "16", "--fallback-layer", "16"], "from 1 to 15"),
    ],
)
def test_ecl_refuses(model: Path, cache: Path, options: list[str], advice: str) -> None:
    assert advice in refused("ecl", "small", *options)


def test_layer_auto_before_ecl(model: Path, cache: Path, image: Path) -> None:
    line = refused("run", "small", image, QUESTION, "--keep", "50%", "--layer", "auto")
    assert "'tokenprune ecl MODEL --data ...'" in line


def test_debug_shows_the_traceback_wherever_it_stands() -> None:
    for args in (("--debug", "methods", "nosuch"), ("methods", "nosuch", "--debug")):
        result = call(*args)
        assert result.exit_code == 2
        assert "Traceback" in result.stderr and result.stderr.splitlines()[-1].startswith(
            "error: unknown method"
        )


def test_no_command_is_help() -> None:
    result = call()
    assert result.exit_code == 0 and "demo" in result.stdout


# -- details --------------------------------------------------------------------------------------------------------


def test_pictures_show_what_a_cropping_processor_saw() -> None:
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, 50:150] = 255  # the middle square
    image = Image.fromarray(pixels)
    clip = SimpleNamespace(
        do_center_crop=True, size={"shortest_edge": 50}, crop_size={"height": 50, "width": 50}
    )
    seen = as_seen(clip, image)
    assert seen.size == (50, 50) and np.asarray(seen)[:, 3:-3].min() == 255
    assert as_seen(SimpleNamespace(do_center_crop=False), image) is image


def run_python(code: str) -> str:
    """Run code in a new interpreter that can import what this one can."""
    path = f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}\n"
    return subprocess.run(
        [sys.executable, "-c", path + code], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_the_command_line_itself_imports_nothing_heavy() -> None:
    # A bare stand-in for the package, so that only what the command line imports is seen.
    loaded = run_python(
        "import types\n"
        "package = types.ModuleType('tokenprune')\n"
        f"package.__path__ = {list(tokenprune.__path__)!r}\n"
        "sys.modules['tokenprune'] = package\n"
        "import tokenprune.cli\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'PIL') if name in sys.modules])\n"
    )
    assert loaded.strip() == "[]"


def test_the_library_does_not_import_the_command_lines_packages() -> None:
    code = "import tokenprune\nprint([n for n in ('typer', 'rich', 'tokenprune.cli') if n in sys.modules])"
    assert run_python(code).strip() == "[]"


# -- tune and drift ----------------------------------------------------------------------------------------------------

SMALL_SEARCH = ("tune", "small", "--data", "testbed", "--samples", 4, "--trials", 6, "--method", "vflowopt")


@pytest.mark.slow
def test_tune_searches_keeps_resumes_and_reports(model: Path, tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "profile.json"
    found = read(*SMALL_SEARCH, "--budget", "25%", "--out", out, "--report", tmp_path / "report")
    assert len(found["trials"]) == 6 and found["path"] == str(out) and found["passes"] > 6
    profile = tokenprune.Profile.load(out)
    assert profile.keep == 0.25 and profile.method == "vflowopt" and profile.made.trials == 6
    assert (tmp_path / "report" / "report.png").is_file() and found["report"].endswith("report.md")
    assert [path.name for path in (cache / "profiles").iterdir()] == [f"{profile.model}-0.25.json"]
    assert "there is a study" in refused(*SMALL_SEARCH, "--budget", "25%")
    result = call(*SMALL_SEARCH[:7], 8, *SMALL_SEARCH[8:], "--budget", "25%", "--resume")
    assert result.exit_code == 0 and "8 trials" in result.stdout and "--resume goes on" in result.stdout
    assert "uniform, before the LLM" in result.stdout and str(cache) in result.stdout.replace("\n", "")


def test_tune_against_a_cost_leaves_a_front(model: Path, tmp_path: Path, cache: Path) -> None:
    found = read(*SMALL_SEARCH, "--budget", "20%:60%", "--cost", "flops", "--out", tmp_path / "p.json")
    assert len(found["paths"]) >= 1 and all(Path(path).is_file() for path in found["paths"])
    assert len({trial["cost"] for trial in found["trials"]}) == 6


@pytest.mark.slow
def test_tune_quick(model: Path, cache: Path) -> None:
    found = read("tune", "small", "--data", "testbed", "--budget", "25%", "--quick")
    assert found["profile"]["made"]["how"] == "tokenprune tune --quick"
    assert Path(found["path"]).parent == cache / "profiles"


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--budget", "2"], "nothing here can meet the budget"),
        (["--budget", "200%"], "more than all tokens"),
        (["--budget", "20%:60%"], "go together"),
        (["--budget", "20%", "--cost", "flops"], "go together"),
        (["--budget", "20%:60%", "--quick"], "--quick takes one budget"),
        (["--budget", "20%", "--served"], "name a file with --out"),
        (["--budget", "20%", "--sampler", "grid"], "choose one of tpe"),
        (["--budget", "20%", "--method", "fastvv"], "unknown method 'fastvv'"),
        (["--budget", "20%", "--metric", "l3"], "choose one of cosine"),
        (["--budget", "20%", "--out", "nowhere/p.json"], "there is no folder 'nowhere'"),
        (["--budget", "20%", "--storage", "nowhere://"], "give a database's URL"),
    ],
)
def test_tune_refuses(model: Path, cache: Path, options: list[str], advice: str) -> None:
    given = list(SMALL_SEARCH) if "--method" not in options else list(SMALL_SEARCH[:8])
    if options == ["--budget", "2"]:
        given[-1] = "entropyprune"
    assert advice in refused(*given, *options)


def test_drift_shows_controls_and_the_worst_cases(model: Path, tmp_path: Path, cache: Path) -> None:
    common = ("drift", "small", "--data", "testbed", "--samples", 6)
    profile = tokenprune.Profile(method="vflowopt", keep=0.25, model=fingerprint(load_model("small")[0]))
    profile.save(tmp_path / "p.json")
    found = read(*common, "--profile", tmp_path / "p.json", "--pictures", tmp_path / "pictures", "--worst", 2)
    assert set(found["spreads"]) == {"vflowopt", "random", "uniform"} and len(found["drift"]) == 6
    assert found["spreads"]["vflowopt"]["worst"] == max(found["drift"]) == found["worst"][0]["drift"]
    assert [Image.open(case["picture"]).width > 100 for case in found["worst"]] == [True, True]
    shown = call(*common, "--method", "fastv", "--keep", "25%")
    assert shown.exit_code == 0 and "fastv" in shown.stdout and "where is the zero" in shown.stdout
    assert "say how much to keep" in refused(*common)
    assert "not both" in refused(*common, "--profile", tmp_path / "p.json", "--method", "fastv")
    assert "cannot read" in refused(*common, "--profile", tmp_path / "none.json")


def test_drift_shows_no_escapes_of_the_data(model: Path, image: Path, tmp_path: Path, cache: Path) -> None:
    """A prompt of a data file may hold what steers a terminal."""
    (tmp_path / "q.jsonl").write_text(
        json.dumps({"image": str(image), "prompt": "\x1b]0;pwned\x07\x1b[2Jhow many ?"})
    )
    shown = call(
        "drift", "small", "--data", tmp_path / "q.jsonl", "--keep", "50%", "--method", "uniform"
    ).stdout
    assert "how many" in shown and "\x1b" not in shown and "\x07" not in shown


def test_quick_writes_its_profile_where_nothing_can_be_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENPRUNE_CACHE", "/proc/nowhere")
    common = ("tune", "small", "--data", "testbed", "--budget", "50%", "--quick")
    assert "set TOKENPRUNE_CACHE" in refused(*common)  # before anything is measured
    result = call(*common, "--out", tmp_path / "p.json")
    assert result.exit_code == 0 and "not kept for" in result.stderr
    assert tokenprune.Profile.load(tmp_path / "p.json").keep == 0.5


def test_a_processor_without_torchvision_says_what_to_install(
    stand_in: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def fail(*_: Any, **__: Any) -> Any:
        raise ImportError("\nQwen2VLVideoProcessor requires the Torchvision library but it was not found.")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", fail)
    line = refused("run", stand_in, image, QUESTION, "--keep", "50%")
    assert "its processor needs torchvision; pip install '.[vision]'" in line
