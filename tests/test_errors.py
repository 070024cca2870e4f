"""Contract 15, 18 and 19: what is refused, when, with which words, and that a refusal changes nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3_5ForSequenceClassification

import judge
import tiny
import tokenprune
from tokenprune import BudgetError, ConfigError, TokenPruneError, UnsupportedModeError, UnsupportedModelError
from tokenprune.methods import EntropyPrune

LAYERS = 4
ONE = ["text:4", "image", "text:5"]
FAMILIES: dict[str, Callable[..., Any]] = {"llava": tiny.llava, "qwen2_5_vl": tiny.qwen2_5_vl}


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny.llava(layers=LAYERS)


@pytest.fixture(scope="module")
def qwen() -> Any:
    return tiny.qwen2_5_vl(layers=LAYERS)


def installed(model: nn.Module) -> dict[str, Any]:
    """The names of each module's attributes, and every hook."""
    return {
        name: (
            set(module.__dict__),
            {k: dict(v) for k, v in module.__dict__.items() if "hooks" in k and isinstance(v, dict)},
        )
        for name, module in model.named_modules()
    }


def logits(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **options).logits


@contextmanager
def untouched(model: Any, inputs: dict[str, Any] | None = None) -> Iterator[None]:
    """No hook more or less afterwards, and the next forward (of `inputs`) equal to the bit."""
    inputs = tiny.inputs(model, [ONE]) if inputs is None else inputs
    wanted = logits(model, inputs)
    before = installed(model)
    yield
    assert installed(model) == before
    assert torch.equal(logits(model, inputs), wanted)


@contextmanager
def refusal(kind: type[TokenPruneError], text: str) -> Iterator[None]:
    """Exactly this class, and one line that contains `text` (a regular expression)."""
    with pytest.raises(kind, match=text) as caught:
        yield
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message and 20 < len(message) < 300


# -- at wrap --------------------------------------------------------------------------------------------------------

KEEP = r"keep must be a float in \(0, 1\] \(a fraction\) or an int >= 1 \(tokens per image\)"
LAYER = r"layer must be an int from 1 to 3, or 'auto', not"
RANGE = r"can cut this model at layers 1 to 3, not"
BAD_ARGUMENTS: list[tuple[dict[str, Any], type[ConfigError], str]] = [
    ({"keep": 0}, BudgetError, KEEP),
    ({"keep": 0.0}, BudgetError, KEEP),
    ({"keep": -1}, BudgetError, KEEP),
    ({"keep": -0.5}, BudgetError, KEEP),
    ({"keep": 1.5}, BudgetError, KEEP),
    ({"keep": math.nan}, BudgetError, KEEP),
    ({"keep": math.inf}, BudgetError, KEEP),
    ({"keep": True}, ConfigError, KEEP),
    ({"keep": "0.25"}, ConfigError, KEEP),
    ({"keep": None}, ConfigError, r"say how much to keep, for example keep=0\.25"),
    ({}, ConfigError, r"say how much to keep, for example keep=0\.25"),
    ({"method": "entropyprune", "keep": 0.5, "layer": -1}, ConfigError, RANGE),
    ({"method": "entropyprune", "keep": 0.5, "layer": LAYERS}, ConfigError, RANGE),
    ({"method": "entropyprune", "keep": 0.5, "layer": True}, ConfigError, LAYER),
    ({"method": "entropyprune", "keep": 0.5, "layer": 1.5}, ConfigError, LAYER),
    ({"method": "entropyprune", "keep": 0.5, "layer": "1"}, ConfigError, LAYER),
    (
        {"method": "entropyprune", "keep": 0.5, "layer": 0},
        ConfigError,
        "layers 1 to 3, not 0: it scores states of the layer before",
    ),
    (
        {"method": "entropyprune", "keep": 0.5, "cuts": [(0, 0.7), (2, None)]},
        ConfigError,
        "layers 1 to 3, not 0: it scores states",
    ),
    (
        {"method": "guess", "keep": 0.5},
        ConfigError,
        "unknown method 'guess'; choose one of cdpruner, dart",
    ),
    ({"method": None, "keep": 0.5}, ConfigError, "unknown method None; choose one of"),
    ({"method": EntropyPrune, "keep": 0.5}, ConfigError, "unknown method .*, or pass a Method"),
    (
        {"method": "entropyprune", "keep": 0.5, "ratio": 0.5},
        ConfigError,
        "'entropyprune' has no parameter 'ratio'; it has source",
    ),
    (
        {"method": "uniform", "keep": 0.5, "seed": 0},
        ConfigError,
        "'uniform' has no parameter 'seed'; it has none",
    ),
    (
        {"method": EntropyPrune(), "keep": 0.5, "source": "key"},
        ConfigError,
        "source: set on the method instance",
    ),
    (
        {"method": "entropyprune", "keep": 0.5, "source": "keys"},
        ConfigError,
        "source must be one of query, key, value, hidden, not 'keys'",
    ),
    ({"method": "random", "keep": 0.5, "seed": 0.5}, ConfigError, "seed must be an int"),
    ({"keep": 0.5, "budget": "mean"}, ConfigError, "budget must be 'average' or 'after_cut', not 'mean'"),
    ({"keep": 0.5, "positions": "new"}, ConfigError, "positions must be 'keep' or 'compact', not 'new'"),
    (
        {"keep": 0.5, "layer": 1, "positions": "compact"},
        ConfigError,
        "before the LLM .*are at 1 of a llava.*'keep'",
    ),
    ({"keep": 0.5, "strict": 1}, ConfigError, "strict must be True or False, not 1"),
    (
        {"keep": 0.5, "layer": 2},
        BudgetError,
        r"50\.0%.*layer 2 of 4.*reachable range starts above 50\.0%.*cut earlier",
    ),
    (
        {"keep": 0.1, "layer": 1},
        BudgetError,
        r"10\.0%.*reachable range starts above 25\.0%.*budget='after_cut'",
    ),
    ({"cuts": []}, ConfigError, r"cuts is empty; give at least one \(layer, keep\)"),
    ({"cuts": [(2, 0.5), (1, 0.2)]}, ConfigError, "ascending order of layer"),
    ({"cuts": [(2, 0.5), (2, 0.2)]}, ConfigError, "ascending order of layer, one per layer"),
    ({"cuts": [(1, 0.2), (2, 0.5)]}, ConfigError, "keeps 0.5, more than the 0.2 .*non-increasing"),
    ({"cuts": [(1, 5), (2, 6)]}, ConfigError, "keeps 6, more than the 5 .*non-increasing"),
    ({"cuts": [(1, None), (2, 0.5)]}, ConfigError, "the cut at layer 1 needs a keep"),
    ({"cuts": [(1, 0.5), (2, None)]}, ConfigError, "say how much to keep"),
    ({"cuts": [(1, 0.5), (2, 0.2)], "keep": 0.3}, ConfigError, "every cut says its own keep"),
    ({"cuts": [(1, 0.5), (2, 0)]}, BudgetError, "keep of the cut at layer 2 must be"),
    ({"method": "entropyprune", "cuts": [(1, 0.5), (LAYERS, 0.2)]}, ConfigError, RANGE),
    ({"cuts": [("1", 0.5), (2, 0.2)]}, ConfigError, "layer of a cut must be an int, not '1'"),
    ({"cuts": [(True, 0.5)]}, ConfigError, "layer of a cut must be an int, not True"),
    ({"cuts": [(1, 0.5, 3)]}, ConfigError, r"cuts must be a list of \(layer, keep\) pairs"),
    ({"cuts": 0.5}, ConfigError, r"cuts must be a list of \(layer, keep\) pairs, not 0\.5"),
    ({"cuts": [1, 2]}, ConfigError, r"cuts must be a list of \(layer, keep\) pairs"),
    ({"cuts": [(1, 0.5)], "layer": 1}, ConfigError, "layer or cuts, not both"),
    ({"method": "none", "keep": 0.5}, ConfigError, "'none' keeps everything: leave keep"),
    ({"method": "none", "cuts": [(1, 0.5)]}, ConfigError, "'none' keeps everything"),
    ({"method": "none", "keep_lists": [[[[0]]]]}, ConfigError, "'none' keeps everything"),
    (
        {"method": "entropyprune", "keep_lists": []},
        ConfigError,
        "keep_lists has 0 cuts, but the model is cut 1 times",
    ),
    ({"keep_lists": 3}, ConfigError, r"keep_lists must be keep_lists\[cut\]\[row\]\[image\]"),
]


@pytest.mark.parametrize(
    ("arguments", "kind", "text"), BAD_ARGUMENTS, ids=[str(a) for a, _, _ in BAD_ARGUMENTS]
)
def test_bad_arguments(llava: Any, arguments: dict[str, Any], kind: type[ConfigError], text: str) -> None:
    with untouched(llava), refusal(kind, text):
        tokenprune.wrap(llava, **arguments)
    assert not tokenprune.is_wrapped(llava)
    # override refuses the same, and the wrapped model goes on as it was
    with tokenprune.pruned(llava, "random", layer=1, keep=1.0):
        if arguments and arguments != {"keep": None} and "none" not in arguments.values():
            with untouched(llava), pytest.raises(ConfigError):
                changes = {"keep": None, **arguments, "method": arguments.get("method", "entropyprune")}
                with tokenprune.override(llava, **changes):
                    pass


def test_compact_positions_on_m_rope(qwen: Any) -> None:
    with (
        untouched(qwen),
        refusal(ConfigError, "one position per token; .* are at 0 of a qwen2_5_vl model: use 'keep'"),
    ):
        tokenprune.wrap(qwen, "random", keep=0.5, layer=0, positions="compact")


@pytest.mark.parametrize("source", ["key", "value"])
def test_a_single_key_value_head(source: str) -> None:
    model = tiny.llava(layers=LAYERS, kv_heads=1)
    with (
        untouched(model),
        refusal(ConfigError, f"source='{source}' has a single head .*; use source='query'"),
    ):
        tokenprune.wrap(model, "entropyprune", keep=0.5, layer=1, source=source)
    with tokenprune.pruned(model, "entropyprune", keep=0.5, layer=1, source="query"):
        logits(model, tiny.inputs(model, [ONE]))
        assert tokenprune.report(model).pruned


def text_only() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, **sizes)
    return LlamaForCausalLM(config).eval()


def classifier() -> Any:
    return Qwen3_5ForSequenceClassification(tiny.qwen3_5(layers=2).config).eval()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            text_only,
            r"LlamaForCausalLM \(model_type 'llama'\) is not supported.* no text model is found .* pass a Family",
        ),
        (classifier, "Qwen3_5ForSequenceClassification has another head .*or the body alone"),
        (
            lambda: nn.Linear(2, 2),
            "expected a loaded transformers model, got Linear; load it with from_pretrained",
        ),
        (lambda: "llava-hf/llava-1.5-7b-hf", "expected a loaded transformers model, got str; load it"),
        (lambda: None, "expected a loaded transformers model, got NoneType"),
        (lambda: tiny.llava, "expected a loaded transformers model, got function"),
    ],
    ids=["llama", "classifier", "linear", "string", "none", "function"],
)
def test_unsupported_models(make: Callable[[], Any], text: str) -> None:
    model = make()
    before = installed(model) if isinstance(model, nn.Module) else None
    with refusal(UnsupportedModelError, text):
        tokenprune.wrap(model, keep=0.5)
    assert before is None or installed(model) == before
    assert not tokenprune.is_wrapped(model)


# -- at the call ----------------------------------------------------------------------------------------------------


def refuse_call(
    model: Any,
    inputs: dict[str, Any],
    kind: type[TokenPruneError],
    text: str,
    *,
    good: dict[str, Any] | None = None,
    **arguments: Any,
) -> None:
    """The call is refused before anything runs: no layer, no cache entry, no report; a good call works next."""
    good = tiny.inputs(model, [ONE]) if good is None else good
    with untouched(model, good), tokenprune.pruned(model, **arguments):
        cache = DynamicCache(config=model.config.text_config)
        ran: list[int] = []
        layer = model.model.language_model.layers[0]
        handle = layer.register_forward_pre_hook(lambda *_: ran.append(1))
        for call in (
            lambda: logits(model, inputs, past_key_values=cache),
            lambda: model.generate(**inputs, max_new_tokens=2, do_sample=False),
        ):
            with refusal(kind, text):
                call()
        handle.remove()
        assert not ran and cache.get_seq_length() == 0
        with pytest.raises(TokenPruneError, match="not been called yet"):
            tokenprune.report(model)
        with tokenprune.override(model, method="none"):
            logits(model, good)


def test_strict_wants_the_tokens_an_image_has_not(llava: Any, qwen: Any) -> None:
    refuse_call(
        llava,
        tiny.inputs(llava, [ONE]),
        BudgetError,
        r"keep=26 tokens, but the image has only 25",
        keep=26,
        layer=1,
        strict=True,
    )
    # the smallest image decides: its grid is known at the call only
    inputs = tiny.inputs(qwen, [["image:4x4", "text:2", "image:2x2"]])
    refuse_call(
        qwen,
        inputs,
        BudgetError,
        r"keep=5 tokens, .* has only 4; .*fraction",
        method="random",
        keep=5,
        layer=0,
        strict=True,
    )


def test_an_image_smaller_than_a_number_of_tokens_stays_whole_and_the_report_says_so(qwen: Any) -> None:
    inputs = tiny.inputs(qwen, [["image:4x4", "text:2", "image:2x2", "text:1"]])
    with tokenprune.pruned(qwen, "random", keep=5, layer=0):
        logits(qwen, inputs)
        large, small = tokenprune.report(qwen).images
    assert (large.kept, large.notes) == ((5,), {})
    assert (small.kept, small.notes) == ((4,), {"kept whole: fewer tokens than keep=5": 1})


def test_all_images_smaller_than_a_number_of_tokens(llava: Any, recwarn: pytest.WarningsRecorder) -> None:
    stock = logits(llava, tiny.inputs(llava, [ONE]))
    with tokenprune.pruned(llava, layer=1, keep=26):
        assert torch.equal(logits(llava, tiny.inputs(llava, [ONE])), stock)
        report = tokenprune.report(llava)
    assert not report.pruned and report.images[0].notes == {"kept whole: fewer tokens than keep=26": 1}
    assert "kept whole" in str(report)
    assert not [w for w in recwarn if issubclass(w.category, tokenprune.NothingPrunedWarning)]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        # 25 tokens, a cut at 1 of 4: (25 + 3 * 1) / 100 = 28 % .. 100 %
        (
            {"keep": 0.27, "layer": 1, "strict": True},
            r"27\.0%.*reachable range is 7 to 25 tokens \(28\.0% to 100\.0%\)",
        ),
        ({"keep": 6, "layer": 1}, r"average of 6 of 25 tokens.*reachable range is 7 to 25 tokens.*after_cut"),
        # two cuts: one layer of 25, two of 13 (12.5 is rounded), then one of 1 .. 13
        (
            {"keep": 0.505, "cuts": [(1, 0.5), (3, None)], "strict": True},
            r"reachable range is 13 to 16 tokens \(52\.0% to 64\.0%\)",
        ),
        ({"keep": 17, "cuts": [(1, 0.5), (3, None)], "strict": True}, r"reachable range is 13 to 16 tokens"),
        ({"keep": 2, "layer": 2}, r"reachable range is 13 to 25 tokens"),
    ],
)
def test_unreachable_average_at_the_call(llava: Any, arguments: dict[str, Any], text: str) -> None:
    refuse_call(llava, tiny.inputs(llava, [ONE]), BudgetError, text, **arguments)


@pytest.mark.parametrize("method", ["entropyprune", "fastv", "vflowopt"])
def test_a_small_image_among_others_is_kept_as_near_as_it_can_be(method: str) -> None:
    """Shares that a large image can keep and a small one cannot: no evaluation dies of one tiny picture."""
    model = tiny.qwen2_5_vl(layers=28)
    inputs = tiny.inputs(model, [["image:16x16", "text:4"], ["image:2x2", "text:4"]])
    keep = 0.25 if method != "vflowopt" else 0.1
    small = "another share than asked"
    with tokenprune.pruned(model, method, keep=keep):
        logits(model, inputs)
        report = tokenprune.report(model)
        large, tiny_one = report.images
        assert large.kept and not large.notes and abs(large.average - keep * large.tokens) < 1.5
        assert tiny_one.kept[-1] == 1 and any(small in note for note in tiny_one.notes)
        assert small in str(report)
        with tokenprune.override(model, strict=True), refusal(BudgetError, "cannot be reached"):
            logits(model, inputs)


@pytest.mark.parametrize(
    "arguments", [{"keep": 20}, {"keep": 200}, {"keep": 17, "cuts": [(0, 0.5), (1, 0.4), (3, None)]}]
)
def test_a_small_image_never_stops_a_run_for_a_number_of_tokens(arguments: dict[str, Any]) -> None:
    """It keeps what it can and says so, for numbers as for shares; `strict` raises."""
    model = tiny.qwen2_5_vl(layers=4)
    inputs = tiny.inputs(model, [["image:6x6", "text:4"], ["image:2x2", "text:4"]])
    arguments = {"cuts": [(1, 0.5), (3, None)], **arguments}
    with tokenprune.pruned(model, "random", **arguments):
        logits(model, inputs)
        report = tokenprune.report(model)
        assert all(
            any("too few tokens" in n or "fewer tokens" in n for n in i.notes) for i in report.images[1:]
        )
        assert report.images[1].average <= 4 and report.images[1].kept[-1] >= 1
        with tokenprune.override(model, strict=True), pytest.raises(BudgetError):
            logits(model, inputs)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"keep": 0.8, "cuts": [(1, 0.5), (3, None)]},
            r"80\.0%.* cuts at 1, 3 of 4: .* 50\.0% and ends at 62\.5%",
        ),
        (
            {"keep": 0.3, "cuts": [(1, 0.5), (3, None)]},
            r"30\.0%.* cuts at 1, 3 of 4: .* above 50\.0% and ends",
        ),
    ],
)
def test_what_no_image_can_reach_is_refused_at_wrap(llava: Any, arguments: dict[str, Any], text: str) -> None:
    with untouched(llava), refusal(BudgetError, text):
        tokenprune.wrap(llava, **arguments)


def test_the_edge_of_the_reachable_range(llava: Any) -> None:
    for keep, kept in ((0.28, 1), (7, 1), (0.5, 8)):
        with tokenprune.pruned(llava, layer=1, keep=keep):
            logits(llava, tiny.inputs(llava, [ONE]))
            assert tokenprune.report(llava).kept == kept


@pytest.mark.parametrize(
    ("lists", "text"),
    [
        ([[[[0, 1]], [[0]]]], r"keep_lists\[0\] must hold one list per image for each of the 1 rows"),
        ([[[[0, 1], [0]]]], r"keep_lists\[0\] must hold one list per image"),
        ([[[]]], r"one list per image for each of the 1 rows \(1 images\)"),
        ([[[[3, 1]]]], r"keep_lists\[0\]\[0\]\[0\] must be a list of ints, ascending"),
        ([[[[1, 1]]]], "must be a list of ints, ascending"),
        ([[[[]]]], "ascending, non-empty"),
        ([[[[0, 25]]]], "drawn from the 25 tokens left"),
        ([[[[-1, 3]]]], "drawn from the 25 tokens left"),
        ([[[[1, 2, 3]]], [[[1, 4]]]], r"keep_lists\[1\]\[0\]\[0\] must be .* drawn from the 3 tokens left"),
        ([[["ab"]]], r"keep_lists\[0\]\[0\]\[0\] must be"),
        ([[[[1.5]]]], r"keep_lists\[0\]\[0\]\[0\] must be"),
        ([[4]], r"keep_lists\[0\] must hold one list per image"),
        ([4], r"keep_lists\[0\] must hold one list per image"),
        ([[[4]]], r"keep_lists\[0\]\[0\]\[0\] must be"),
    ],
)
def test_keep_lists(llava: Any, lists: Any, text: str) -> None:
    where: dict[str, Any] = {"layer": 1} if len(lists) == 1 else {"cuts": [(1, 0.5), (2, None)]}
    inputs = tiny.inputs(llava, [ONE])
    with untouched(llava), tokenprune.pruned(llava, keep_lists=lists, **where):
        with refusal(ConfigError, text):
            logits(llava, inputs)


def test_placeholders_that_do_not_match(llava: Any, qwen: Any) -> None:
    wrong = "do not line up"
    for model in (llava, qwen):
        inputs = tiny.inputs(model, [ONE])
        gone = dict(inputs, input_ids=inputs["input_ids"].clone())
        columns = tiny.visual_positions(model, inputs)[0][0]
        gone["input_ids"][0, columns[3]] = tiny.FIRST_TEXT_ID  # one placeholder less
        with untouched(model), tokenprune.pruned(model, keep=0.5, layer=1):
            with refusal(ConfigError, f"{wrong}; make the inputs with the model's own processor"):
                logits(model, gone)
            two = tiny.inputs(model, [["image", "text:2", "image"]])
            fewer = dict(two)
            if model is llava:
                fewer["pixel_values"] = two["pixel_values"][:1]
            else:
                patches = int(two["image_grid_thw"][0].prod())
                fewer.update(
                    pixel_values=two["pixel_values"][:patches], image_grid_thw=two["image_grid_thw"][:1]
                )
            with refusal(ConfigError, wrong):
                logits(model, fewer)
            more = dict(inputs, **{k: two[k] for k in ("pixel_values", "image_grid_thw") if k in two})
            with refusal(ConfigError, "2 images were given but the prompt has placeholders for 1"):
                logits(model, more)


def test_grids_missing(qwen: Any) -> None:
    inputs = tiny.inputs(qwen, [ONE])
    del inputs["image_grid_thw"]
    with untouched(qwen), tokenprune.pruned(qwen, keep=0.5, layer=1):
        with refusal(ConfigError, "images were given without image_grid_thw"):
            logits(qwen, inputs)


def test_features_made_before_wrap(llava: Any) -> None:
    inputs = tiny.inputs(llava, [ONE])
    with torch.no_grad():
        made = {"image": llava.get_image_features(inputs["pixel_values"], return_dict=True)}
    call = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with untouched(llava), tokenprune.pruned(llava, keep=0.5, layer=1):
        with refusal(
            UnsupportedModeError, "precomputed image features .* while .* is wrapped, or pass the pixels"
        ):
            logits(llava, call, mm_encoder_outputs=made)


def test_full_strategy_with_cls() -> None:
    model = tiny.llava(layers=LAYERS, strategy="full")
    inputs = tiny.inputs(model, [ONE])
    with untouched(model), tokenprune.pruned(model, keep=0.5, layer=1):
        with refusal(
            UnsupportedModeError, "vision_feature_select_strategy='full' keeps the CLS token; use 'default'"
        ):
            logits(model, inputs)


# -- never a silent no-op (contract 18) -----------------------------------------------------------------------------


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", tokenprune.NothingPrunedWarning)
        yield


def nothing(warned: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in warned if issubclass(w.category, tokenprune.NothingPrunedWarning)]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_budget_that_prunes_nothing_warns(family: str) -> None:
    """An image of one token cannot be halved."""
    model = tiny.llava(layers=LAYERS, side=1) if family == "llava" else tiny.qwen2_5_vl(layers=LAYERS)
    piece = "image" if family == "llava" else "image:1x1"
    inputs = tiny.inputs(model, [["text:3", piece, "text:4"]])
    wanted = logits(model, inputs)
    with untouched(model, inputs), tokenprune.pruned(model, layer=1, keep=0.5):
        for call in (
            lambda: logits(model, inputs),
            lambda: (model.generate(**inputs, max_new_tokens=3, do_sample=False), wanted)[1],
        ):
            with pytest.warns(
                tokenprune.NothingPrunedWarning, match="nothing was pruned: the budget rounds"
            ) as warned:
                result = call()
            assert len(nothing(list(warned))) == 1  # once per call, not per step
            report = tokenprune.report(model)
            assert not report.pruned and report.reason is not None
            assert f"NOTHING WAS PRUNED: {report.reason}" in str(report)
            assert report.to_dict()["reason"] == report.reason
            assert torch.equal(result, wanted)
        with no_warning(), tokenprune.override(model, keep=1.0):
            logits(model, inputs)
            assert tokenprune.report(model).reason is None
    strict: dict[str, Any] = {"layer": 1, "keep": 0.5, "strict": True}
    refuse_call(model, inputs, TokenPruneError, "nothing would be pruned: the budget", good=inputs, **strict)


def test_strict_does_not_mind_a_call_that_prunes(llava: Any) -> None:
    with no_warning(), tokenprune.pruned(llava, layer=1, keep=0.5, strict=True):
        for inputs in (
            tiny.inputs(llava, [ONE]),
            tiny.inputs(llava, judge.ROWS),
            tiny.inputs(llava, [["text:5"]]),
        ):
            llava.generate(**inputs, max_new_tokens=2, do_sample=False)
            assert tokenprune.report(llava).pruned == ("pixel_values" in inputs)


@pytest.mark.parametrize(
    "arguments",
    [
        {"layer": 1, "keep": 1.0},
        {"layer": 1, "keep": 25},
        {"method": "random", "layer": 0, "keep": 1.0, "budget": "after_cut"},
        {"method": "none"},
        {"layer": 1, "keep_lists": [[[list(range(25))]]]},
    ],
)
def test_no_warning_where_nothing_was_asked(llava: Any, arguments: dict[str, Any]) -> None:
    inputs = tiny.inputs(llava, [ONE])
    wanted = logits(llava, inputs)
    with no_warning(), tokenprune.pruned(llava, strict=True, **arguments):
        assert torch.equal(logits(llava, inputs), wanted)
        assert tokenprune.report(llava).reason is None
        if "keep_lists" not in arguments:
            logits(llava, tiny.inputs(llava, [["text:5"]]))
            assert tokenprune.report(llava).reason is None


def test_embeddings_without_ids(llava: Any) -> None:
    inputs = tiny.inputs(llava, [ONE])
    ids = inputs.pop("input_ids")
    with torch.no_grad():
        call = {**inputs, "inputs_embeds": llava.get_input_embeddings()(ids)}
    wanted = logits(llava, call)
    with untouched(llava), tokenprune.pruned(llava, layer=1, keep=0.5):
        with pytest.warns(
            tokenprune.NothingPrunedWarning, match="inputs_embeds came without input_ids"
        ) as warned:
            assert torch.equal(logits(llava, call), wanted)
        assert len(nothing(list(warned))) == 1
        report = tokenprune.report(llava)
        assert not report.pruned and "inputs_embeds" in str(report)
        strict = tokenprune.override(llava, strict=True)
        with strict, refusal(TokenPruneError, "nothing would be pruned: inputs_embeds"):
            logits(llava, call)
    with no_warning(), tokenprune.pruned(llava, "none"):
        assert torch.equal(logits(llava, call), wanted)


@pytest.mark.parametrize("source", ["query", "key", "value"])
def test_text_models_whose_states_are_made_otherwise_are_refused(source: str) -> None:
    """States of a decoder nobody has looked at could be scored wrongly without a word; its hidden states are safe."""
    model = tiny.llava()
    model.model.language_model.config.model_type = "olmo2"
    with refusal(UnsupportedModelError, "queries, keys and values of 'olmo2' decoders are not available"):
        tokenprune.wrap(model, "entropyprune", source=source, keep=0.5)
    with tokenprune.pruned(model, "entropyprune", source="hidden", keep=0.5):
        pass


def test_embeddings_alone_are_no_silent_no_op() -> None:
    model = tiny.llava()
    embeds = torch.randn(1, 6, 64)
    with tokenprune.pruned(model, "uniform", keep=0.5, layer=2), torch.no_grad():
        with pytest.warns(tokenprune.NothingPrunedWarning, match="input_ids"):
            model(inputs_embeds=embeds)
    with tokenprune.pruned(model, "uniform", keep=0.5, layer=2, strict=True), torch.no_grad():
        with pytest.raises(tokenprune.TokenPruneError, match="input_ids"):
            model(inputs_embeds=embeds)


def test_vision_feature_layer_of_the_call_is_refused() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, (["image", "text:3"],))
    with tokenprune.pruned(model, "uniform", keep=0.5, layer=2), torch.no_grad():
        with pytest.raises(tokenprune.UnsupportedModeError, match="vision_feature_layer"):
            model(**inputs, vision_feature_layer=-1)
