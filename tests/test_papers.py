"""Methods from papers: by hand, by brute force, and against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import judge
import tiny
import tokenprune
from tokenprune.methods import (
    DART,
    EVS,
    CDPruner,
    DivPrune,
    Grid,
    ImageTokens,
    Merge,
    PruMerge,
    PyramidDrop,
    Question,
    Relevance,
    Restore,
    SparseVLM,
    Text,
    ToMe,
    VisionAttention,
    VisionZip,
)
from tokenprune.methods import METHODS as ALL
from tokenprune.methods.cdpruner import greedy_map
from tokenprune.methods.divprune import max_min
from tokenprune.methods.prumerge import outliers
from tokenprune.methods.tome import match
from tokenprune.methods.visionzip import attended_and_keys

METHODS: dict[str, dict[str, Any]] = {
    "divprune": {"keep": 0.4},
    "cdpruner": {"keep": 0.4},
    "dart": {"layer": 2, "keep": 0.6},
    "visionzip": {"keep": 0.4},
    "visionzip, later": {"layer": 2, "keep": 0.6},
    "pyramiddrop": {"keep": 0.5},
    "sparsevlm": {"layer": 2, "keep": 0.6},
    "question": {"layer": 2, "keep": 0.6, "even": 0.3},
    "question, all": {
        "layer": 2,
        "keep": 0.6,
        "skip_last": 2,
        "baseline": 0.5,
        "sinks": 1.01,
        "pooling": "median",
    },
    "prumerge": {"keep": 0.4, "neighbours": 3},
    "prumerge, adaptive": {"adaptive": True, "keep": 0.4, "layer": 0, "budget": "after_cut"},
    "tome": {"keep": 0.4},
    "tome, twice": {"cuts": [(0, 0.6), (2, 0.3)]},
    "vflowopt, merging at every cut": {"keep": 0.4, "recycle_every": True},
    "evs": {"keep": 0.4},
    "relevance": {"keep": 0.4},
    "relevance, later": {"layer": 2, "keep": 0.6, "pooling": "mean", "centred": False},
    "merge": {"keep": 0.4},
    "merge, thrice": {"of": "divprune", "cuts": [(0, 0.6), (1, 0.4), (3, 0.3)]},
    "merge, later": {"of": "fastv", "layer": 2, "keep": 0.6},
    "restore": {"keep": 0.4},
    "restore, merging": {"of": "vflowopt", "keep": 0.4},
    "restore, later": {"cuts": [(0, 0.6), (2, 0.3)], "strength": 0.5},
}


def image(n: int, **states: Any) -> ImageTokens:
    return ImageTokens(n=n, raster=torch.arange(n), grids=(Grid(1, 1, n),), num_heads=1, **states)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [tiny.llava, tiny.qwen2_5_vl, tiny.llava_next], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_against_the_oracle(name: str, build: Any, attention: str) -> None:
    model = build(attn_implementation=attention)
    inputs = tiny.inputs(model, judge.ROWS)
    arguments = {"method": name.split(",")[0], **METHODS[name]}
    assert judge.prefill_difference(model, inputs, **arguments) <= judge.TOLERANCE
    options = {"do_sample": False, "max_new_tokens": 3}
    assert judge.generate_difference(model, inputs, options, **arguments)[0] <= judge.TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        *("divprune", "cdpruner", "visionzip", "sparsevlm", "dart"),
        *("prumerge", "tome", "evs", "relevance", "restore", "merge"),
    ],
)
@pytest.mark.parametrize("keep", [7, 0.3])
def test_budgets(name: str, keep: Any) -> None:
    model = tiny.llava(side=6)
    inputs = tiny.inputs(model, judge.ROWS)
    layer = 2 if name in ("sparsevlm", "dart") else 0
    with tokenprune.pruned(model, name, keep=keep, layer=layer, budget="after_cut"), torch.no_grad():
        model(**inputs)
        report = tokenprune.report(model)
    assert {own.kept[-1] for own in report.images} == {7 if keep == 7 else int(36 * 0.3)}


# -- DivPrune ---------------------------------------------------------------------------------------------------------


def greedy(distance: Tensor, k: int) -> list[int]:
    """Algorithm 1, word by word."""
    n = len(distance)
    chosen = [max(range(n), key=lambda i: (min(float(distance[i, j]) for j in range(n) if j != i), -i))]
    while len(chosen) < k:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(float(distance[i, j]) for j in chosen), -i)))
    return chosen


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "k"), [(2, 1), (9, 4), (40, 13), (40, 39)])
def test_max_min_is_the_greedy_algorithm(n: int, k: int, seed: int) -> None:
    points = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    unit = torch.nn.functional.normalize(points, dim=1)
    distance = 1 - unit @ unit.T
    other = torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
    assert max_min(torch.stack([other, distance]), k)[1].tolist() == greedy(distance, k)


def test_divprune_by_hand() -> None:
    """Three directions, two tokens each: one of each is kept, and of equal ones the lower index."""
    features = torch.tensor([[1.0, 0, 0], [2, 0, 0], [0, 1, 0], [0, 3, 0], [0, 0, 1], [0, 0, 1]])
    assert DivPrune().select(image(6, features=features), 3).keep.tolist() == [0, 2, 4]


# -- CDPruner ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "k"), [(2, 1), (9, 4), (30, 13)])
def test_greedy_map_raises_the_determinant_most(n: int, k: int, seed: int) -> None:
    rows = torch.randn(n, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kernel, chosen = rows @ rows.T, list[int]()
    for _ in range(k):
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(kernel[[*chosen, i]][:, [*chosen, i]].logdet())))
    both = torch.stack([rows.float(), rows.flip(0).float()])
    first, second = greedy_map(both, k).tolist()
    assert first == chosen and [n - 1 - i for i in second] == chosen


def test_greedy_map_beyond_the_rank_takes_each_once() -> None:
    """Of two directions no third token adds anything: the lower indices follow, none twice, nothing is nan."""
    rows = torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, 1], [1, 1]])
    assert greedy_map(rows[None], 5).tolist() == [[1, 2, 0, 3, 4]]


def test_cdpruner_by_hand() -> None:
    """The word is (1, 0) and what stands before the picture is not read: what points away from it has relevance 0."""
    features = torch.tensor([[-1.0, 0], [1, 0], [1, 0.1], [0, 1.0]])
    text = Text(torch.arange(2), words=torch.tensor([[-1.0, 0], [1, 0]]), behind=1)
    assert CDPruner().select(image(4, features=features, prompt=text), 2).keep.tolist() == [1, 3]


# -- VisionZip --------------------------------------------------------------------------------------------------------


def test_visionzip_by_hand() -> None:
    """Four kept, three of them dominant; of the other four two go to the target whose key is like theirs."""
    score = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.7, 0.3])
    key = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [1, 0], [1, 0]])
    shown = image(6, vision=torch.cat([score[:, None], key], dim=1))
    found = VisionZip(dominant=0.75).select(shown, 4)
    # Dominant: 0, 2, 4. The rest, 1, 3 and 5, has one target, 1.
    assert found.keep.tolist() == [0, 1, 2, 4]
    assert found.merges is not None and found.merges.tolist() == [[1, 1], [3, 1], [5, 1]]
    torch.testing.assert_close(found.weights, torch.full((3,), 1 / 3))
    found = VisionZip(dominant=0.5).select(shown, 4)
    # Dominant: 0, 2. The rest is 1, 3, 4, 5, its targets 1 and 4, both [1, 0]: of equal ones the first; 4 is its own.
    assert found.keep.tolist() == [0, 1, 2, 4]
    assert found.merges is not None and found.merges.tolist() == [[1, 1], [3, 1], [4, 4], [5, 1]]
    later = ImageTokens(n=6, raster=torch.arange(6), grids=(Grid(1, 1, 6),), cut=1, vision=shown.vision)
    assert VisionZip().select(later, 2).merges is None
    with pytest.raises(tokenprune.ConfigError, match="dominant"):
        VisionZip(dominant=0.0)


@pytest.mark.parametrize("cls", [False, True])
def test_what_visionzip_sees_of_the_tower(cls: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 5, 4, generator=generator), torch.randn(2, 5, 4, generator=generator)
    attention = (query @ key.transpose(1, 2) * 0.5).softmax(-1).mean(0)
    found = attended_and_keys(VisionAttention(query, key, 0.5, cls))
    wanted = attention[0, 1:] if cls else attention.mean(0)
    torch.testing.assert_close(found[:, 0], wanted)
    torch.testing.assert_close(found[:, 1:], key[:, int(cls) :].mean(0))


# -- PyramidDrop ------------------------------------------------------------------------------------------------------


def test_pyramiddrop_is_where_it_was_published() -> None:
    cuts, _ = PyramidDrop().default_cuts("llava", 32, 0.46875)  # (1 + 1/2 + 1/4 + 1/8) / 4
    assert [cut.layer for cut in cuts] == [8, 16, 24]
    assert [cut.keep for cut in cuts[:2]] == pytest.approx([0.5, 0.25]) and cuts[2].keep is None
    with pytest.raises(tokenprune.BudgetError, match="cannot be reached"):
        tokenprune.wrap(tiny.llava(layers=8), "pyramiddrop", keep=0.2)


# -- SparseVLM --------------------------------------------------------------------------------------------------------


def test_sparsevlm_by_hand() -> None:
    """Two words behind the picture; only the second is like it, and rates."""
    features = torch.tensor([[0.0, 2.0], [0.0, 1.0], [1.0, 3.0]])
    words = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0]])
    key = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 0.0]]])
    query = torch.tensor([[[5.0, 5.0]], [[3.0, 0.0]], [[0.0, 2.0]]])
    text = Text(torch.arange(3), query=query, words=words, behind=2, scale=1.0)
    score = SparseVLM().score(image(3, key=key, features=features, prompt=text))
    torch.testing.assert_close(score, torch.tensor([0.0, 2.0, 0.0]).softmax(0))


# -- DART -------------------------------------------------------------------------------------------------------------


def least_alike(image: ImageTokens, k: int, images: int, texts: int) -> list[int]:
    """Pivots and their turns, word by word."""
    text = image.prompt
    assert image.key is not None and image.hidden is not None and text is not None
    assert text.key is not None and text.hidden is not None
    size = image.key.abs().sum((1, 2)).tolist()
    asked = text.key.abs().sum((1, 2)).tolist()
    own = sorted(range(image.n), key=lambda i: (-size[i], i))[: min(images, k)]
    asking = sorted(range(len(asked) - text.behind, len(asked)), key=lambda i: (-asked[i], i))[:texts]
    chosen, states = list(own), [*(image.hidden[i] for i in own), *(text.hidden[i] for i in asking)]
    for turn, pivot in enumerate(states):
        cosine = torch.cosine_similarity(pivot[None], image.hidden).tolist()
        share = (k - len(own)) // len(states) + (turn < (k - len(own)) % len(states))
        rest = [i for i in range(image.n) if i not in chosen]
        chosen += sorted(rest, key=lambda i: (cosine[i], i))[:share]
    return sorted(chosen)


@pytest.mark.parametrize("behind", [0, 2, 6])
@pytest.mark.parametrize(("n", "k"), [(5, 1), (5, 4), (30, 11), (30, 29)])
def test_dart_is_its_description(n: int, k: int, behind: int) -> None:
    generator = torch.Generator().manual_seed(n + k)
    text = Text(
        torch.arange(6),
        key=torch.randn(6, 2, 4, generator=generator),
        hidden=torch.randn(6, 8, generator=generator),
        behind=behind,
    )
    shown = image(
        n,
        key=torch.randn(n, 2, 4, generator=generator),
        hidden=torch.randn(n, 8, generator=generator),
        prompt=text,
    )
    found = DART().select(shown, k).keep.tolist()
    assert len(found) == k and found == least_alike(shown, k, 4, 4)


def test_dart_by_hand() -> None:
    """One pivot of each kind: the image's, 2, takes what points away from it, the text's what points away from that."""
    hidden = torch.tensor([[0.0, 1.0], [-3.0, 0.0], [1.0, 0.0], [2.0, 0.1], [0.0, -1.0]])
    key = torch.tensor([1.0, 1, -9, 1, 1])[:, None, None]
    text = Text(
        torch.arange(2),
        key=torch.tensor([9.0, 1.0])[:, None, None],
        hidden=torch.tensor([[0.0, -1], [0, 1]]),
        behind=1,
    )
    shown = image(5, key=key, hidden=hidden, prompt=text)
    assert DART(image_pivots=1, text_pivots=1).select(shown, 3).keep.tolist() == [1, 2, 4]
    assert DART(image_pivots=1, text_pivots=0).select(shown, 3).keep.tolist() == [0, 1, 2]
    with pytest.raises(tokenprune.ConfigError, match="image_pivots"):
        DART(image_pivots=0)


# -- PruMerge ---------------------------------------------------------------------------------------------------------


def test_prumerge_by_hand() -> None:
    """One outlier; an even grid of four fills up; each takes up the dropped token whose key is most like its own."""
    score = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1])
    assert outliers(score).nonzero().flatten().tolist() == [4]
    angle = torch.tensor([0.0, 0.1, 1.0, 1.1, 2.0, 2.1, 3.0, 3.1])
    key = torch.stack([angle.cos(), angle.sin()], dim=1)
    shown = image(8, vision=torch.cat([score[:, None], key], dim=1))
    found = PruMerge(neighbours=1).select(shown, 3)
    assert found.merges is not None and found.weights is not None
    kept = found.keep.tolist()
    assert 4 in kept and len(kept) == 3
    pairs = dict(zip(map(tuple, found.merges.tolist()), found.weights.tolist(), strict=True))
    for slot in kept:
        gone = [i for i in range(8) if i not in kept]
        nearest = max(gone, key=lambda i: float((key[i] * key[slot]).sum()))
        assert pairs.pop((slot, slot)) == 1.0
        assert pairs.pop((nearest, slot)) == pytest.approx(0.1)
    assert not pairs
    later = ImageTokens(n=8, raster=torch.arange(8), grids=(Grid(1, 1, 8),), cut=1, vision=shown.vision)
    assert PruMerge().select(later, 3).merges is None
    assert PruMerge(adaptive=True).count(shown, (3, 2)).tolist() == [1, 1]
    with pytest.raises(tokenprune.ConfigError, match="neighbours"):
        PruMerge(neighbours=-1)


@pytest.mark.parametrize("n", [4, 7, 100])
def test_outliers_are_those_of_a_box_plot(n: int) -> None:
    score = torch.rand(n, generator=torch.Generator().manual_seed(n)) ** 8
    low, high = (float(score.double().quantile(q)) for q in (0.25, 0.75))
    wanted = [i for i in range(n) if float(score[i]) > high + 1.5 * (high - low)]
    assert outliers(score).nonzero().flatten().tolist() == wanted


# -- ToMe -------------------------------------------------------------------------------------------------------------


def merged_in_rounds(features: Tensor, k: int) -> list[int]:
    """Bipartite matching, word by word: where each token goes."""
    groups = {i: [i] for i in range(len(features))}
    while len(groups) > k:
        mean = {i: features[own].mean(0) for i, own in groups.items()}
        a, b = sorted(groups)[::2], sorted(groups)[1::2]
        edges = []
        for i in a:
            cosine = {j: float(torch.cosine_similarity(mean[i], mean[j], dim=0)) for j in b}
            j = max(b, key=lambda j: (cosine[j], -j))
            edges.append((-cosine[j], i, j))
        for _, i, j in sorted(edges)[: min(len(a) + len(b) - k, len(groups) // 2)]:
            groups[j] += groups.pop(i)
    place = {i: slot for slot, own in groups.items() for i in own}
    return [place[i] for i in range(len(features))]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "k"), [(2, 1), (3, 1), (9, 8), (9, 4), (25, 3), (40, 1)])
def test_tome_is_bipartite_matching_in_rounds(n: int, k: int, seed: int) -> None:
    features = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    place = match(features, torch.ones(n, dtype=torch.float64), k).tolist()
    assert len(set(place)) == k and place == merged_in_rounds(features, k)


def test_tome_by_hand() -> None:
    """A: 0, 2. B: 1, 3. The best match is 2 with 3; what is merged is their mean, of size 2."""
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.0, 2.0]])
    found = ToMe().select(image(4, features=features), 3)
    assert found.keep.tolist() == [0, 1, 3]
    torch.testing.assert_close(found.bias, torch.tensor([1.0, 1, 2]).log())
    torch.testing.assert_close(found.merged(features)[found.keep][2], torch.tensor([0.0, 1.5]))
    sized = image(4, features=features, merged_sizes=torch.tensor([1.0, 1, 3, 1]))
    torch.testing.assert_close(ToMe().select(sized, 3).merged(features)[3], torch.tensor([0.0, 1.25]))


# -- EVS --------------------------------------------------------------------------------------------------------------


def test_evs_by_hand() -> None:
    """Two tokens a frame: the first frame, then what changed most. Less than the first frame lies on a grid."""
    up, right = [0.0, 1.0], [1.0, 0.0]
    features = torch.tensor([up, right, up, up, up, [0.5, 1.0]])
    shown = ImageTokens(n=6, raster=torch.arange(6), grids=(Grid(3, 1, 2),), features=features)
    assert EVS().select(shown, 3).keep.tolist() == [0, 1, 3]
    assert EVS().select(shown, 4).keep.tolist() == [0, 1, 3, 5]
    still = ImageTokens(
        n=9, raster=torch.arange(9), grids=(Grid(1, 3, 3),), features=torch.randn(9, 2).abs() + 0.1
    )
    assert EVS().select(still, 4).keep.tolist() == tokenprune.methods.Uniform().select(still, 4).keep.tolist()
    # What stands behind a place that is empty now is new.
    left = torch.tensor([0, 1, 3, 4, 5])
    later = ImageTokens(n=5, raster=left, grids=(Grid(3, 1, 2),), features=features[left])
    assert EVS().select(later, 4).keep.tolist() == [0, 1, 2, 3]


def test_evs_of_a_video() -> None:
    model = tiny.qwen2_5_vl()
    inputs = tiny.inputs(model, [["text:3", "video", "text:4"], ["text:2", "image", "text:3"]])
    assert judge.prefill_difference(model, inputs, method="evs", keep=0.5) <= judge.TOLERANCE


# -- Relevance --------------------------------------------------------------------------------------------------------


def test_relevance_by_hand() -> None:
    features = torch.tensor([[1.0, 5.0], [-1.0, 5.0], [0.0, 6.0], [0.0, 4.0]])  # mean (0, 5)
    words = torch.tensor([[9.0, 9.0], [1.0, 0.0], [1.0, 2.0], [7.0, -7.0]])  # of those that ask: (1, 1)
    text = Text(torch.arange(4), words=words, behind=3)
    shown = image(4, features=features, prompt=text)
    found = Relevance(even=0.0, skip_last=1).score(shown)
    torch.testing.assert_close(found, torch.tensor([0.0, 0, 1, 1]))  # words point up and down
    found = Relevance(even=0.0, skip_last=1, pooling="mean", centred=False).score(shown)
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (features, words[1:3])]
    torch.testing.assert_close(found, (unit[0] @ unit[1].T).mean(1))
    with pytest.raises(tokenprune.ConfigError, match="skip_last"):
        Relevance(skip_last=-1)


# -- Merge ------------------------------------------------------------------------------------------------------------


def test_merge_by_hand() -> None:
    """At a later cut tokens count by how many they stand for, and go into the two most like them."""
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.1]])
    sizes = torch.tensor([2.0, 1.0, 3.0, 4.0])
    shown = ImageTokens(
        n=4, raster=torch.arange(4), grids=(Grid(1, 1, 4),), cut=1, features=features, merged_sizes=sizes
    )
    found = Merge("uniform", beta=2.0).select(shown, 2)
    keep = found.keep.tolist()
    gone = [i for i in range(4) if i not in keep]
    unit = torch.nn.functional.normalize(features, dim=1)
    states = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    mass, total = {i: float(sizes[i]) for i in keep}, {i: sizes[i] * states[i] for i in keep}
    for i in gone:
        taken = (2.0 * unit[i] @ unit[keep].T).softmax(0) * sizes[i]
        for j, part in zip(keep, taken, strict=True):
            mass[j], total[j] = mass[j] + float(part), total[j] + part * states[i]
    wanted = torch.stack([total[i] / mass[i] for i in keep])
    torch.testing.assert_close(found.merged(states)[keep], wanted)
    torch.testing.assert_close(found.bias, torch.tensor([mass[i] for i in keep]).log())
    for wrong in ({"of": "restore"}, {"of": "none such"}, {"beta": -1.0}, {"size_term": "no"}):
        with pytest.raises(tokenprune.ConfigError):
            Merge(**wrong)


# -- Restore ----------------------------------------------------------------------------------------------------------


def test_restore_by_hand() -> None:
    """With logits that are all alike, the image gets what it would have got whole."""
    shown = image(6, features=torch.randn(6, 4))
    found = Restore("uniform").select(shown, 2)
    torch.testing.assert_close(found.bias, torch.tensor([3.0, 3.0]).log())
    text = torch.zeros(5)
    whole = torch.cat([text, torch.zeros(6)]).softmax(0)[5:].sum()
    left = torch.cat([text, found.bias]).softmax(0)[5:].sum()
    torch.testing.assert_close(left, whole)
    torch.testing.assert_close(Restore("uniform", strength=0.0).select(shown, 2).bias, torch.zeros(2))
    # What merging already counts is not given twice.
    torch.testing.assert_close(Restore("tome").select(shown, 2).bias, ToMe().select(shown, 2).bias)
    for wrong in ({"of": "restore"}, {"strength": -1.0}):
        with pytest.raises(tokenprune.ConfigError):
            Restore(**wrong)


# -- Question ---------------------------------------------------------------------------------------------------------


def test_question_takes_off_what_the_template_attends_to() -> None:
    """Two tokens ask, one is the template's; of the image's keys the last is a sink."""
    key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])[:, None]
    query = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [3.0, 0.0]])[:, None]
    text = Text(torch.arange(4), query=query, behind=3, scale=1.0)
    shown = image(3, key=key, hidden=torch.tensor([[1.0], [1.0], [50.0]]), prompt=text)
    asks = [torch.tensor(row).softmax(0) for row in ([1.0, 0, 2], [0.0, 1, 2])]
    template = torch.tensor([3.0, 0, 6]).softmax(0)
    found = Question(skip_last=1, baseline=0.5, sinks=10.0).score(shown)
    torch.testing.assert_close(found[:2], ((asks[0] + asks[1]) / 2 - 0.5 * template)[:2])
    assert found[2] == -torch.inf
    with pytest.raises(tokenprune.ConfigError, match="skip_last"):
        Question(baseline=0.5)


# -- every method, at the sizes of released models ---------------------------------------------------------------------

GEOMETRIES = {
    "LLaVA-1.5": (Grid(1, 24, 24),),
    "Qwen2.5-VL": (Grid(1, 26, 37, 2),),
    "video": (Grid(4, 9, 13, 2),),
}


@pytest.mark.parametrize("share", [0.02, 0.11, 0.5, 0.99])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", sorted(set(ALL) - {"none", "random"}))
def test_what_is_kept_at_released_sizes(name: str, geometry: str, share: float) -> None:
    """Exactly k, in order, each once; merges go to what is kept; nothing is nan."""
    generator = torch.Generator().manual_seed(0)
    grids = GEOMETRIES[geometry]
    n = sum(grid.tokens for grid in grids)
    k = max(1, round(share * n))

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    method = ALL[name]()
    vision = method.needs().vision
    patches = VisionAttention(drawn(2, n, 8), drawn(2, n, 8), 0.3, has_cls=False)
    shown = ImageTokens(
        n=n,
        raster=torch.arange(n),
        grids=grids,
        num_heads=4,
        query=drawn(n, 4, 8),
        key=drawn(n, 2, 8),
        value=drawn(n, 2, 8),
        hidden=drawn(n, 32),
        features=drawn(n, 32),
        vision=None if vision is None else vision(patches),
        pixels=drawn(n),
        last_row=drawn(4, n).softmax(-1),
        prompt=Text(
            torch.arange(9),
            query=drawn(9, 4, 8),
            key=drawn(9, 2, 8),
            value=drawn(9, 2, 8),
            hidden=drawn(9, 32),
            words=drawn(9, 32),
            behind=6,
            scale=0.3,
        ),
    )
    found = method.select(shown, k)
    assert found.keep.tolist() == sorted(set(found.keep.tolist())) and len(found.keep) == k
    assert int(found.keep[0]) >= 0 and int(found.keep[-1]) < n
    if found.merges is not None:
        assert found.weights is not None and found.weights.isfinite().all()
        assert set(found.merges[:, 1].tolist()) <= set(found.keep.tolist())
    assert found.bias is None or (found.bias.isfinite().all() and len(found.bias) == k)
