"""Contract 14: each thing a method may see or say, by a probe, against an independent computation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import judge
import limits
import oracle
import tiny
import tokenprune
from test_methods import _states
from tokenprune.budget import Cut
from tokenprune.methods import ImageTokens, Method, Needs, Recycle, ScoreMethod, Selection, VisionAttention
from tokenprune.methods.entropyprune import EntropyPrune
from tokenprune.methods.random import Random

FAMILIES: dict[str, Callable[..., Any]] = {
    "llava": tiny.llava,
    "llava_onevision": tiny.llava_onevision,
    "qwen2_5_vl": tiny.qwen2_5_vl,
    "internvl": tiny.internvl,
}
ONE = (["text:5", "image", "text:3"],)
RAGGED = (["text:5", "image", "text:3", "image", "text:4"], ["text:7"], ["image", "text:2"])
K = 2


@dataclass(frozen=True)
class Probe(Method):
    """Remembers what it is shown, and keeps the first tokens."""

    name: ClassVar[str] = "probe"

    wants: Needs = field(default_factory=Needs)
    say: Any = None
    seen: list[ImageTokens] = field(default_factory=list)

    def needs(self) -> Needs:
        return self.wants

    def select(self, image: ImageTokens, k: int) -> Selection:
        self.seen.append(image)
        return Selection(torch.arange(k)) if self.say is None else self.say(image, k)


@pytest.fixture(params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param](layers=5, attn_implementation="eager")


@pytest.fixture(params=["one", "left", "right"])
def inputs(request: pytest.FixtureRequest, model: Any) -> Any:
    if request.param == "one":
        return tiny.inputs(model, ONE)
    return tiny.inputs(model, RAGGED, pad=request.param)


def shown(model: Any, inputs: Any, **arguments: Any) -> Iterator[tuple[int, int, Tensor, ImageTokens]]:
    """(row, image, columns of its prunable tokens, what was shown of it) at the first cut."""
    probe = arguments.pop("probe")
    with tokenprune.pruned(model, probe, **{"layer": K, "keep": 0.5, "budget": "after_cut", **arguments}):
        with torch.no_grad():
            model(**inputs)
    seen = iter(probe.seen)
    for r, row in enumerate(tiny.visual_positions(model, inputs)):
        for i, columns in enumerate(row):
            yield r, i, columns, next(seen)


def text_columns(model: Any, inputs: Any, row: int) -> Tensor:
    """Everything of a row that is neither padding nor a prunable token."""
    is_text = inputs["attention_mask"][row].bool().clone()
    for columns in tiny.visual_positions(model, inputs)[row]:
        is_text[columns] = False
    return is_text.nonzero()[:, 0]


def stock(model: Any, inputs: Any, **options: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **options)


# -- what a method sees ------------------------------------------------------------------------------------------------


def test_states_of_the_prompt(model: Any, inputs: Any) -> None:
    names = ("query", "key", "value", "hidden")
    hidden = stock(model, inputs, output_hidden_states=True).hidden_states[K]
    for r, _, _, image in shown(model, inputs, probe=Probe(Needs(prompt=names))):
        columns = text_columns(model, inputs, r)
        assert image.prompt is not None and torch.equal(image.prompt.columns, columns)
        torch.testing.assert_close(image.prompt.hidden, hidden[r, columns], atol=1e-5, rtol=0)
        if model.config.model_type == "llava":  # whose rotary embedding `_states` knows
            for name in names[:3]:
                wanted = _states(model, inputs, K, name)[r, columns]
                torch.testing.assert_close(getattr(image.prompt, name), wanted, atol=1e-5, rtol=0)
        assert image.query is None and image.hidden is None


def test_attention_of_the_last_token(model: Any, inputs: Any) -> None:
    attention = stock(model, inputs, output_attentions=True).attentions[K - 1]
    for r, _, columns, image in shown(model, inputs, probe=Probe(Needs(last_row=True))):
        last = int(inputs["attention_mask"][r].nonzero()[-1])
        torch.testing.assert_close(image.last_row, attention[r, :, last, columns], atol=1e-5, rtol=0)


def test_features_and_words_at_every_cut(model: Any, inputs: Any) -> None:
    embeds = stock(model, inputs, output_hidden_states=True).hidden_states[0]
    words = model.get_input_embeddings()(inputs["input_ids"])
    probe = Probe(Needs(features=True, words=True))
    cuts = [(0, 0.9), (K, 0.6), (4, 0.3)]
    first = list(shown(model, inputs, probe=probe, cuts=cuts, layer=None, keep=None, budget="average"))
    images = len(first)
    for cut in range(3):
        for (r, _, columns, _), image in zip(first, probe.seen[cut * images :], strict=False):
            assert image.cut == cut and image.features is not None and image.prompt is not None
            assert torch.equal(image.features, embeds[r, columns[image.raster]])
            text = text_columns(model, inputs, r)
            structural = {model.config.image_token_id} & set(inputs["input_ids"][r, text].tolist())
            if not structural:
                assert torch.equal(image.prompt.words, words[r, text])
    assert len(probe.seen) == 3 * images


def grey(patches: Tensor) -> Tensor:
    assert patches.dtype == torch.uint8
    return patches.float().mean((1, 2, 3))


def test_pixels_of_every_patch(model: Any, inputs: Any) -> None:
    kind, vision = model.config.model_type, model.config.vision_config
    pixels = inputs["pixel_values"]
    scale = {
        "internvl": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "llava_onevision": ((0.5,) * 3, (0.5,) * 3),
    }
    clip = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    mean, deviation = (torch.tensor(x)[:, None, None] for x in scale.get(kind, clip))
    p = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]

    def bytes_of(x: Tensor) -> Tensor:
        return ((x * deviation + mean) * 255).round().clamp(0, 255)

    def crop(x: Tensor, side: int) -> Tensor:  # (3, H, W): mean of every square, in raster order
        return torch.nn.functional.avg_pool2d(bytes_of(x).mean(0, keepdim=True), side).flatten()

    if kind == "qwen2_5_vl":
        whole = pixels.unflatten(-1, (3, vision.temporal_patch_size, p, p))
        wanted = bytes_of(whole.transpose(1, 2)).flatten(1).mean(1).unflatten(0, (-1, 4)).mean(1)
    elif kind == "internvl":
        wanted = torch.cat([crop(x, 2 * p) for x in pixels])
    else:
        wanted = torch.cat([crop(x, p) for x in pixels.flatten(0, -4)])
    start = 0
    for _, _, columns, image in shown(model, inputs, probe=Probe(Needs(pixels=grey))):
        assert image.pixels is not None and image.pixels.shape == (len(columns),)
        if kind == "llava_onevision":  # the base view, which is a crop; the tiled one has its own geometry
            crops, base = int(inputs["pixel_values"].shape[-4]), image.grids[0].tokens
            assert crops >= 1 and torch.allclose(image.pixels[:base], wanted[start : start + base], atol=1e-3)
            break
        torch.testing.assert_close(image.pixels, wanted[start : start + len(columns)], atol=1e-3, rtol=0)
        start += len(columns)


def test_pixels_are_the_images_own() -> None:
    """Through a real processor: the very bytes."""
    from tokenprune_testbed.modeling import build_model, build_processor

    torch.manual_seed(0)
    model, processor = build_model(4).eval(), build_processor()
    picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    inputs = processor(images=[picture], text=["<image> what is it ?"], return_tensors="pt")
    got: list[Tensor] = []

    def keep(patches: Tensor) -> Tensor:
        got.append(patches)
        return torch.stack([patches.float().amax((1, 2, 3)), patches.float().amin((1, 2, 3))], 1)

    probe = Probe(Needs(pixels=keep))
    with tokenprune.pruned(model, probe, layer=1, keep=0.5), torch.no_grad():
        model(**inputs)
        model.generate(**inputs, max_new_tokens=1)
    whole = torch.from_numpy(picture).reshape(12, 8, 12, 8, 3).permute(0, 2, 4, 1, 3).flatten(0, 1)
    assert torch.equal(got[0], whole) and torch.equal(got[1], whole)
    assert torch.equal(
        probe.seen[0].pixels, torch.stack([whole.amax((1, 2, 3)), whole.amin((1, 2, 3))], 1).float()
    )  # type: ignore[arg-type]


def test_several_maps_per_patch_and_a_layer_of_the_tower(model: Any, inputs: Any) -> None:
    def several(attention: VisionAttention) -> Tensor:
        received = attention.received()
        return torch.stack([received, 2 * received], 1)

    one = [
        image.vision
        for *_, image in shown(model, inputs, probe=Probe(Needs(vision=VisionAttention.received)))
    ]
    two = [image.vision for *_, image in shown(model, inputs, probe=Probe(Needs(vision=several)))]
    for a, b in zip(one, two, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(b, torch.stack([a, 2 * a], 1), atol=1e-6, rtol=0)


def merging(image: ImageTokens, k: int) -> Selection:
    """Keeps the first k; the one behind them goes into the first, the last into both of the first."""
    pairs = torch.tensor([[0, 0], [k, 0], [image.n - 1, 0], [1, 1], [image.n - 1, 1]])
    return Selection(torch.arange(k), pairs, torch.full((5,), 0.3))


def test_earlier_merges_sizes_and_the_cuts_number(model: Any, inputs: Any) -> None:
    probe = Probe(say=lambda image, k: merging(image, k) if image.cut < 2 else Selection(torch.arange(k)))
    cuts = [(1, 0.8), (2, 0.5), (4, 0.2)]
    images = list(shown(model, inputs, probe=probe, cuts=cuts, layer=None, keep=None, budget="average"))
    for n, _ in enumerate(images):
        first, second, third = (probe.seen[cut * len(images) + n] for cut in range(3))
        assert (first.cut, second.cut, third.cut) == (0, 1, 2)
        assert first.sizes.tolist() == [1] * first.n
        assert second.sizes.tolist() == [2.5, 1.5] + [1] * (second.n - 2)  # half of the last for each
        k = third.n
        by_hand = [2.5 + second.sizes[k] + second.sizes[-1] / 2, 1.5 + second.sizes[-1] / 2]
        assert third.sizes.tolist() == [float(x) for x in by_hand] + [1] * (k - 2)


# -- what a method says ------------------------------------------------------------------------------------------------


def biased(image: ImageTokens, k: int) -> Selection:
    step = torch.linspace(-1.5, 2.0, k) * (1 + image.cut)
    return Selection(torch.arange(image.n - k, image.n), bias=step)


BIASED: dict[str, dict[str, Any]] = {
    "before": {"layer": 0, "keep": 0.4},
    "at_2": {"layer": 2, "keep": 0.4, "budget": "after_cut"},
    "two": {"cuts": [(1, 0.8), (3, 0.4)]},
}


@pytest.mark.parametrize("cut", BIASED)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [*FAMILIES.values(), tiny.gemma3, tiny.paligemma], ids=lambda f: f.__name__)
def test_biases_in_prefill(build: Any, attention: str, cut: str) -> None:
    model = build(layers=4, attn_implementation=attention)
    for rows in (ONE, RAGGED):
        if build is tiny.paligemma:
            rows = [["image", "text:4"]] * len(rows)  # type: ignore[assignment]
        inputs = tiny.inputs(model, rows, pad="left")
        positions = tiny.visual_positions(model, inputs)
        with tokenprune.pruned(model, Probe(Needs(bias=True), biased), **BIASED[cut]), torch.no_grad():
            logits = model(**inputs).logits
            report = tokenprune.report(model)
        arguments = (model, inputs, judge.cuts_of(report), positions)
        wanted = oracle.masked_forward(*arguments, biases=judge.biases_of(report, positions)).logits
        assert judge.difference_at(report.index, logits, wanted, inputs["attention_mask"]) <= judge.TOLERANCE  # type: ignore[arg-type]
        without = oracle.masked_forward(*arguments).logits
        assert judge.difference_at(report.index, logits, without, inputs["attention_mask"]) > 1e-3  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", BIASED)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["growing", "static", "beams", "compiled"])
@pytest.mark.parametrize("build", [tiny.llava, tiny.qwen2_5_vl], ids=["llava", "qwen2_5_vl"])
def test_biases_while_decoding(build: Any, cache: str, attention: str, cut: str) -> None:
    model = build(layers=4, attn_implementation=attention)
    rows = limits.expandable(model, RAGGED) if cache == "beams" else RAGGED  # type: ignore[arg-type]
    inputs = tiny.inputs(model, rows, pad="left")
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    times = 1
    if cache == "static":
        options["past_key_values"] = StaticCache(config=model.config.text_config, max_cache_len=128)
    elif cache == "compiled":
        from test_compile import compiling

        options |= {"cache_implementation": "static", "compile_config": compiling()}
        if attention == "eager" or build is tiny.qwen2_5_vl:
            pytest.skip("compiled once is enough")
    elif cache == "beams":
        times = 2
        options |= {"num_beams": times, "num_return_sequences": times}
    arguments = {"method": Probe(Needs(bias=True), biased), **BIASED[cut]}
    difference, _, report = judge.generate_difference(model, inputs, options, times, **arguments)
    assert difference <= judge.TOLERANCE and all(report.biases)


def test_biases_are_refused_where_they_cannot_be_kept() -> None:
    for attention in ("flex_attention",):
        model = tiny.llava(attn_implementation=attention)
        with pytest.raises(
            tokenprune.ConfigError, match="adds biases to attention, which flex_attention does not"
        ):
            tokenprune.wrap(model, Probe(Needs(bias=True), biased), layer=1, keep=0.5)
    model = tiny.llava()
    with tokenprune.pruned(model, Probe(Needs(), biased), layer=1, keep=0.5), torch.no_grad():
        with pytest.raises(tokenprune.TokenPruneError, match=r"a bias without Needs\(bias=True\)"):
            model(**tiny.inputs(model, ONE))
    with tokenprune.pruned(model, Probe(Needs(bias=True), biased), layer=1, keep=0.5), torch.no_grad():
        model.set_attn_implementation("flex_attention")
        with pytest.raises(tokenprune.UnsupportedModeError, match="biases"):
            model(**tiny.inputs(model, ONE))


@dataclass(frozen=True)
class Adaptive(Random):
    """Keeps as many tokens as features have a positive first number."""

    name: ClassVar[str] = "adaptive"

    asked: list[Any] = field(default_factory=list)

    def needs(self) -> Needs:
        return Needs(digest=True, features=True, counts=True)

    def count(self, image: ImageTokens, planned: tuple[int, ...]) -> Tensor:
        assert image.features is not None
        self.asked.append(planned)
        return (image.features[:, 0] > 0).sum().expand(len(planned))


@pytest.mark.parametrize(
    "arguments", [{"layer": 0}, {"layer": 2}, {"cuts": [(1, None)]}], ids=["0", "2", "cuts"]
)
def test_counts_said_before_layer_0(model: Any, inputs: Any, arguments: dict[str, Any]) -> None:
    embeds = stock(model, inputs, output_hidden_states=True).hidden_states[0]
    method = Adaptive()
    with tokenprune.pruned(model, method, keep=0.5, budget="after_cut", **arguments), torch.no_grad():
        out = model(**inputs)
        report = tokenprune.report(model)
        last = model(**inputs, logits_to_keep=torch.tensor([inputs["input_ids"].shape[1] - 1])).logits
    torch.testing.assert_close(last, out.logits[:, -1:], atol=1e-5, rtol=0)
    found = iter(report.images)
    for r, row in enumerate(tiny.visual_positions(model, inputs)):
        for columns in row:
            wanted = max(1, int((embeds[r, columns, 0] > 0).sum()))
            assert next(found).kept == (wanted,)
    assert all(
        planned == (len(c) // 2,) for planned, c in zip(method.asked, _all(model, inputs), strict=False)
    )
    arguments = {**arguments, "method": Adaptive(), "keep": 0.5, "budget": "after_cut"}
    assert judge.prefill_difference(model, inputs, **arguments) <= judge.TOLERANCE


def test_counts_without_anybody_to_say_them_are_refused_at_wrap() -> None:
    model = tiny.llava()
    with pytest.raises(tokenprune.ConfigError, match="'probe' says counts and has no `count`"):
        tokenprune.wrap(model, Probe(Needs(counts=True)), layer=1, keep=0.5)
    assert not tokenprune.is_wrapped(model)


def _all(model: Any, inputs: Any) -> list[Tensor]:
    return [columns for row in tiny.visual_positions(model, inputs) for columns in row]


@dataclass(frozen=True)
class Own(Random):
    """With cuts of its own."""

    name: ClassVar[str] = "own"

    def default_cuts(self, family: str, num_layers: int, keep: Any = None) -> tuple[tuple[Cut, ...], str]:
        return (Cut(0, 0.8), Cut(num_layers // 3, 0.5), Cut(2 * num_layers // 3)), f"thirds of {family}"


def test_default_cuts_are_the_methods() -> None:
    model = tiny.llava(layers=6)
    with tokenprune.pruned(model, Own(), keep=0.5), torch.no_grad():
        model(**tiny.inputs(model, ONE))
        report = tokenprune.report(model)
    assert report.layers_cut == (0, 2, 4) and report.layer_reason == "thirds of llava"
    assert report.retention_average == pytest.approx(0.5, abs=0.03)


def test_a_batched_choice_is_the_same_choice() -> None:
    @dataclass(frozen=True)
    class Batched(Random):
        name: ClassVar[str] = "batched"
        sizes: list[int] = field(default_factory=list)

        def select_all(self, images: Any, counts: Any) -> list[Selection]:
            self.sizes.append(len(images))
            return [self.select(image, k) for image, k in zip(images, counts, strict=True)]

    model = tiny.llava(layers=4)
    inputs = tiny.inputs(model, RAGGED, pad="left")
    found, method = [], Batched()
    for own in (Random(), method):
        with tokenprune.pruned(model, own, layer=1, keep=0.5), torch.no_grad():
            model(**inputs)
            found.append(tokenprune.report(model).keep_lists)
    assert found[0] == found[1] and method.sizes == [3]


@pytest.mark.parametrize(
    "needs",
    [Needs(states=("foo",)), Needs(prompt=("bar",))],  # type: ignore[arg-type]
)
def test_unknown_states_are_refused_at_wrap(needs: Needs) -> None:
    with pytest.raises(tokenprune.ConfigError, match=r"needs the states '(foo|bar)'; there are query, key"):
        tokenprune.wrap(tiny.llava(), Probe(needs), layer=1, keep=0.5)


# -- merges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merges_of_many_sources_are_rounded_once(dtype: torch.dtype) -> None:
    """300 sources in one slot: within 0.3 % of float64."""
    from tokenprune.runtime.plan import make_plan
    from tokenprune.runtime.stages import Stages
    from tokenprune.tokens import Grid, Image

    n = 320
    image = Image(np.arange(4, 4 + n), (Grid(1, 16, 20),), "image", 0, (0, 1))
    model = tiny.llava()
    with tokenprune.pruned(model, "random", layer=0, keep=20):
        from tokenprune.api import runtime_of

        runtime = runtime_of(model)
        assert runtime is not None
        plan = make_plan([[image]], runtime.config, n + 8, None, 6)
    stages = Stages(plan, None)
    stages.to(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    hidden = (1 + torch.randn(1, n + 8, 64, generator=generator)).to(dtype)
    sources = torch.arange(20, 320)
    weights = torch.rand(300, generator=generator)
    weights = weights / weights.sum()
    pairs = torch.stack([sources, torch.zeros(300, dtype=torch.long)], 1)
    stages.store(0, (0, 0), Selection(torch.arange(20), pairs, weights))
    (short,) = stages.apply(0, [hidden])
    exact = (hidden[0, 4 + sources].double() * weights.double()[:, None]).sum(0)
    error = (short[0, 4].double() - exact).norm() / exact.norm()
    assert error <= {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 1e-6}[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [0, 2])
def test_merges_in_half_precision_equal_the_oracle(layer: int, dtype: torch.dtype) -> None:
    from tokenprune.analysis.reader import Reader

    model = tiny.llava(layers=4, dtype=dtype)
    inputs = tiny.inputs(model, RAGGED, pad="left")
    hidden: dict[int, Tensor] = {}
    method = Recycle(Random(), side=2)
    with tokenprune.pruned(model, method, layer=layer, keep=0.3, budget="after_cut"):
        with Reader(model, lambda l, x, p: hidden.update({l: x})) as reader:
            reader.read(inputs)
        report = tokenprune.report(model)
    positions = tiny.visual_positions(model, inputs)
    merges = judge.merges_of(report, positions)
    arguments = (model, inputs, judge.cuts_of(report), positions, merges)
    wanted = oracle.masked_forward(*arguments, output_hidden=True).hidden[layer]
    assert report.index is not None
    kept = wanted.gather(1, report.index.clamp(min=0)[..., None].expand(-1, -1, wanted.shape[-1]))
    real = report.index >= 0
    assert any(image.merged[0] > 5 for image in report.images)
    if layer == 0:
        torch.testing.assert_close(hidden[0][real], kept[real], atol=1e-6, rtol=3e-3)
    else:  # two layers of another attention mask lie between
        scale = float(kept[real].float().abs().mean())
        assert float((hidden[layer] - kept)[real].float().abs().max()) <= 0.1 * scale


@pytest.mark.parametrize("inner", [Random(), tokenprune.methods.EntropyPrune(normalization="trace")])
def test_recycling_is_exact_and_judged(model: Any, inputs: Any, inner: ScoreMethod) -> None:
    method = Recycle(inner, side=3)
    arguments: dict[str, Any] = {"method": method, "cuts": [(1, 0.7), (3, 0.4)]}
    with tokenprune.pruned(model, **arguments), torch.no_grad():
        model(**inputs)
        report = tokenprune.report(model)
    for image in report.images:
        assert image.kept == (int(0.7 * image.tokens + 0.5), int(0.4 * image.tokens + 0.5))
        # Every token that is dropped goes into a cell, in which one is left.
        assert image.merged[0] == image.tokens - image.kept[0] and not any(image.merged[1:])
    assert judge.prefill_difference(model, inputs, **arguments) <= judge.TOLERANCE


def test_recycling_wants_a_method_that_scores() -> None:
    with pytest.raises(tokenprune.ConfigError, match="scores tokens"):
        Recycle(tokenprune.methods.Uniform())  # type: ignore[arg-type]
    with pytest.raises(tokenprune.ConfigError, match="side of recycling cells"):
        Recycle(Random(), side=0.5)


@pytest.mark.parametrize("rows", [judge.ROWS, [["text:3", "image", "text:4"]] * 3], ids=["ragged", "alike"])
@pytest.mark.parametrize("source", ["query", "value", "hidden"])
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl"])
def test_a_batch_is_scored_in_one_go(
    name: str, source: str, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pointwise method's images are shown as one, and it chooses what it would image by image."""
    model = tiny.FAMILIES[name]()
    inputs = tiny.inputs(model, rows, pad="left")
    scored: list[int] = []
    score = EntropyPrune.score

    def counting(self: EntropyPrune, image: Any) -> torch.Tensor:
        scored.append(image.n)
        return score(self, image)

    monkeypatch.setattr(EntropyPrune, "score", counting)
    lists, times = [], []
    for most in (8192, 0):
        monkeypatch.setattr("tokenprune.runtime.sight.JOINED_TOKENS", most)
        scored.clear()
        arguments = {"method": EntropyPrune(source=source), "cuts": [(1, 0.7), (3, 0.4)]}
        with tokenprune.pruned(model, **arguments), torch.no_grad():
            model(**inputs)
            lists.append(tokenprune.report(model).keep_lists)
        times.append(len(scored))
    images = sum(map(len, lists[0][0]))
    assert times == [2, 2 * images]
    assert lists[0] == lists[1]


@pytest.mark.parametrize("normalization", ["none", "trace"])
@pytest.mark.parametrize("name", [name for name in tiny.FAMILIES if name != "kimi_k25"])
def test_entropy_does_not_see_the_rotary_embedding(
    name: str, normalization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries that are shown without it score as those with it, in every kind of decoder."""
    model = tiny.FAMILIES[name]()
    inputs = tiny.inputs(model, judge.ROWS[:1])
    scores: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for rotary in (True, False):

        @dataclass(frozen=True)
        class Noted(EntropyPrune):
            def needs(self) -> Needs:
                return replace(super().needs(), rotary=rotary)  # noqa: B023

            def score(self, image: ImageTokens) -> torch.Tensor:
                scores[rotary].append(super().score(image))  # noqa: B023
                return scores[rotary][-1]  # noqa: B023

        with tokenprune.pruned(model, Noted(normalization=normalization), layer=2, keep=0.6), torch.no_grad():
            model(**inputs)
    for turned, flat in zip(scores[True], scores[False], strict=True):
        torch.testing.assert_close(turned, flat, rtol=1e-3, atol=1e-5)
