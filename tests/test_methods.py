"""The methods, against the papers' formulas in float64 and numbers worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import estimator_reference
import judge
import tiny
import tokenprune
from tokenprune.errors import ConfigError
from tokenprune.estimators import ESTIMATORS
from tokenprune.methods import (
    METHODS,
    EntropyPrune,
    Grid,
    ImageTokens,
    Needs,
    Random,
    ScoreMethod,
    Uniform,
    registry,
)

ROWS = (["text:5", "image", "text:3", "image", "text:4"], ["text:2", "image", "text:9"])


def image(n: int, grid: Grid | None = None, **states: Any) -> ImageTokens:
    return ImageTokens(n=n, raster=torch.arange(n), grids=(grid or Grid(1, 1, n),), num_heads=2, **states)


def entropy64(x: Tensor, trace: bool) -> Tensor:
    """H = - sum lambda log lambda / log h of the centred head Gram, written out (arXiv 2602.17196)."""
    x = x.double()
    h = x.shape[-2]
    centred = x - x.mean(-2, keepdim=True)
    gram = centred @ centred.transpose(-1, -2) / h
    if trace:
        gram = gram / gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    values = torch.linalg.eigvalsh(gram).clamp(min=1e-10)
    return -(values * values.log()).sum(-1) / math.log(h)


def test_entropy_by_hand() -> None:
    """Two heads (a, 0), (-a, 0): centred already, Gram [[a^2, -a^2], [-a^2, a^2]] / 2, eigenvalues a^2 and 0.

    H = -a^2 log(a^2) / log 2 (the zero, clamped to 1e-10, adds 1e-10 * 23 / 0.69 = 3e-9). For a^2 = 1/2: 1/2.
    For a^2 = 1: 0. For a^2 = 1/4: 1/2. For a^2 = 4: -8.
    """
    squares = torch.tensor([0.5, 1.0, 0.25, 4.0])
    a = squares.sqrt()
    query = torch.stack([torch.stack([a, 0 * a], -1), torch.stack([-a, 0 * a], -1)], dim=1)
    score = EntropyPrune().score(image(4, query=query))
    torch.testing.assert_close(score, torch.tensor([0.5, 0.0, 0.5, -8.0]), atol=1e-5, rtol=0)
    # Divided by the trace, every one of them is rank one: entropy 0 (up to the clamp).
    traced = EntropyPrune(normalization="trace").score(image(4, query=query))
    torch.testing.assert_close(traced, torch.zeros(4), atol=1e-5, rtol=0)


def test_largest_entropy_is_kept_and_ties_go_to_the_lower_index() -> None:
    a = torch.tensor([0.5, 1.0, 0.5, 4.0]).sqrt()
    query = torch.stack([torch.stack([a, 0 * a], -1), torch.stack([-a, 0 * a], -1)], dim=1)
    assert EntropyPrune().select(image(4, query=query), 1).keep.tolist() == [0]
    assert EntropyPrune().select(image(4, query=query), 2).keep.tolist() == [0, 2]
    assert EntropyPrune().select(image(4, query=query), 3).keep.tolist() == [0, 1, 2]


@pytest.mark.parametrize("normalization", ["none", "trace"])
def test_dual_and_primal_agree(normalization: str) -> None:
    query = torch.randn(50, 4, 16)
    dual = EntropyPrune(normalization=normalization).score(image(50, query=query))
    primal = EntropyPrune(normalization=normalization, gram="primal").score(image(50, query=query))
    torch.testing.assert_close(dual.double(), primal.double(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("estimator", [n for n, e in ESTIMATORS.items() if e.spectral])
def test_other_estimators_of_the_same_eigenvalues(estimator: str) -> None:
    query = torch.randn(20, 4, 16)
    score = EntropyPrune(estimator=estimator, normalization="trace").score(image(20, query=query))
    centred = query.double() - query.double().mean(1, keepdim=True)
    scaled = centred / centred.square().sum((1, 2), keepdim=True).sqrt() * 2  # trace of X X^T / 4 is 1
    truth = torch.tensor([getattr(estimator_reference, estimator)(x) for x in scaled], dtype=torch.float64)
    if estimator == "effective_rank":  # ranked by its logarithm
        truth = truth.log() / math.log(4)
    torch.testing.assert_close(score.double(), truth, atol=1e-4, rtol=1e-4)
    primal = EntropyPrune(estimator=estimator, normalization="trace", gram="primal")
    torch.testing.assert_close(primal.score(image(20, query=query)).double(), truth, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("normalization", ["none", "trace"])
@pytest.mark.parametrize("estimator", [n for n, e in ESTIMATORS.items() if e.spectral])
def test_every_estimator_ranks_large_and_empty_tokens(estimator: str, normalization: str) -> None:
    """Large queries give no ties (an exponential would underflow), and equal heads rank last."""
    query = 4 * torch.randn(12, 8, 32)
    query[5] = query[5, :1]  # every head alike
    score = EntropyPrune(estimator=estimator, normalization=normalization).score(image(12, query=query))
    assert len(set(score.tolist())) == 12
    if normalization == "trace":
        assert int(score.argmin()) == 5


def test_the_diffusion_estimator_is_not_one_of_eigenvalues() -> None:
    with pytest.raises(ConfigError, match="estimator must be one of von_neumann, renyi, effective_rank"):
        EntropyPrune(estimator="diffusion")


@pytest.mark.parametrize("source", ["query", "key", "value", "hidden"])
@pytest.mark.parametrize("normalization", ["none", "trace"])
@pytest.mark.parametrize("build", [tiny.llava, tiny.qwen2_5_vl], ids=["llava", "qwen2_5_vl"])
def test_entropyprune_scores_the_states_it_says(build: Any, source: str, normalization: str) -> None:
    """Recompute layer K - 1's states (or layer K's input) from a plain forward, and the kept tokens from float64."""
    model, layer = build(), 3
    inputs = tiny.inputs(model, ROWS, pad="left")
    with (
        tokenprune.pruned(
            model, "entropyprune", source=source, normalization=normalization, layer=layer, keep=0.6
        ),
        torch.no_grad(),
    ):
        model(**inputs)
        report = tokenprune.report(model)
    states = _states(model, inputs, layer, source)
    for r, row in enumerate(tiny.visual_positions(model, inputs)):
        for i, columns in enumerate(row):
            score = entropy64(states[r, columns], normalization == "trace")
            kept = report.keep_lists[0][r][i]
            dropped = [j for j in range(len(columns)) if j not in kept]
            # Every kept score is above every dropped one, up to float32's error in states and eigenvalues.
            assert score[kept].min() >= score[dropped].max() - 1e-3 * score.abs().max()


def _states(model: Any, inputs: dict[str, Tensor], layer: int, source: str) -> Tensor:
    """(B, L, heads, d) from a stock forward."""
    caught: dict[str, Any] = {}
    before, at = model.model.language_model.layers[layer - 1], model.model.language_model.layers[layer]
    attention = before.self_attn
    handles = [
        attention.register_forward_pre_hook(
            lambda m, a, k: caught.update(rope=k["position_embeddings"]), with_kwargs=True
        ),
        at.register_forward_pre_hook(lambda m, a, k: caught.update(hidden=a[0]), with_kwargs=True),
        *(
            getattr(attention, f"{n[0]}_proj").register_forward_hook(
                lambda m, a, o, n=n: caught.update({n: o})
            )
            for n in ("query", "key", "value")
        ),
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    if source == "hidden":
        return caught["hidden"].unflatten(-1, (model.config.text_config.num_attention_heads, -1))
    states = caught[source].unflatten(-1, (-1, attention.head_dim))
    if source == "value":
        return states
    cos, sin = caught["rope"]
    turned, _ = apply_rotary_pos_emb(states.transpose(1, 2), states.transpose(1, 2), cos, sin)
    return turned.transpose(1, 2)


@pytest.mark.parametrize(
    "build", [tiny.llava, tiny.qwen2_5_vl, tiny.gemma3], ids=["llava", "qwen2_5_vl", "gemma3"]
)
def test_fastv_keeps_what_the_last_token_attends_to(build: Any) -> None:
    model = build(attn_implementation="eager")
    inputs = tiny.inputs(model, ROWS, pad="left")
    with torch.no_grad():
        attention = model(**inputs, output_attentions=True).attentions[1].mean(1)
        with tokenprune.pruned(model, "fastv", layer=2, keep=0.5):
            model(**inputs)
            kept = tokenprune.report(model).keep_lists[0]
    for r, row in enumerate(tiny.visual_positions(model, inputs)):
        for i, columns in enumerate(row):
            best = attention[r, -1, columns].sort(descending=True, stable=True).indices[: len(kept[r][i])]
            assert kept[r][i] == best.sort().values.tolist()


@pytest.mark.parametrize("build", [tiny.llava, tiny.qwen2_5_vl], ids=["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"none"}))
def test_every_method_is_judged(name: str, build: Any) -> None:
    model = build(layers=5)
    inputs = tiny.inputs(model, ROWS, pad="left")
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    for arguments in ({"layer": 1, "keep": 0.5}, {"cuts": [(1, 0.7), (3, 0.3)]}):
        difference, *_ = judge.generate_difference(model, inputs, options, method=name, **arguments)
        assert difference <= judge.TOLERANCE


def test_single_key_value_head_is_refused() -> None:
    """log 1 = 0: one head has no entropy; said at wrap, not in the middle of a forward."""
    model = tiny.llava(kv_heads=1)
    with pytest.raises(tokenprune.ConfigError, match="single head"):
        tokenprune.wrap(model, "entropyprune", source="key", keep=0.5)
    with tokenprune.pruned(model, "entropyprune", source="query", keep=0.5):
        pass


def test_random_is_seeded_by_seed_image_and_prompt() -> None:
    """Contract 16, by changing one thing at a time."""

    def kept(prompt: int, pixels: int, seed: int) -> list[int]:
        tokens = image(100, digest=torch.tensor(prompt * 1000 + pixels))
        return Random(seed=seed).select(tokens, 20).keep.tolist()

    first = kept(1, 1, 0)
    assert first == kept(1, 1, 0)
    assert len({tuple(kept(*x)) for x in ((1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 1, 1))}) == 4
    assert first == sorted(set(first))


def test_random_is_uniform() -> None:
    """Each of 50 tokens is kept in a fifth of the draws: 400 of 2,000, standard deviation 18."""
    counts = torch.zeros(50)
    for seed in range(2000):
        counts[Random(seed=seed).select(image(50, digest=torch.tensor(7)), 10).keep] += 1
    assert counts.sum() == 20_000
    assert (counts - 400).abs().max() < 5 * 18


@pytest.mark.parametrize(
    "grid", [Grid(1, 12, 12), Grid(1, 5, 9), Grid(3, 4, 4), Grid(1, 1, 7), Grid(1, 24, 24)]
)
def test_uniform_covers_the_grid(grid: Grid) -> None:
    for k in range(1, grid.tokens):
        keep = Uniform().select(image(grid.tokens, grid), k).keep
        assert keep.unique().numel() == k
        assert keep.tolist() == sorted(keep.tolist())
        assert keep.min() >= 0
        assert keep.max() < grid.tokens


def test_uniform_by_hand() -> None:
    """4 of a 4 x 4 grid: rows 1 and 3, columns 1 and 3 of each."""
    assert Uniform().select(image(16, Grid(1, 4, 4)), 4).keep.tolist() == [5, 7, 13, 15]


def test_parameters_and_docstrings() -> None:

    for name, method in METHODS.items():
        assert method.name == name
        assert method.__doc__
    with pytest.raises(tokenprune.ConfigError, match="source must be one of query, key, value, hidden"):
        EntropyPrune(source="keys")


@dataclass(frozen=True)
class Both(ScoreMethod):
    """Needs a state of the layer before the cut and the cut's own input."""

    name: ClassVar[str] = "both"

    def needs(self) -> Needs:
        return Needs(states=("query", "hidden"))

    def score(self, image: ImageTokens) -> Tensor:
        assert image.query is not None
        assert image.hidden is not None
        return image.query.flatten(1).sum(-1) + image.hidden.sum(-1)


def test_a_method_that_needs_projected_and_hidden_states() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, ROWS, pad="left")
    with tokenprune.pruned(model, Both(), layer=2, keep=0.5), torch.no_grad():
        model(**inputs)
        kept = tokenprune.report(model).keep_lists[0]
    query, hidden = _states(model, inputs, 2, "query"), _states(model, inputs, 2, "hidden")
    for r, row in enumerate(tiny.visual_positions(model, inputs)):
        for i, columns in enumerate(row):
            score = query[r, columns].flatten(1).sum(-1) + hidden[r, columns].flatten(1).sum(-1)
            best = score.sort(descending=True, stable=True).indices[: len(kept[r][i])]
            assert kept[r][i] == best.sort().values.tolist()
    with pytest.raises(tokenprune.ConfigError, match="layers 1 to"):
        tokenprune.wrap(model, Both(), layer=0, keep=0.5)


class Registered(Uniform):
    name: ClassVar[str] = "registered"


def test_methods_of_installed_packages_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an entry point, which is loaded when the name is asked for; one that is no method is refused."""
    found = {
        "registered": EntryPoint("registered", f"{__name__}:Registered", "tokenprune.methods"),
        "other": EntryPoint("other", f"{__name__}:Registered", "tokenprune.methods"),
    }

    def entry_points(group: str, name: str | None = None) -> list[EntryPoint]:
        assert group == "tokenprune.methods"
        return [own for own in found.values() if name in (None, own.name)]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    monkeypatch.setattr(registry, "METHODS", dict(METHODS))
    model = tiny.llava()
    with tokenprune.pruned(model, "registered", keep=0.5), torch.no_grad():
        model(**tiny.inputs(model, judge.ROWS))
        assert tokenprune.report(model).method == "registered"
    with pytest.raises(ConfigError, match="unknown method 'nosuch'"):
        tokenprune.wrap(model, "nosuch", keep=0.5)
    with pytest.raises(ConfigError, match="is no Method of the name 'other'"):
        tokenprune.wrap(model, "other", keep=0.5)
    del found["other"]
    assert "registered" in tokenprune.methods.find_all()


# -- methods of one's own, named on a command line ------------------------------------------------------------------


OWN = '''
from dataclasses import dataclass
from typing import ClassVar
from tokenprune.methods import Needs, ScoreMethod

@dataclass(frozen=True)
class Mine(ScoreMethod):
    """Keeps bright tokens."""

    name: ClassVar[str] = "{name}"
    power: float = 1.0

    def needs(self):
        return Needs(features=True)

    def score(self, image):
        return image.features.float().norm(dim=-1) ** self.power

class Other: ...
'''


def test_a_method_named_by_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_of_this_test.py").write_text(OWN.replace("{name}", "mine_of_this_test"))
    (tmp_path / "twice_of_this_test.py").write_text(OWN.replace("{name}", "uniform"))
    monkeypatch.chdir(tmp_path)
    model = tiny.llava()
    inputs = tiny.inputs(model, [["text:3", "image", "text:4"]])
    with tokenprune.pruned(model, "own_of_this_test:Mine", keep=0.5, layer=0, power=2.0), torch.no_grad():
        model(**inputs)
        assert tokenprune.report(model).method == "mine_of_this_test"
        assert tokenprune.report(model).parameters == {"power": 2.0}
    for name, text in (
        ("own_of_this_test:Nothing", "AttributeError"),
        ("no.such.module:Mine", "ModuleNotFoundError"),
        ("own_of_this_test:Other", "is no Method with a name"),
        ("twice_of_this_test:Mine", "as another method does"),
        ("own_of_this_test:", "AttributeError"),
    ):
        with pytest.raises(ConfigError, match=text):
            tokenprune.wrap(model, name, keep=0.5)
        assert not tokenprune.is_wrapped(model)
    held = {"version": 1, "method": "own_of_this_test:Mine", "keep": 0.5}
    (tmp_path / "profile.json").write_text(json.dumps(held))
    with pytest.raises(ConfigError, match="method"):  # a file's text is never imported
        tokenprune.wrap(model, profile=tmp_path / "profile.json")
    METHODS.pop("mine_of_this_test")
