"""Contract 1, 2, 4 and 8: wrapping changes hooks and nothing else, and taking it off leaves no trace."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import (
    AttentionInterface,
    CLIPImageProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    StaticCache,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer
from transformers.masking_utils import AttentionMaskInterface

import judge
import oracle
import tiny
import tokenprune
from tokenprune import releases

peft = pytest.importorskip("peft")

FAMILIES: dict[str, Callable[..., Any]] = {"llava": tiny.llava, "qwen2_5_vl": tiny.qwen2_5_vl}
GREEDY = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
PRUNE: dict[str, Any] = {"method": "entropyprune", "layer": 1, "keep": 0.5}
NOTHING: dict[str, dict[str, Any]] = {
    "keep1": {"method": "entropyprune", "layer": 2, "keep": 1.0},
    "before": {"method": "random", "layer": 0, "keep": 1.0},
    "none": {"method": "none"},
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> Any:
    return FAMILIES[family](layers=4)


def installed(model: torch.nn.Module) -> dict[str, Any]:
    """What hangs on each module: its class, the names of its attributes, and every hook."""
    return {
        name: (
            type(module),
            set(module.__dict__),
            {k: dict(v) for k, v in module.__dict__.items() if "hooks" in k and isinstance(v, dict)},
        )
        for name, module in model.named_modules()
    }


def cached(cache: Any) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def forward(model: Any, inputs: dict[str, Any], **options: Any) -> list[torch.Tensor]:
    """Logits and every tensor of the cache."""
    with torch.no_grad():
        out = model(**inputs, use_cache=True, **options)
    return [out.logits, *cached(out.past_key_values)]


def generated(model: Any, inputs: dict[str, Any], **options: Any) -> list[torch.Tensor]:
    """Tokens, the logits they were chosen from, and every tensor of the cache."""
    out = model.generate(**inputs, **GREEDY, **options)
    return [out.sequences, *out.logits, *cached(out.past_key_values)]


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    """To the bit (NaN equals NaN: a padded row may hold some)."""
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# -- the object -------------------------------------------------------------------------------------------------


def test_same_object_before_during_and_after(model: Any) -> None:
    inputs = tiny.inputs(model, judge.ROWS)
    forward(model, inputs)  # stock models install hooks of their own in their first forward
    before, cls, config = installed(model), type(model), model.config.to_dict()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = [*forward(model, inputs), *generated(model, inputs)]
    registries = [dict(x._global_mapping) for x in (AttentionInterface, AttentionMaskInterface)]
    environment = dict(os.environ)

    def unchanged() -> None:
        assert type(model) is cls
        assert model.config.to_dict() == config
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert [dict(x._global_mapping) for x in (AttentionInterface, AttentionMaskInterface)] == registries
        assert dict(os.environ) == environment

    assert tokenprune.wrap(model, **PRUNE) is model
    assert tokenprune.is_wrapped(model)
    unchanged()
    assert forward(model, inputs)[0].shape[1] < wanted[0].shape[1]
    generated(model, inputs)
    unchanged()
    assert tokenprune.unwrap(model) is model
    assert not tokenprune.is_wrapped(model)
    unchanged()
    assert installed(model) == before
    assert_same([*forward(model, inputs), *generated(model, inputs)], wanted)


def test_unwrap_and_report_want_a_wrapped_model(model: Any) -> None:
    for call in (
        tokenprune.unwrap,
        tokenprune.report,
        lambda m: tokenprune.override(m, keep=0.5).__enter__(),
    ):
        with pytest.raises(tokenprune.TokenPruneError, match=r"not wrapped; call tokenprune\.wrap"):
            call(model)
    assert not tokenprune.is_wrapped("a string")
    assert not tokenprune.is_wrapped(torch.nn.Linear(2, 2))


def test_wrapping_twice_is_an_error(model: Any) -> None:
    with tokenprune.pruned(model, **PRUNE):
        during = installed(model)
        with pytest.raises(tokenprune.TokenPruneError, match=r"wrapped already; .*unwrap.*override"):
            tokenprune.wrap(model, "random", keep=0.1)
        assert installed(model) == during
        forward(model, tiny.inputs(model, judge.ROWS[:1]))
        assert tokenprune.report(model).method == "entropyprune"


def test_transformers_too_old_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = installed(model)
    for version in ("4.57.1", "5.16.2"):
        monkeypatch.setattr("transformers.__version__", version)
        with pytest.raises(tokenprune.UnsupportedModelError, match=r"too old: pip install .*>=5\.17,<=5\.24"):
            tokenprune.wrap(model, **PRUNE)
    assert installed(model) == before
    for version in ("5.17.0", "5.18.0.dev0", "5.24.3"):
        monkeypatch.setattr("transformers.__version__", version)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with tokenprune.pruned(model, **PRUNE):
                pass


def test_transformers_too_new_warns(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("5.25.0.dev0", "5.31.2", "6.0.0rc1"):
        monkeypatch.setattr("transformers.__version__", version)
        with pytest.warns(
            tokenprune.UntestedWarning, match=rf"{version} is newer .*5\.17 to 5\.24.*pip install"
        ):
            tokenprune.wrap(model, **PRUNE)
        tokenprune.unwrap(model)


def test_supported_releases_are_those_of_the_package() -> None:
    """What pip may install is what `wrap` takes without a word."""
    (low, high), project = (releases.OLDEST, releases.NEWEST), Path(__file__).parents[1] / "pyproject.toml"
    assert f'"transformers>={low[0]}.{low[1]},<{high[0]}.{high[1] + 1}"' in project.read_text()


def test_pruned_unwraps_after_an_error(model: Any) -> None:
    before = installed(model)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), tokenprune.pruned(model, **PRUNE):
            raise error
        assert installed(model) == before


def test_failing_install_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrapping happens or fails: also when a module turns out to be missing half way through the hooks."""
    model = tiny.llava(layers=4)
    inputs = tiny.inputs(model, judge.ROWS[:1])
    wanted = forward(model, inputs)
    before = installed(model)

    def missing(*_: Any) -> Any:
        raise AttributeError("no such projection")

    monkeypatch.setattr("tokenprune.models.decoders.Decoder.state_module", missing)
    with pytest.raises(AttributeError, match="no such projection"):
        tokenprune.wrap(model, **PRUNE)
    assert installed(model) == before
    assert_same(forward(model, inputs), wanted)


# -- nothing to prune: equal to the bit (contract 8) --------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_nothing_to_prune_is_equal_to_the_bit(family: str, attention: str, pad: str) -> None:
    model = FAMILIES[family](layers=4, attn_implementation=attention)
    length = 128
    calls: list[tuple[dict[str, Any], dict[str, dict[str, Any]]]] = [
        (tiny.inputs(model, judge.ROWS, pad=pad), NOTHING),
        (tiny.inputs(model, judge.ROWS[:1]), NOTHING),
        (tiny.inputs(model, [["text:5"], ["text:9"]], pad=pad), {**NOTHING, "text": PRUNE}),
    ]

    def results(inputs: dict[str, Any]) -> list[torch.Tensor]:
        static = StaticCache(config=model.config.text_config, max_cache_len=length)
        found = forward(model, inputs) + forward(model, inputs, past_key_values=static)
        if pad == "left":
            found += generated(model, inputs) + generated(model, inputs, cache_implementation="static")
        return found

    for inputs, choices in calls:
        wanted = results(inputs)
        for arguments in choices.values():
            with tokenprune.pruned(model, strict=True, **arguments):
                assert_same(results(inputs), wanted)
                report = tokenprune.report(model)
            assert not report.pruned and report.kept == report.tokens
            assert report.index is None and report.keep_lists == []


# -- report and override (contract 2) -------------------------------------------------------------------------------


def test_report_before_any_call_and_after_text_only(model: Any) -> None:
    with tokenprune.pruned(model, **PRUNE):
        with pytest.raises(tokenprune.TokenPruneError, match="not been called yet"):
            tokenprune.report(model)
        forward(model, tiny.inputs(model, judge.ROWS[:1]))
        assert tokenprune.report(model).pruned
        forward(model, tiny.inputs(model, [["text:6"]]))
        report = tokenprune.report(model)
        assert not report.pruned and report.tokens == 0 and report.images == ()
        assert report.retention_average == report.retention_after_cut == 1.0
        assert report.flops == report.flops_unpruned
        assert "no visual tokens" in str(report)


def test_the_default_layer_is_named() -> None:
    """Contract 4: published for the family, else L / 16."""
    for build, layers, layer, reason in (
        (tiny.llava, 6, 2, "published for llava"),
        (tiny.qwen2_5_vl, 6, 1, "published for qwen2_5_vl"),
        (tiny.llava, 2, 1, "L / 16"),  # the published layer does not exist
    ):
        model = build(layers=layers)
        with tokenprune.pruned(model, "random", keep=0.9):
            forward(model, tiny.inputs(model, judge.ROWS[:1]))
            report = tokenprune.report(model)
        assert report.layers_cut == (layer,)
        assert report.layer_reason == reason


def last_call(model: Any) -> tokenprune.Report:
    forward(model, tiny.inputs(model, [["text:4", "image", "text:5"]]))
    return tokenprune.report(model)


def test_override() -> None:
    model = tiny.llava(layers=4)
    image = model.config.image_seq_length
    with tokenprune.pruned(model, **PRUNE, source="key"):
        base = last_call(model)
        with tokenprune.override(model, keep=1.0):
            assert not last_call(model).pruned
        with tokenprune.override(model, keep=3, budget="after_cut"):
            assert last_call(model).kept == 3
            with tokenprune.override(model, layer=2):
                inner = last_call(model)
                assert inner.layers_cut == (2,) and inner.kept == 3
                with tokenprune.override(model, method="random", seed=7):
                    assert last_call(model).parameters == {"seed": 7}
                assert last_call(model).keep_lists == inner.keep_lists
            assert last_call(model).layers_cut == (1,)
        with tokenprune.override(model, cuts=[(1, 0.8), (3, 0.2)], keep=None):
            report = last_call(model)
            assert report.layers_cut == (1, 3) and report.kept == int(0.2 * image)
            with tokenprune.override(model, layer=2, keep=0.6):
                assert last_call(model).layers_cut == (2,)
        with tokenprune.override(model, normalization="trace"):
            parameters = last_call(model).parameters
            assert (parameters["source"], parameters["normalization"]) == ("key", "trace")
        with tokenprune.override(model, method="entropyprune"):
            assert last_call(model).parameters["source"] == "query"  # a new method starts from its defaults
        with tokenprune.override(model, keep_lists=[[[[1, 4, 6]]]]):
            assert last_call(model).keep_lists == [[[[1, 4, 6]]]]
            with tokenprune.override(model, keep=0.6):  # a new budget replaces forced lists
                assert last_call(model).keep == 0.6
        with tokenprune.override(model, method="none"):
            assert not last_call(model).pruned
        assert last_call(model).keep_lists == base.keep_lists


def test_overrides_leave_nothing_behind_that_adds_up() -> None:
    model = tiny.llava(layers=4)
    changes: list[dict[str, Any]] = [
        *({"keep": k / 10} for k in range(3, 10)),
        {"layer": 2, "keep": 0.7},
        {"cuts": [(1, 0.8), (3, 0.2)]},
        {"source": "key"},
        {"method": "random", "seed": 3},
        {"keep_lists": [[[[1, 4, 6]]]]},
    ]

    def once() -> dict[str, Any]:
        for change in changes:
            with tokenprune.override(model, **change):
                last_call(model)
        return installed(model)

    with tokenprune.pruned(model, **PRUNE):
        last_call(model)  # transformers adds to its modules at their first call
    stock = installed(model)
    with tokenprune.pruned(model, **PRUNE):
        first = once()  # taps are armed where a layer or a state is scored for the first time
        for _ in range(10):
            assert once() == first
    assert installed(model) == stock


def test_numbers_that_change_touch_no_hook_and_no_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llava(layers=4)
    with tokenprune.pruned(model, **PRUNE):
        during = installed(model)
        monkeypatch.setattr(torch.compiler, "reset", lambda: pytest.fail("compiled code was dropped"))
        monkeypatch.setitem(
            torch._dynamo.utils.counters["frames"], "total", 1
        )  # as if something were compiled
        for i in range(200):
            with tokenprune.override(model, keep=0.3 + i / 400):
                assert installed(model) == during
        monkeypatch.undo()


def test_cuts_of_their_own_replace_the_overall_keep() -> None:
    model = tiny.llava(layers=4)
    with tokenprune.pruned(model, **PRUNE), tokenprune.override(model, cuts=[(1, 0.8), (3, 0.2)]):
        assert last_call(model).layers_cut == (1, 3)


def test_override_restores_after_errors() -> None:
    model = tiny.llava(layers=4)
    with tokenprune.pruned(model, **PRUNE):
        base, during = last_call(model), installed(model)
        for wrong in ({"keep": 0}, {"layer": 4}, {"seed": 1}, {"method": "guess"}, {"keep_lists": []}):
            with pytest.raises(tokenprune.ConfigError):
                with tokenprune.override(model, **wrong):
                    raise AssertionError("the block must not run")
            assert installed(model) == during
        for error in (RuntimeError, KeyboardInterrupt):
            with pytest.raises(error), tokenprune.override(model, keep=3, budget="after_cut"):
                assert last_call(model).kept == 3
                raise error
            assert last_call(model).keep_lists == base.keep_lists


# -- what else a model is used with ---------------------------------------------------------------------------------


def lora() -> Any:
    # init_lora_weights=False: adapters that do something
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(tiny.llava(layers=4), config).eval()


def test_a_family_of_the_users_own() -> None:
    from tokenprune.models import FAMILIES
    from tokenprune.models.llava import Llava

    class Mine(Llava):
        name = "mine"
        model_types = ("mine",)

    model = tiny.llava()
    inputs = tiny.inputs(model, judge.ROWS[:1])
    model.config.model_type = "mine"  # of a checkpoint nobody knows
    with pytest.warns(tokenprune.UntestedWarning, match="of no known family"):
        tokenprune.wrap(model, keep=0.5)
    tokenprune.unwrap(model)
    with pytest.raises(tokenprune.ConfigError, match="unknown family 'nosuch'; choose one of llava"):
        tokenprune.wrap(model, keep=0.5, family="nosuch")
    for family in (Mine, "llava"):
        with tokenprune.pruned(model, "entropyprune", keep=0.5, family=family), torch.no_grad():
            model(**inputs)
            assert tokenprune.report(model).layers_cut == ((2,) if family == "llava" else (1,))
            with pytest.raises(tokenprune.ConfigError, match="fixed when a model is wrapped"):
                with tokenprune.override(model, family="llava"):
                    pass
    assert "mine" not in FAMILIES


@pytest.mark.parametrize(
    ("around", "text"),
    [
        (torch.compile, r"OptimizedModule is not the model itself; wrap the model before torch\.compile"),
        (nn.DataParallel, r"DataParallel is not the model itself; give its \.module"),
        (lambda model: _Distributed(model), r"DistributedDataParallel is not .* give its \.module"),
    ],
)
def test_what_is_put_around_a_model_is_refused_by_name(around: Any, text: str) -> None:
    model = tiny.llava()
    with pytest.raises(tokenprune.UnsupportedModelError, match=text):
        tokenprune.wrap(around(model), "random", layer=1, keep=0.5)
    tokenprune.unwrap(tokenprune.wrap(model, "random", layer=1, keep=0.5))


class _Distributed(nn.parallel.DistributedDataParallel):
    """Without a process group."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


def test_shallow_copies_and_exports_are_refused_and_the_model_works_on() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, [["text:4", "image", "text:5"]])
    with tokenprune.pruned(model, "random", layer=1, keep=0.5), torch.no_grad():
        wanted = model(**inputs).logits
        other = copy.copy(model)
        with pytest.raises(tokenprune.UnsupportedModeError, match=r"a copy .* of a wrapped model"):
            other(**inputs)
        with pytest.raises(tokenprune.TokenPruneError, match="shallow copy of a wrapped model"):
            tokenprune.unwrap(other)
        with pytest.raises(
            Exception, match="cannot be exported"
        ):  # which torch may put into an error of its own
            torch.export.export(model, (), kwargs=dict(inputs))
        assert torch.equal(model(**inputs).logits, wanted)


@pytest.mark.parametrize("source", ["query", "key", "value"])
def test_peft_model(source: str) -> None:
    adapted = lora()
    inner = adapted.get_base_model()
    inputs = tiny.inputs(inner, judge.ROWS)
    wanted = [*forward(adapted, inputs), *generated(adapted, inputs)]
    before, cls = installed(adapted), type(adapted)
    assert tokenprune.wrap(adapted, **PRUNE, source=source) is adapted
    assert type(adapted) is cls and tokenprune.is_wrapped(adapted) and tokenprune.is_wrapped(inner)
    out = adapted.generate(**inputs, **GREEDY)
    report = tokenprune.report(adapted)
    assert report.pruned and report.keep_lists == tokenprune.report(inner).keep_lists
    with adapted.disable_adapter():
        plain = adapted.generate(**inputs, **GREEDY)
    assert not torch.equal(plain.logits[0], out.logits[0])  # the adapters do take part
    tokenprune.unwrap(adapted)
    assert installed(adapted) == before
    judged = oracle.masked_forward(
        inner,
        inputs,
        judge.cuts_of(report),
        tiny.visual_positions(inner, inputs),
        generated=out.sequences[:, inputs["input_ids"].shape[1] :],
        positions="generate",
    ).steps()
    assert float((torch.stack(out.logits, 1) - judged).abs().max()) <= judge.TOLERANCE
    assert_same([*forward(adapted, inputs), *generated(adapted, inputs)], wanted)


@pytest.mark.parametrize("method", ["entropyprune", "fastv", "vflowopt"])
@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_adapters_come_and_go_after_wrap(method: str, text: str) -> None:
    """Put in, they replace the modules that are listened to; merged, they do so again. Both are followed."""
    model = tiny.llava(text, layers=4)
    inputs = tiny.inputs(model, judge.ROWS)
    settings = {"method": method, "keep": 0.5, **({} if method == "vflowopt" else {"layer": 1})}
    tokenprune.wrap(model, **settings)
    plain = forward(model, inputs)
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    for changed in (lambda: adapted, adapted.merge_and_unload):
        now = changed()
        followed = forward(now, inputs)
        kept = tokenprune.report(now).keep_lists
        tokenprune.unwrap(now)
        with tokenprune.pruned(now, **settings):
            assert_same(forward(now, inputs), followed)
            assert tokenprune.report(now).keep_lists == kept
        tokenprune.wrap(now, **settings)
    assert not torch.equal(plain[0], followed[0])
    tokenprune.unwrap(now)
    assert "tokenprune." not in str(installed(now))


def test_save_and_reload(model: Any, tmp_path: Path) -> None:
    inputs = tiny.inputs(model, judge.ROWS)
    wanted = forward(model, inputs)
    with tokenprune.pruned(model, **PRUNE):
        model.save_pretrained(tmp_path)
        pruned = forward(model, inputs)
    again = type(model).from_pretrained(tmp_path)
    state = model.state_dict()
    assert list(again.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert "tokenprune" not in (tmp_path / "config.json").read_text()
    assert_same(forward(again, inputs), wanted)
    with tokenprune.pruned(again, **PRUNE):
        assert_same(forward(again, inputs), pruned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_changed_after_wrap(dtype: torch.dtype) -> None:
    late, early = tiny.llava(layers=4), tiny.llava(layers=4).to(dtype)
    inputs = tiny.inputs(early, judge.ROWS)
    assert tokenprune.wrap(late, **PRUNE).to(dtype) is late
    tokenprune.wrap(early, **PRUNE)
    assert_same(generated(late, inputs), generated(early, inputs))
    assert tokenprune.report(late).keep_lists == tokenprune.report(early).keep_lists


class Collect(BaseStreamer):
    """Keeps what generate() streams."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamer(model: Any) -> None:
    inputs = tiny.inputs(model, judge.ROWS[:1])
    streamer = Collect()
    with tokenprune.pruned(model, **PRUNE):
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=5, streamer=streamer)
    assert streamer.ended and streamer.ids == ids[0].tolist()


def processor(model: LlavaForConditionalGeneration) -> LlavaProcessor:
    """A processor of the model's own vocabulary, made of words instead of a trained tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    special = {tiny.PAD: "<pad>", tiny.BOS: "<s>", tiny.EOS: "</s>", tiny.IMAGE: "<image>"}
    vocabulary = {special.get(i, f"w{i}"): i for i in range(tiny.VOCAB)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=f"w{tiny.VOCAB - 1}"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vision = model.config.vision_config
    return LlavaProcessor(
        CLIPImageProcessor(
            size={"shortest_edge": vision.image_size},
            crop_size={"height": vision.image_size, "width": vision.image_size},
        ),
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the CLS token, which "default" takes off again
    )


def test_pipeline() -> None:
    model = tiny.llava(layers=4)
    pipe = pipeline("image-text-to-text", model=model, processor=processor(model))
    picture = Image.radial_gradient("L").convert("RGB").resize((48, 32))
    call: dict[str, Any] = {"images": [picture], "text": "w20 <image> w30 w40"}
    options = {"max_new_tokens": 4, "do_sample": False}
    before = pipe(**call, generate_kwargs=options)
    with tokenprune.pruned(model, **PRUNE):
        pruned = pipe(**call, generate_kwargs=options)
        report = tokenprune.report(model)
        assert report.pruned and report.tokens == model.config.image_seq_length
        inputs = pipe.processor(**call, return_tensors="pt")
        ids = model.generate(**inputs, **options)
    text = pipe.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert pruned[0]["generated_text"].endswith(text)
    assert pipe(**call, generate_kwargs=options) == before


def test_the_version_tested_is_supported() -> None:
    assert tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 17)
