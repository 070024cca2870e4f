"""Contract 17: what the report says, against the tensors it speaks of."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from functools import partial
from typing import Any

import pytest
import torch

import judge
import tiny
import tokenprune


def test_report_of_a_ragged_batch() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, judge.ROWS, pad="left")
    with tokenprune.pruned(model, "entropyprune", cuts=[(1, 0.6), (3, 0.2)]), torch.no_grad():
        cache = model(**inputs).past_key_values
        report = tokenprune.report(model)
    assert [(i.row, i.image) for i in report.images] == [(0, 0), (0, 1), (2, 0), (2, 1), (3, 0)]
    for image in report.images:
        assert image.grids == ((1, 5, 5),) and image.structural == 0
        assert (image.tokens, image.kept) == (25, (15, 5))
        assert image.average == (25 + 2 * 15 + 3 * 5) / 6
    assert report.tokens == 125
    assert report.kept == 25
    assert report.retention_average == pytest.approx(70 / 6 / 25)
    assert report.retention_after_cut == 0.2
    # The longest kept row: 12 text tokens and two images.
    assert [layer.length for layer in report.layers] == [62, 12 + 30, 42, 12 + 10, 22, 22]
    assert report.kv_used == sum(2 * layer.keys.numel() * 4 for layer in cache.layers)
    assert report.index is not None
    assert report.index.shape == (4, 22)
    assert report.flops < report.flops_unpruned
    assert report.seconds_scoring > 0
    assert report.seconds_compacting > 0
    for row, lists in zip(tiny.visual_positions(model, inputs), report.keep_lists[-1], strict=True):
        assert len(row) == len(lists)
        for kept in lists:
            assert kept == sorted(set(kept))
            assert len(kept) == 5


def test_json_and_text() -> None:
    model = tiny.qwen2_5_vl()
    with tokenprune.pruned(model, "entropyprune", layer=2, keep=0.5, normalization="trace"), torch.no_grad():
        model(**tiny.inputs(model, judge.ROWS, pad="right"))
        report = tokenprune.report(model)
    told = json.loads(report.to_json())
    assert told["method"] == "entropyprune"
    assert told["parameters"]["normalization"] == "trace"
    assert told["layers_cut"] == [2]
    assert sum(i["kept"][-1] for i in told["images"]) == report.kept
    assert math.isclose(told["retention_average"], report.retention_average)
    text = str(report)
    assert "before layer 2 (given)" in text
    assert f"{report.retention_average:.1%}" in text
    assert "NOTHING" not in text


def test_text_only_prompt() -> None:
    model = tiny.llava()
    with tokenprune.pruned(model, "random", layer=2, keep=0.5), torch.no_grad():
        model(**tiny.inputs(model, (["text:5"], ["text:3"])))
        report = tokenprune.report(model)
    assert not report.pruned
    assert report.images == ()
    assert report.retention_average == 1.0
    assert "no visual tokens" in str(report)


def test_nothing_pruned_is_said() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, judge.ROWS[:1])
    with tokenprune.pruned(model, "none"), torch.no_grad():
        model(**inputs)
        assert "NOTHING WAS PRUNED" in str(tokenprune.report(model))


def test_decode_steps_do_not_overwrite_the_prompts_report() -> None:
    model = tiny.llava()
    with tokenprune.pruned(model, "random", layer=2, keep=0.5):
        model.generate(**tiny.inputs(model, judge.ROWS, pad="left"), max_new_tokens=4, do_sample=False)
        assert tokenprune.report(model).tokens == 125


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_negative_prompt_does_not_overwrite_the_prompts_report(tokens: int) -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, [["text:3", "image", "text:8"]])
    negative = torch.arange(10, 17)[None]
    with tokenprune.pruned(model, "uniform", keep=0.5, layer=2):
        model.generate(**inputs, guidance_scale=1.5, negative_prompt_ids=negative, max_new_tokens=tokens)
        report, total = tokenprune.report(model), tokenprune.report(model, total=True)
    assert report.pruned and len(report.images) == 1 and total.prompts == 1


def test_a_report_is_of_the_threads_that_a_task_waited_for() -> None:
    """Prompts of asyncio.to_thread count as the task's; those of other tasks and threads do not."""
    model = tiny.llava()
    one, two, three = (tiny.inputs(model, [["text:3", *["image", "text:2"] * count]]) for count in (1, 2, 3))
    call = partial(model.generate, max_new_tokens=1)

    def images() -> int:
        return len(tokenprune.report(model).images)

    async def serve(first: Any, second: Any) -> tuple[int, int]:
        call(**first)
        direct = images()
        await asyncio.to_thread(lambda: call(**second))
        return direct, images()

    async def both() -> Any:
        await asyncio.to_thread(lambda: call(**three))
        return images(), await asyncio.gather(serve(one, two), serve(two, one))

    with tokenprune.pruned(model, "uniform", keep=0.5, layer=2):
        call(**two)
        assert asyncio.run(both()) == (3, [(1, 2), (2, 1)])
        assert images() == 2
        thread = threading.Thread(target=lambda: call(**three))
        thread.start()
        thread.join()
        assert images() == 2


def test_guidance_does_not_overwrite_the_prompts_report() -> None:
    model = tiny.llava()
    with tokenprune.pruned(model, "random", layer=2, keep=0.5):
        inputs = tiny.inputs(model, judge.ROWS[:1])
        model.generate(**inputs, max_new_tokens=3, do_sample=False, guidance_scale=1.5)
        assert tokenprune.report(model).tokens == 50 and tokenprune.report(model).pruned


class _Quantised(torch.Tensor):
    """As torchao's and quanto's: a subclass made of plain tensors."""

    @staticmethod
    def __new__(cls: Any, data: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self.data_, self.scale_ = data, scale

    def __tensor_flatten__(self) -> Any:
        return ["data_", "scale_"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].data_, args[0].scale_)
        raise NotImplementedError(func)


def test_bytes_of_a_quantised_cache() -> None:
    from transformers import DynamicCache

    from tokenprune.runtime.outcome import kv_bytes

    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), 0)
    plain = 2 * 2 * 5 * 8 * 4
    assert kv_bytes(cache, [5]) == ([plain], [plain])
    data, scale = torch.zeros(1, 2, 100, 8, dtype=torch.int8), torch.zeros(1, 2, 100, 1)
    layer: Any = cache.layers[0]
    layer._quantized_keys = _Quantised(data, scale)
    layer._quantized_values = (data.clone(), {"scale": scale.clone(), "group": 64})
    assert kv_bytes(cache, [105])[0] == [plain + 2 * (1600 + 800)]


def test_fingerprint_of_quantised_parameters() -> None:
    from tokenprune.fingerprint import fingerprint

    model = tiny.llava()
    projection = model.model.language_model.layers[0].self_attn.q_proj
    found = set()
    for value in (0, 1):
        data = torch.full(tuple(projection.weight.shape), value, dtype=torch.int8)
        projection.weight = torch.nn.Parameter(_Quantised(data, torch.ones(4)), requires_grad=False)
        found.add(fingerprint(model))
    assert len(found) == 2


@pytest.mark.parametrize("allocation", ["image", "pooled"])
def test_totals_sum_up_until_reset(allocation: str) -> None:
    model = tiny.llava(layers=6)
    with tokenprune.pruned(model, "random", layer=2, keep=0.5, allocation=allocation), torch.no_grad():
        assert "no prompts yet" in str(tokenprune.report(model, total=True))
        reports = []
        for seed in range(3):
            model.generate(**tiny.inputs(model, judge.ROWS, pad="left", seed=seed), max_new_tokens=2)
            reports.append(tokenprune.report(model))
        with tokenprune.override(model, method="none"):
            model(**tiny.inputs(model, judge.ROWS[:1]))
            reports.append(tokenprune.report(model))
        total = tokenprune.report(model, total=True, reset=True)
        for name in ("tokens", "kept", "kv_used", "kv_allocated", "flops", "flops_unpruned"):
            assert getattr(total, name) == sum(getattr(r, name) for r in reports), name
        assert (total.prompts, total.rows, total.images) == (4, 13, sum(len(r.images) for r in reports))
        average = sum(image.average for r in reports for image in r.images) / total.tokens
        assert total.retention_average == pytest.approx(average)
        assert total.seconds_scoring == pytest.approx(sum(r.seconds_scoring for r in reports))
        assert json.loads(json.dumps(total.to_dict()))["prompts"] == 4 and "4 prompts" in str(total)
        assert tokenprune.report(model, total=True).prompts == 0
        assert tokenprune.report(model).tokens == reports[-1].tokens
        with pytest.raises(tokenprune.ConfigError, match="pass total=True"):
            tokenprune.report(model, reset=True)
