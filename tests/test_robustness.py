"""Contract 3, 12 and 13: dtypes, gradients, threads, copies, failures, offload, and the shapes that come back."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from packaging import version
from torch.nn import functional as F
from transformers import DynamicCache

import judge
import oracle
import tiny
import tokenprune
from tokenprune.models import find_family
from tokenprune.releases import checkpoints_forwards

OLD = version.parse(transformers.__version__) < version.parse("5.23")
FAMILIES: dict[str, Callable[..., Any]] = {"llava": tiny.llava, "qwen2_5_vl": tiny.qwen2_5_vl}
GREEDY = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
ENTROPY: dict[str, Any] = {"method": "entropyprune", "layer": 2, "keep": 0.6}
CUTS: dict[str, dict[str, Any]] = {
    "before": {"method": "random", "layer": 0, "keep": 0.4},
    "layer2": ENTROPY,
    "two": {"method": "random", "cuts": [(1, 0.7), (3, 0.3)]},
}


@pytest.fixture(params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param](layers=4)


@pytest.fixture(params=list(CUTS))
def cut(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CUTS[request.param]


def logits(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **options).logits


def length_after(report: tokenprune.Report) -> int:
    return report.layers[-1].length


# -- dtypes and gradient modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(model: Any, cut: dict[str, Any], dtype: torch.dtype) -> None:
    """As many tokens as in fp32; and with fp32's keep lists the result is close to the fp32 oracle's."""
    inputs = tiny.inputs(model, judge.ROWS)
    with tokenprune.pruned(model, **cut):
        logits(model, inputs)
        exact = tokenprune.report(model)
    low = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype).eval()
    low.load_state_dict(model.state_dict())
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with tokenprune.pruned(low, **cut):
        out = low.generate(**cast, do_sample=False, max_new_tokens=3)
        report = tokenprune.report(low)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 3
        assert [image.kept for image in report.images] == [image.kept for image in exact.images]
        layers = [{"layer": report.layers_cut[0]}, {"cuts": cut.get("cuts"), "keep": None}][
            len(report.layers_cut) > 1
        ]
        with tokenprune.override(low, keep_lists=exact.keep_lists, **layers):
            got = logits(low, cast)
            index = tokenprune.report(low).index
    assert got.dtype == dtype and index is not None
    wanted = oracle.masked_forward(
        model, inputs, judge.cuts_of(exact), tiny.visual_positions(model, inputs)
    ).logits
    difference = judge.difference_at(index, got.float(), wanted, inputs["attention_mask"])
    assert difference <= {torch.bfloat16: 0.5, torch.float16: 0.06, torch.float32: judge.TOLERANCE}[dtype]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_modes(
    model: Any, cut: dict[str, Any], mode: Callable[[], AbstractContextManager[None]]
) -> None:
    inputs = tiny.inputs(model, judge.ROWS)
    with tokenprune.pruned(model, **cut):
        with torch.no_grad():
            wanted = model.generate(**inputs, **GREEDY)
        with mode():
            got = model.generate(**inputs, **GREEDY)
            assert model(**inputs).logits.requires_grad == (mode is torch.enable_grad)
    assert torch.equal(got.sequences, wanted.sequences)
    assert torch.equal(torch.stack(got.logits), torch.stack(wanted.logits))


# -- training (contract 12) -----------------------------------------------------------------------------------------


def labels_of(inputs: dict[str, Any]) -> torch.Tensor:
    ids = inputs["input_ids"]
    return ids.masked_fill((ids < tiny.FIRST_TEXT_ID) | (inputs["attention_mask"] == 0), -100)


def gathered_loss(
    output: torch.Tensor, labels: torch.Tensor, index: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Cross entropy of each position's next label, counted by hand on the columns that are left."""
    rows = []
    for columns, row, own in zip(index.tolist(), labels.tolist(), output, strict=True):
        own_labels = [row[c] if c >= 0 else -100 for c in columns]
        for position, label in enumerate(own_labels[1:]):
            if label != -100:
                rows.append(F.cross_entropy(own[position].float(), torch.tensor(label)))
    return torch.stack(rows).sum() / options.get("num_items_in_batch", len(rows))


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 7}], ids=["mean", "items"])
def test_training(model: Any, cut: dict[str, Any], pad: str, options: dict[str, Any]) -> None:
    inputs = tiny.inputs(model, judge.ROWS, pad=pad)
    labels = labels_of(inputs)
    model.train()
    with tokenprune.pruned(model, **cut):
        out = model(**inputs, labels=labels, **options)
        report = tokenprune.report(model)
        model.zero_grad()
        out.loss.backward()
        with torch.no_grad():
            loss, *rest = model(**inputs, labels=labels, return_dict=False, **options)
    assert report.index is not None and out.logits.shape[1] == length_after(report)
    wanted = gathered_loss(out.logits, labels, report.index, **options)
    torch.testing.assert_close(out.loss, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rest[0], out.logits)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for part in (
        "lm_head",
        "layers.0.self_attn.q_proj",
        "layers.3.mlp.down_proj",
        "embed_tokens",
        "patch_embed",
    ):
        found = [g for name, g in gradients.items() if part in name]
        assert found and all(bool(g.isfinite().all()) and bool(g.any()) for g in found), part


def test_gradients_are_those_of_the_masked_model() -> None:
    """The oracle's loss on the kept columns has the same gradient for a weight before the cut."""
    model = tiny.llava(layers=4)
    inputs = tiny.inputs(model, judge.ROWS[:1])
    weight = model.model.language_model.layers[0].mlp.down_proj.weight
    with tokenprune.pruned(model, **ENTROPY):
        last = model(**inputs).logits[:, -1].square().sum()
        (got,) = torch.autograd.grad(last, weight)
        report = tokenprune.report(model)
    (layer, lists), step = judge.cuts_of(report)[0], 1e-3
    direction = torch.randn(weight.shape)

    def value() -> torch.Tensor:
        out = oracle.masked_forward(model, inputs, [(layer, lists)], tiny.visual_positions(model, inputs))
        return out.logits[:, -1].double().square().sum()

    with torch.no_grad():
        weight += step * direction
        high = value()
        weight -= 2 * step * direction
        low = value()
    slope = float((high - low) / (2 * step))
    assert slope == pytest.approx(float((got * direction).sum()), rel=0.02)


def gradients(model: Any, inputs: Any) -> tuple[float, dict[str, torch.Tensor]]:
    labels = torch.where(inputs["input_ids"] >= tiny.FIRST_TEXT_ID, inputs["input_ids"], -100)
    model.zero_grad()
    out = model(**inputs, labels=labels, use_cache=False)
    out.loss.backward()
    return float(out.loss), {
        name: own.grad.clone() for name, own in model.named_parameters() if own.grad is not None
    }


@pytest.mark.skipif(not checkpoints_forwards(), reason="this release repeats layers' hooks: refused there")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "smolvlm", "gemma3", "qwen3_5"])
def test_gradients_through_checkpoints_are_those_without(family: str, reentrant: bool) -> None:
    model = tiny.build(family).train()
    inputs = tiny.inputs(model, [["text:4", "image", "text:5"], ["image", "text:6"]])
    layers: Any = find_family(model).layers()
    runs: list[int] = []
    layers[-1].register_forward_hook(lambda *_: None)
    inner = next(m for m in layers[-1].modules() if isinstance(m, torch.nn.Linear))
    inner.register_forward_hook(lambda *_: runs.append(1))
    for settings in ({"method": "vflowopt"}, {"method": "random", "layer": 1}):
        with tokenprune.pruned(model, keep=0.5, **settings):
            loss, wanted = gradients(model, inputs)
            kept = tokenprune.report(model).keep_lists
            runs.clear()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            again, found = gradients(model, inputs)
            model.disable_input_require_grads()
            model.gradient_checkpointing_disable()
            assert len(runs) > 1, "nothing was computed twice"
            assert again == loss and tokenprune.report(model).keep_lists == kept
        assert found.keys() == wanted.keys()
        assert all(torch.allclose(found[name], own, atol=1e-6) for name, own in wanted.items())


def test_gradient_checkpointing_is_refused_before_any_change_where_hooks_would_run_twice(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenprune.releases.checkpoints_forwards", lambda: False)
    inputs = tiny.inputs(model, judge.ROWS[:1])
    model.train()
    (model.gradient_checkpointing_enable if OLD else model.activation_checkpointing_enable)()
    cache = DynamicCache(config=model.config.text_config)
    with tokenprune.pruned(model, **ENTROPY):
        with pytest.raises(
            tokenprune.UnsupportedModeError, match=r"gradient checkpointing.*switch it off, unwrap"
        ):
            model(**inputs, past_key_values=cache)
        assert cache.get_seq_length() == 0
        with torch.no_grad():  # nothing is checkpointed without gradients
            assert model(**inputs).logits.shape[1] < inputs["input_ids"].shape[1]
        with tokenprune.override(model, keep=1.0):  # nor in the way of a call that prunes nothing
            model(**inputs).logits.sum().backward()
        (model.gradient_checkpointing_disable if OLD else model.activation_checkpointing_disable)()
        model(**inputs).logits.sum().backward()


# -- several models, several threads --------------------------------------------------------------------------------


def test_two_wrapped_models() -> None:
    models = [tiny.llava(layers=4, seed=1), tiny.qwen2_5_vl(layers=4, seed=2)]
    inputs = [tiny.inputs(m, judge.ROWS) for m in models]
    arguments = [CUTS["before"], CUTS["two"]]
    alone = []
    for m, x, a in zip(models, inputs, arguments, strict=True):
        with tokenprune.pruned(m, **a):
            alone.append((m.generate(**x, **GREEDY).sequences, tokenprune.report(m).keep_lists))
    with tokenprune.pruned(models[0], **arguments[0]), tokenprune.pruned(models[1], **arguments[1]):
        together = [m.generate(**x, **GREEDY).sequences for m, x in zip(models, inputs, strict=True)]
        for m, ids, (wanted, lists) in zip(models, together, alone, strict=True):
            assert torch.equal(ids, wanted) and tokenprune.report(m).keep_lists == lists


def run_together(
    calls: list[Callable[[], torch.Tensor]], layers: list[torch.nn.Module]
) -> list[torch.Tensor]:
    """Run each call in a thread of its own; at each of `layers` every thread waits for all the others."""
    barrier = threading.Barrier(len(calls), timeout=60)
    results: list[Any] = [None] * len(calls)

    def run(i: int) -> None:
        try:
            results[i] = calls[i]()
        except BaseException as error:
            results[i] = error
            barrier.abort()

    handles = [layer.register_forward_pre_hook(lambda *_: (barrier.wait(), None)[1]) for layer in layers]
    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for handle in handles:
            handle.remove()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize("one_model", [True, False], ids=["one_model", "two_models"])
def test_threads(cut: dict[str, Any], one_model: bool) -> None:
    """Contract 3: both threads are inside the same layers at the same time, in prefill and in every step."""
    first = tiny.llava(layers=4)
    models = [first, first if one_model else tiny.llava(layers=4, seed=1)]
    inputs = [
        tiny.inputs(models[0], judge.ROWS[:1], seed=1),
        tiny.inputs(models[1], [["text:9", "image", "text:2"], ["text:4"]], seed=2),
    ]
    for m in models[: 1 if one_model else 2]:
        tokenprune.wrap(m, **cut)

    def call(i: int) -> torch.Tensor:
        out = models[i].generate(**inputs[i], **GREEDY)
        return torch.stack(out.logits)

    serial = [call(i) for i in range(2)]
    layers = [m.model.language_model.layers[k] for m in models[: 1 if one_model else 2] for k in (0, 2, 3)]
    # of two models each thread meets only its own layers: let them meet in the first of each
    if one_model:
        together = run_together([lambda i=i: call(i) for i in range(2)], layers)
    else:
        together = run_together([lambda i=i: call(i) for i in range(2)], [m.lm_head for m in models])
    for a, b in zip(together, serial, strict=True):
        assert torch.equal(a, b)


# -- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: torch.save(m, io.BytesIO())],
    ids=["deepcopy", "pickle", "torch_save"],
)
def test_copies_are_refused_until_unwrapped(model: Any, copied: Callable[[Any], Any]) -> None:
    with tokenprune.pruned(model, **ENTROPY):
        with pytest.raises(tokenprune.TokenPruneError, match=r"copied or pickled; tokenprune\.unwrap"):
            copied(model)
    again = copied(model)  # before any forward: stock models cannot be pickled after their first
    inputs = tiny.inputs(model, judge.ROWS[:1])
    if again is not None:
        assert not tokenprune.is_wrapped(again)
        assert torch.equal(logits(again, inputs), logits(model, inputs))
    with tokenprune.pruned(model, **ENTROPY):
        pruned = logits(model, inputs)
        with pytest.raises(tokenprune.TokenPruneError, match="copied or pickled"):
            copied(model)
        assert torch.equal(logits(model, inputs), pruned)


# -- failures (contract 13) -----------------------------------------------------------------------------------------

FAILURES = {
    "runtime": RuntimeError("boom"),
    "memory": torch.OutOfMemoryError("boom"),
    "interrupt": KeyboardInterrupt("boom"),
}
PLACES = {
    "before_cut": "layers.1",
    "at_cut": "layers.2",
    "after_cut": "layers.3",
    "projection": "layers.1.self_attn.k_proj",
    "tower": "tower",
    "head": "lm_head",
}


def place(model: Any, name: str) -> torch.nn.Module:
    if name == "tower":
        return model.model.vision_tower if hasattr(model.model, "vision_tower") else model.model.visual
    return model.lm_head if name == "lm_head" else model.model.language_model.get_submodule(name)


def fail(model: Any, where: str, error: BaseException, call: Callable[[], Any], after: bool) -> None:
    """Have a user's hook raise while `call` runs, before or after the module's own forward."""

    def boom(*_: Any) -> None:
        raise error

    module = place(model, where)
    handle = module.register_forward_hook(boom) if after else module.register_forward_pre_hook(boom)
    try:
        with pytest.raises(type(error), match="boom"):
            call()
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("error", "after"),
    [("runtime", False), ("memory", True), ("interrupt", False), ("interrupt", True)],
)
@pytest.mark.parametrize("where", PLACES.values(), ids=list(PLACES))
def test_a_failed_forward_leaves_a_working_model(where: str, error: str, after: bool) -> None:
    model = tiny.llava(layers=4)
    inputs, other = tiny.inputs(model, judge.ROWS), tiny.inputs(model, judge.ROWS[:1], seed=3)
    with tokenprune.pruned(model, **ENTROPY), torch.no_grad():
        wanted = model(**inputs).logits
        generated = model.generate(**inputs, **GREEDY).sequences
        inner = model.model(**inputs).last_hidden_state
        text = model.model(**tiny.inputs(model, [["text:5"]])).last_hidden_state
        model(**inputs)
        report = tokenprune.report(model).to_dict()
        # every way of going on, each right after a failure
        for again, expected in (
            (lambda: model(**inputs).logits, wanted),
            (lambda: model.generate(**inputs, **GREEDY).sequences, generated),
            (lambda: model.model(**inputs).last_hidden_state, inner),
            (lambda: model.model(**tiny.inputs(model, [["text:5"]])).last_hidden_state, text),
        ):
            model(**inputs)
            fail(model, where, FAILURES[error], lambda: model(**other), after)
            after_failure = tokenprune.report(model).to_dict()
            for name in ("images", "layers", "length", "pruned"):
                assert after_failure[name] == report[name]
            assert torch.equal(again(), expected)


@pytest.mark.parametrize("error", FAILURES.values(), ids=list(FAILURES))
def test_a_failure_while_decoding(model: Any, error: BaseException) -> None:
    inputs = tiny.inputs(model, judge.ROWS)
    with tokenprune.pruned(model, **ENTROPY), torch.no_grad():
        wanted = model.generate(**inputs, **GREEDY).sequences
        calls = 0

        def boom(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise error

        handle = place(model, "layers.3").register_forward_pre_hook(boom)
        with pytest.raises(type(error)):
            model.generate(**inputs, **GREEDY)
        handle.remove()
        assert torch.equal(model.generate(**inputs, **GREEDY).sequences, wanted)


def test_the_text_model_alone_after_an_interrupt() -> None:
    """What an interrupted call left behind must not reach a call that knows nothing of it."""
    model = tiny.llava(layers=4)
    inputs = tiny.inputs(model, judge.ROWS)
    text = model.model.language_model
    embeds = model.get_input_embeddings()(torch.full((4, inputs["input_ids"].shape[1]), tiny.FIRST_TEXT_ID))
    with torch.no_grad():
        wanted = text(inputs_embeds=embeds).last_hidden_state
        with tokenprune.pruned(model, **ENTROPY):
            fail(model, "layers.3", KeyboardInterrupt("boom"), lambda: model(**inputs), after=False)
            assert torch.equal(text(inputs_embeds=embeds).last_hidden_state, wanted)


# -- accelerate -----------------------------------------------------------------------------------------------------


def offload(how: str, model: Any, folder: Path) -> Any:
    if how == "cpu":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "disk":
        return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    device_map = {
        **{f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "language_model"},
        "model.language_model": "disk",
        "lm_head": "disk",
    }
    return accelerate.dispatch_model(
        model, device_map=device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


@pytest.mark.parametrize("wrap_first", [False, True], ids=["offload_first", "wrap_first"])
@pytest.mark.parametrize(("how", "name"), [("cpu", "before"), ("disk", "layer2"), ("dispatch", "two")])
def test_offload(how: str, wrap_first: bool, name: str, tmp_path: Path) -> None:
    cut = CUTS[name]
    model = tiny.llava(layers=4)
    inputs = tiny.inputs(model, judge.ROWS)
    plain = logits(model, inputs)
    with tokenprune.pruned(model, **cut):
        wanted = model.generate(**inputs, **GREEDY)
        lists = tokenprune.report(model).keep_lists
    if wrap_first:
        tokenprune.wrap(model, **cut)
    model = offload(how, model, tmp_path)
    if not wrap_first:
        tokenprune.wrap(model, **cut)
    assert place(model, "layers.3.mlp.down_proj").weight.device.type == "meta"  # it is offloaded indeed
    got = model.generate(**inputs, **GREEDY)
    assert tokenprune.report(model).keep_lists == lists
    assert torch.equal(torch.stack(got.logits), torch.stack(wanted.logits))
    tokenprune.unwrap(model)
    assert torch.equal(logits(model, inputs), plain)


# -- ways of calling ------------------------------------------------------------------------------------------------


def test_inner_model_called_directly(model: Any, cut: dict[str, Any]) -> None:
    inputs = tiny.inputs(model, judge.ROWS)
    with tokenprune.pruned(model, **cut), torch.no_grad():
        wanted = model(**inputs, use_cache=True)
        whole = tokenprune.report(model)
        inner = model.model(**inputs, use_cache=True)
        report = tokenprune.report(model)
        assert torch.equal(model.lm_head(inner.last_hidden_state), wanted.logits)
        assert report.keep_lists == whole.keep_lists and report.layers == whole.layers
        # and the cache goes on in the outer model
        mask = F.pad(inputs["attention_mask"], (0, 1), value=1)
        step = {"input_ids": torch.full((4, 1), tiny.FIRST_TEXT_ID), "attention_mask": mask}
        step["position_ids"] = mask.sum(1, keepdim=True) - 1
        if getattr(model.model, "rope_deltas", None) is not None:
            step["position_ids"] = (step["position_ids"] + model.model.rope_deltas).expand(3, -1, -1)
        one = model(**step, past_key_values=wanted.past_key_values).logits
        two = model(**step, past_key_values=inner.past_key_values).logits
    assert torch.equal(one, two)


def test_positional_arguments(cut: dict[str, Any]) -> None:
    model = tiny.llava(layers=4)
    inputs = tiny.inputs(model, judge.ROWS)
    with tokenprune.pruned(model, **cut), torch.no_grad():
        wanted = model(**inputs).logits
        order = (inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
        assert torch.equal(model(*order).logits, wanted)
        assert torch.equal(model.lm_head(model.model(*order)[0]), wanted)
        assert torch.equal(model(*order, return_dict=False)[0], wanted)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hidden_states_and_attentions(cut: dict[str, Any], attention: str) -> None:
    """Entry i is layer i - 1's output, hence as long as that layer; entry 0 is what layer 0 receives."""
    model = tiny.llava(layers=4, attn_implementation=attention)
    inputs = tiny.inputs(model, judge.ROWS[:1])
    options: dict[str, Any] = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    with tokenprune.pruned(model, **cut):
        with torch.no_grad():
            out = model(**inputs, **options)
        report = tokenprune.report(model)
    lengths = [layer.length for layer in report.layers]
    assert len(out.hidden_states) == 5
    assert [h.shape[1] for h in out.hidden_states] == [lengths[0], *lengths]
    if attention == "eager":
        assert [a.shape[-2:] for a in out.attentions] == [(n, n) for n in lengths]
    positions = tiny.visual_positions(model, inputs)
    wanted = oracle.masked_forward(model, inputs, judge.cuts_of(report), positions, output_hidden=True).hidden
    assert report.index is not None
    if report.layers_cut[0] > 0:
        first = report.layers_cut[0]
        torch.testing.assert_close(out.hidden_states[first], wanted[first], atol=judge.TOLERANCE, rtol=0)
    last = wanted[3].gather(1, report.index[..., None].expand(-1, -1, wanted[3].shape[-1]))
    if report.layers_cut[-1] < 3:  # else what enters layer 3 is not cut yet
        torch.testing.assert_close(out.hidden_states[3], last, atol=judge.TOLERANCE, rtol=0)


def test_hidden_states_of_a_model_that_adds_features_between_its_layers() -> None:
    """What is captured does not depend on when transformers put in its own hooks: before `wrap` or after it."""
    found = []
    for asked_before in (True, False):
        model = tiny.qwen3_vl(layers=4)
        inputs = tiny.inputs(model, judge.ROWS[:1])
        if asked_before:
            logits(model, inputs, output_hidden_states=True)
        with tokenprune.pruned(model, "random", layer=1, keep=0.6), torch.no_grad():
            out = model(**inputs, output_hidden_states=True)
        assert layers_with_features(model) > 1
        found.append([out.logits, *out.hidden_states])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def layers_with_features(model: Any) -> int:
    """Layers after which features are added."""
    return len(model.config.vision_config.deepstack_visual_indexes)


def test_index_maps_logits_to_columns(model: Any, cut: dict[str, Any]) -> None:
    """Contract 12: right-aligned, -1 for filler, text after the last image unmoved from the right."""
    for pad in ("left", "right"):
        inputs = tiny.inputs(model, judge.ROWS, pad=pad)
        with tokenprune.pruned(model, **cut):
            out = logits(model, inputs)
            report = tokenprune.report(model)
        index, length = report.index, inputs["input_ids"].shape[1]
        assert index is not None and index.shape == out.shape[:2]
        # padding on the right counts as "after the last image": it stays, and ROWS[1] is nothing else
        assert out.shape[1] < length if pad == "left" else out.shape[1] <= length
        for r, images in enumerate(tiny.visual_positions(model, inputs)):
            columns = index[r][index[r] >= 0].tolist()
            filler = index.shape[1] - len(columns)
            assert (index[r, :filler] == -1).all() and columns == sorted(set(columns))
            gone = set(range(length)) - set(columns)
            lists = report.keep_lists[-1][r]
            dropped = {
                int(c)
                for image, kept in zip(images, lists, strict=True)
                for i, c in enumerate(image)
                if i not in kept
            }
            padding = set((inputs["attention_mask"][r] == 0).nonzero().flatten().tolist())
            assert dropped <= gone <= dropped | padding
            start = int(images[-1][-1]) + 1 if images else 0
            tail = [c for c in range(start, length) if c in columns]
            assert index[r, index.shape[1] - len(tail) :].tolist() == tail
    assert bool((index == -1).any())  # rows differ: there was filler to see


def masks_4d(inputs: dict[str, Any], kind: str) -> torch.Tensor:
    length = inputs["input_ids"].shape[1]
    sees = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    sees = sees & inputs["attention_mask"].bool()[:, None, None, :]
    sees |= torch.eye(length, dtype=torch.bool)
    if kind == "bool":
        return sees
    return torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_masks_of_the_users_own(cut: dict[str, Any], kind: str, pad: str) -> None:
    model = tiny.llava(layers=4)
    inputs = tiny.inputs(model, judge.ROWS, pad=pad)
    with tokenprune.pruned(model, **cut):
        got = logits(model, {**inputs, "attention_mask": masks_4d(inputs, kind)})
        report = tokenprune.report(model)
    wanted = oracle.masked_forward(
        model, inputs, judge.cuts_of(report), tiny.visual_positions(model, inputs)
    ).logits
    assert report.index is not None
    assert judge.difference_at(report.index, got, wanted, inputs["attention_mask"]) <= judge.TOLERANCE


def test_a_mask_that_is_not_causal() -> None:
    """The structure of a user's mask survives the cut: here text before the image cannot be seen after it."""
    model = tiny.llava(layers=4)
    inputs = tiny.inputs(model, [["text:5", "image", "text:4"]])
    length = inputs["input_ids"].shape[1]
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    sees[10:, :5] = False
    with tokenprune.pruned(model, **ENTROPY):
        got = logits(model, {**inputs, "attention_mask": sees[None, None]})
        report = tokenprune.report(model)
    wanted = oracle.masked_forward(
        model,
        inputs,
        judge.cuts_of(report),
        tiny.visual_positions(model, inputs),
        base_mask=lambda _: sees[None],
    ).logits
    assert report.index is not None
    assert judge.difference_at(report.index, got, wanted, None) <= judge.TOLERANCE


def test_no_mask_and_own_positions(model: Any, cut: dict[str, Any]) -> None:
    inputs = tiny.inputs(model, judge.ROWS[:1])
    full = dict(inputs)
    mask = inputs.pop("attention_mask")
    with tokenprune.pruned(model, **cut):
        without = logits(model, inputs)
        assert torch.allclose(without, logits(model, full), atol=1e-5)
        positions = mask.cumsum(1) * 2 + 3  # any will do, as long as both sides use them
        if model.config.model_type == "qwen2_5_vl":
            positions = torch.stack([positions, positions + 1, positions * 2])
        own = logits(model, {**full, "position_ids": positions})
        report = tokenprune.report(model)
    assert not torch.allclose(own, without, atol=1e-2)
    wanted = oracle.masked_forward(
        model, {**full, "position_ids": positions}, judge.cuts_of(report), tiny.visual_positions(model, full)
    ).logits
    assert report.index is not None
    assert judge.difference_at(report.index, own, wanted, None) <= judge.TOLERANCE


def test_logits_to_keep_names_columns(model: Any) -> None:
    inputs = tiny.inputs(model, judge.ROWS[:1])
    length = inputs["input_ids"].shape[1]
    asked = torch.tensor([length - 3, length - 1])
    with tokenprune.pruned(model, **ENTROPY):
        whole = logits(model, inputs)
        part = logits(model, inputs, logits_to_keep=asked)
        assert torch.allclose(part, whole[:, [-3, -1]], atol=1e-6)
        with pytest.raises(tokenprune.UnsupportedModeError, match="after the last image"):
            logits(model, inputs, logits_to_keep=torch.tensor([2]))
        assert torch.equal(logits(model, inputs), whole)


# -- caches that live on --------------------------------------------------------------------------------------------


def continued(
    model: Any, inputs: dict[str, Any], cache: Any, batch: int, **extra: Any
) -> tuple[Any, dict[str, Any]]:
    """A question of four tokens on a prefix cache, and the whole history as the oracle wants it."""
    question = torch.randint(
        tiny.FIRST_TEXT_ID, tiny.VOCAB, (batch, 4), generator=torch.Generator().manual_seed(5)
    )
    expanded = {
        k: v.repeat_interleave(batch, 0) if batch > 1 and k != "pixel_values" else v
        for k, v in inputs.items()
    }
    if batch > 1:
        expanded["pixel_values"] = inputs["pixel_values"].repeat(
            batch, 1, 1, 1
        )  # all of a row's images, row by row
    mask = F.pad(expanded["attention_mask"], (0, 4), value=1)
    positions = mask.cumsum(1) - 1
    call = {"input_ids": question, "attention_mask": mask, "position_ids": positions[:, -4:], **extra}
    with torch.no_grad():
        out = model(**call, past_key_values=cache)
    history = {
        **expanded,
        "input_ids": torch.cat([expanded["input_ids"], question], 1),
        "attention_mask": mask,
        "position_ids": positions,
    }
    return out.logits, history


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["layer2", "two"])
def test_prefix_cache(name: str, batch: int) -> None:
    """Contract 3: one prefix, several questions on deep copies of its cache, expanded to a batch if need be."""
    model = tiny.llava(layers=4)
    inputs = tiny.inputs(model, judge.ROWS[:1])
    with tokenprune.pruned(model, **CUTS[name]), torch.no_grad():
        prefix = model(**inputs, use_cache=True).past_key_values
        report = tokenprune.report(model)
        answers = []
        for _ in range(2):
            cache = copy.deepcopy(prefix)
            if batch > 1:
                cache.batch_repeat_interleave(batch)
            answers.append(continued(model, inputs, cache, batch))
    (first, history), (second, _) = answers
    assert torch.equal(first, second)
    cuts = [(layer, oracle.expand_rows(lists, batch)) for layer, lists in judge.cuts_of(report)]
    wanted = oracle.masked_forward(model, history, cuts, tiny.visual_positions(model, history)).logits
    assert float((first - wanted[:, -4:]).abs().max()) <= judge.TOLERANCE


# Two texts of different lengths, nothing but padding where the last picture of the batch ends.
TEXTS = (["text:5"], ["text:2"], ["text:3", "image", "text:6"], ["image", "text:4", "image", "text:6"])
MOVES: dict[str, tuple[Callable[[Any], None], list[int]]] = {
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([3, 1, 0])), [3, 1, 0]),
    "twice": (lambda cache: cache.batch_select_indices(torch.tensor([2, 2])), [2, 2]),
    "one": (lambda cache: cache.batch_select_indices(torch.tensor([2])), [2]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0, 3, 2])), [1, 0, 3, 2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
    "by layer": (
        lambda cache: [layer.reorder_cache(torch.tensor([3, 2, 1, 0])) for layer in cache.layers],
        [3, 2, 1, 0],
    ),
    "nothing": (lambda cache: None, [0, 1, 2, 3]),
}


@pytest.mark.parametrize("name", ["layer2", "two"])
@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("rows", [judge.ROWS, TEXTS], ids=["ragged", "texts"])
@pytest.mark.parametrize("move", MOVES)
def test_rows_of_a_cache_that_are_moved_take_their_record_with_them(
    move: str, rows: Any, pad: str, name: str
) -> None:
    """Contract 3: as if each row had been a prompt of its own."""
    do, source = MOVES[move]
    model = tiny.llava(layers=4)
    inputs = tiny.inputs(model, rows, pad=pad)
    after = torch.randint(tiny.FIRST_TEXT_ID, tiny.VOCAB, (8, 3), generator=torch.Generator().manual_seed(3))
    after = after[: len(source)]
    mask = F.pad(inputs["attention_mask"][source], (0, 3), value=1)
    position = mask.cumsum(1)[:, -3:] - 1
    steps = []
    with tokenprune.pruned(model, **CUTS[name]), torch.no_grad():
        own = inputs["attention_mask"].cumsum(1) - 1
        cache = model(**inputs, position_ids=own, use_cache=True).past_key_values
        report = tokenprune.report(model)
        do(cache)
        for i in range(3):
            if i == 2:
                cache = copy.deepcopy(cache)
            call = {
                "input_ids": after[:, i : i + 1],
                "position_ids": position[:, i : i + 1],
                "attention_mask": mask[:, : mask.shape[1] - 2 + i],
            }
            steps.append(model(**call, past_key_values=cache).logits[:, 0])
    cuts, positions = judge.cuts_of(report), tiny.visual_positions(model, inputs)
    ids, whole = inputs["input_ids"], F.pad(inputs["attention_mask"], (0, 3), value=1)
    pixels = inputs["pixel_values"].split([len(row) for row in positions])
    for row, r in enumerate(source):
        history = {
            "input_ids": torch.cat([ids[r : r + 1], after[row : row + 1]], 1),
            "attention_mask": whole[r : r + 1],
            "position_ids": whole[r : r + 1].cumsum(1) - 1,
        }
        if len(pixels[r]):
            history["pixel_values"] = pixels[r]
        lists = [(layer, kept[r : r + 1]) for layer, kept in cuts]
        wanted = oracle.masked_forward(model, history, lists, positions[r : r + 1]).logits[0, -3:]
        for step, logit in zip(steps, wanted, strict=True):
            assert float((step[row] - logit).abs().max()) <= judge.TOLERANCE


def test_rows_of_which_only_padding_is_left_are_no_guess() -> None:
    """Two texts beside pictures, cropped to where the last picture ends: nothing tells them apart any more."""
    model = tiny.llava(layers=4)
    inputs = tiny.inputs(model, TEXTS, pad="left")
    columns = max(int(image[-1]) for row in tiny.visual_positions(model, inputs) for image in row) + 1
    assert not inputs["attention_mask"][:2, :columns].any()
    gone = inputs["input_ids"].shape[1] - columns
    with tokenprune.pruned(model, **ENTROPY), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        for layer in cache.layers:
            layer.crop(-gone)
        cache.reorder_cache(torch.tensor([1, 0, 2, 3]))
        mask = F.pad(inputs["attention_mask"][[1, 0, 2, 3], :columns], (0, 1), value=1)
        step = {"input_ids": torch.full((4, 1), tiny.FIRST_TEXT_ID), "attention_mask": mask}
        with pytest.raises(tokenprune.UnsupportedModeError, match="cannot be told apart"):
            model(**step, position_ids=mask.cumsum(1)[:, -1:] - 1, past_key_values=cache)


def test_a_cache_of_other_prompts_is_refused() -> None:
    """Its record was put on it, but its rows are others."""
    model = tiny.llava(layers=4)
    step = {"input_ids": torch.full((2, 1), tiny.FIRST_TEXT_ID)}
    with tokenprune.pruned(model, **ENTROPY), torch.no_grad():
        cache, other = (
            model(**tiny.inputs(model, judge.ROWS[2:], seed=seed), use_cache=True).past_key_values
            for seed in (0, 1)
        )
        cache.layers = other.layers
        with pytest.raises(tokenprune.UnsupportedModeError, match="other rows than the pruned prompts"):
            model(**step, past_key_values=cache)


def test_a_cache_of_another_batch_is_refused() -> None:
    model = tiny.llava(layers=4)
    inputs = tiny.inputs(model, judge.ROWS[2:])
    with tokenprune.pruned(model, **ENTROPY), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(
            tokenprune.UnsupportedModeError, match="batch 2 and is used with batch 4; repeat or select"
        ):
            model(input_ids=torch.full((4, 1), tiny.FIRST_TEXT_ID), past_key_values=cache)


def test_a_step_that_failed_is_named_when_its_cache_is_used_again() -> None:
    model = tiny.llava(layers=4)
    inputs = tiny.inputs(model, judge.ROWS[:1])
    step = {"input_ids": torch.full((1, 1), tiny.FIRST_TEXT_ID)}

    def fail(*_: Any) -> None:
        raise MemoryError("no memory for this")

    with tokenprune.pruned(model, **ENTROPY), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        before = copy.deepcopy(cache)
        handle = model.model.language_model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            model(**step, past_key_values=cache)
        handle.remove()
        with pytest.raises(tokenprune.UnsupportedModeError, match="failed half way"):
            model(**step, past_key_values=cache)
        model(**step, past_key_values=before)


def test_cropping(model: Any) -> None:
    """Back to the end of the prompt is fine; into its images is refused."""
    inputs = tiny.inputs(model, judge.ROWS[:1])
    mask = F.pad(inputs["attention_mask"], (0, 1), value=1)
    step = {"input_ids": torch.full((1, 1), tiny.FIRST_TEXT_ID), "attention_mask": mask}
    length = inputs["input_ids"].shape[1]
    if model.config.model_type == "qwen2_5_vl":
        step["position_ids"] = torch.full((3, 1, 1), 30)
    with tokenprune.pruned(model, **ENTROPY), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        wanted = model(**step, past_key_values=cache).logits
        cache.crop(length if OLD else -1)
        assert torch.equal(model(**step, past_key_values=cache).logits, wanted)
        gone = length - int(tiny.visual_positions(model, inputs)[0][-1].max())
        cache.crop(length - gone if OLD else -1 - gone)
        with pytest.raises(tokenprune.UnsupportedModeError, match="cropped into a pruned prompt"):
            model(**step, past_key_values=cache)


@pytest.mark.parametrize("rows", [[["text:6"]], [["text:6"], ["text:3"]]], ids=["batch1", "batch2"])
@pytest.mark.parametrize("name", ["layer2", "two"])
def test_text_first_and_an_image_in_the_second_turn(name: str, rows: list[list[str]]) -> None:
    model = tiny.llava(layers=4)
    one = tiny.inputs(model, rows)
    two = tiny.inputs(model, [["text:2", "image", "text:5"], ["image", "text:3"]][: len(rows)], seed=1)
    mask = torch.cat([one["attention_mask"], two["attention_mask"]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    length = one["input_ids"].shape[1]
    with tokenprune.pruned(model, **CUTS[name]), torch.no_grad():
        cache = model(**one, position_ids=positions[:, :length], use_cache=True).past_key_values
        assert not tokenprune.report(model).pruned
        call = {**two, "attention_mask": mask, "position_ids": positions[:, length:]}
        got = model(**call, past_key_values=cache).logits
        report = tokenprune.report(model)
        ids, steps = [], []
        last = got[:, -1]
        for i in range(3):
            steps.append(last)
            ids.append(last.argmax(-1, keepdim=True))
            mask_now = F.pad(mask, (0, i + 1), value=1)
            now = positions[:, -1:] + i + 1
            last = model(
                input_ids=ids[-1], attention_mask=mask_now, position_ids=now, past_key_values=cache
            ).logits[:, -1]
    history = {
        "input_ids": torch.cat([one["input_ids"], two["input_ids"]], 1),
        "attention_mask": mask,
        "position_ids": positions,
        "pixel_values": two["pixel_values"],
    }
    judged = oracle.masked_forward(
        model,
        history,
        judge.cuts_of(report),
        tiny.visual_positions(model, history),
        generated=torch.cat(ids, 1),
    )
    assert report.pruned and report.index is not None
    prompt = judged.logits[:, length : mask.shape[1]]
    assert judge.difference_at(report.index, got, prompt, two["attention_mask"]) <= judge.TOLERANCE
    assert float((torch.stack(steps, 1) - judged.steps()).abs().max()) <= judge.TOLERANCE


@pytest.mark.parametrize("batch", [1, 4])
def test_a_copied_cache_of_windows_goes_on(batch: int) -> None:
    """Nothing of the prompt may be left in it by which rows could be told apart; in a copy they stand as they stood."""
    model = tiny.llava("mistral", sliding_window=12, layers=4)
    inputs = tiny.inputs(model, judge.ROWS[:batch], pad="left")
    mask = F.pad(inputs["attention_mask"], (0, 1), value=1)
    step = {"input_ids": torch.full((batch, 1), 40), "attention_mask": mask}
    step["position_ids"] = mask.cumsum(1)[:, -1:] - 1
    own = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with tokenprune.pruned(model, "random", layer=1, keep=0.6), torch.no_grad():
        cache = model(**inputs, position_ids=own, use_cache=True).past_key_values
        copied, moved = copy.deepcopy(cache), copy.deepcopy(cache)
        wanted = model(**step, past_key_values=cache).logits
        assert torch.equal(model(**step, past_key_values=copied).logits, wanted)
        if batch > 1:
            moved.reorder_cache(torch.tensor([1, 0, 2, 3]))
            with pytest.raises(tokenprune.UnsupportedModeError, match="rows of this cache were moved"):
                model(**step, past_key_values=moved)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_autocast(family: str) -> None:
    """Scores and merges are computed in the dtypes that they are written in; the model runs as the caller asks."""
    model = tiny.build(family, layers=6)
    rows = [["image", "text:4"], ["image", "text:4"]] if family == "paligemma" else judge.ROWS
    inputs = tiny.inputs(model, rows, pad="left")
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            model(**inputs)
    except RuntimeError as error:
        pytest.skip(f"stock of this version cannot: {error}"[:90])
    for arguments in (
        {"method": "vflowopt", "keep": 0.5},
        {"method": "vflowopt", "keep": 0.5, "recycling": "cells", "t": 1.0, "alpha": 0.5},
        {"method": "entropyprune", "layer": 2, "keep": 0.6},
        {"method": "fastv", "layer": 2, "keep": 0.6},
    ):
        if family == "kimi_k25" and arguments["method"] != "vflowopt":
            continue  # the states of latent attention are not offered
        with tokenprune.pruned(model, **arguments), torch.no_grad():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(**inputs).logits
            assert logits.isfinite().all() and tokenprune.report(model).pruned
