"""Vision-attention rows offered to methods: equal to eager attention, and in the right tokens' hands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig
from transformers.models.llama4.modeling_llama4 import pixel_shuffle
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

import judge
import tiny
import tokenprune
from test_generation import OLD
from test_sync import Largest, refusing
from tiny.anyres import SIDE, grid
from tokenprune.methods import ImageTokens, Needs, ScoreMethod, VisionAttention
from tokenprune.runtime import tower

FAMILIES = (
    *("llava", "vipllava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    *("internvl", "idefics3", "smolvlm", "gemma3", "paligemma", "llama4"),
    *("qwen3_5", "glm4v", "mistral3", "gemma4", "paddleocr_vl", "kimi_k25"),
)
ROWS = (["image", "text:3"], ["text:2", "image", "image", "text:4"])
VIDEO = (["text:2", "video", "text:3"], *ROWS)

# The layer whose output becomes the features, where it is not the last. VipLLaVA: the last listed, hidden_states[1].
LAYER = {"llava": -2, "llava_next": -2, "vipllava": 0}


@dataclass(frozen=True)
class Attention(ScoreMethod):
    """Keeps what CLS attends to, or what receives the most attention."""

    name: ClassVar[str] = "attention"
    cls: bool = True

    def needs(self) -> Needs:
        return Needs(vision=VisionAttention.cls_row if self.cls else VisionAttention.received)

    def score(self, image: ImageTokens) -> Tensor:
        assert image.vision is not None
        return image.vision


@dataclass(frozen=True)
class Watching(Attention):
    """Remembers what it was shown."""

    seen: ClassVar[list[VisionAttention]] = []
    scores: ClassVar[list[Tensor]] = []

    def needs(self) -> Needs:
        return Needs(vision=self.look)

    def look(self, attention: VisionAttention) -> Tensor:
        self.seen.append(attention)
        return attention.received()

    def score(self, image: ImageTokens) -> Tensor:
        assert image.vision is not None
        self.scores.append(image.vision)
        return image.vision


# -- what the stock model says ------------------------------------------------------------------------------------


def tower_of(model: Any) -> nn.Module:
    base = getattr(model, "model", model)
    names = ("vision_tower", "visual", "vision_model")
    return next(getattr(base, name) for name in names if hasattr(base, name))


def eager_maps(
    model: Any, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, layer: int
) -> list[Tensor]:
    """(heads, m, m) of each picture: what the stock tower computes with attn_implementation="eager"."""
    inside = set(tower_of(model).modules())
    made: dict[nn.Module, list[Tensor]] = {}

    def recording(stock: Callable[..., Any]) -> Callable[..., Any]:
        def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output, weights = stock(module, *args, **kwargs)
            if module in inside:
                made.setdefault(module, []).extend(weights)
            return output, weights

        return attend

    with monkeypatch.context() as patch, torch.no_grad():
        for module in {sys.modules[type(m).__module__] for m in inside}:
            for name in ("eager_attention_forward", "vision_eager_attention_forward"):
                if hasattr(module, name):
                    patch.setattr(module, name, recording(getattr(module, name)))
        model(**inputs)
    maps = list(made.values())[layer]
    if model.config.model_type == "llama4":  # CLS comes last
        maps = [m.roll((1, 1), (1, 2)) for m in maps]
    if model.config.model_type in ("mistral3", "gemma4"):
        maps = _one_by_one(model, inputs, maps)
    if model.config.model_type == "qwen2_5_vl":
        maps = [m for grids in _grids(inputs) for m in _in_token_order(model, grids, maps)]
    return maps


def _shapes(model: Any, inputs: dict[str, Any]) -> list[list[int]]:
    """Frames, rows and columns of patches of each picture, in the order the tower is given them."""
    if model.config.model_type == "mistral3":
        patch = model.config.vision_config.patch_size
        return [[1, *(size // patch).tolist()] for size in inputs["image_sizes"]]
    if model.config.model_type == "gemma4":
        names = ("image_position_ids", "video_position_ids")
        places = [own for name in names if name in inputs for own in inputs[name].flatten(0, -3)]
        return [[1, *(own.amax(0).flip(0) + 1).tolist()] for own in places]
    return [grid for grids in _grids(inputs) for grid in grids.tolist()]


def _one_by_one(model: Any, inputs: dict[str, Any], maps: list[Tensor]) -> list[Tensor]:
    """Of pictures that stand in one sequence, or are padded."""
    counts = [h * w for _, h, w in _shapes(model, inputs)]
    if model.config.model_type == "gemma4":
        return [m[:, :n, :n] for m, n in zip(maps, counts, strict=True)]
    (whole,) = maps
    rows = whole.split(counts, dim=1)
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [m[:, :, a : a + n] for m, a, n in zip(rows, starts, counts, strict=True)]


def _grids(inputs: dict[str, Any]) -> Iterator[Tensor]:
    """Of the tower's calls."""
    return (inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs)


def _in_token_order(model: Any, grids: Tensor, maps: list[Tensor]) -> Iterator[Tensor]:
    """Sort out the windows; takes the maps of these frames off the list."""
    vision = model.config.vision_config
    merge = vision.spatial_merge_size
    for t, h, w in grids.tolist():
        for _ in range(t):
            frame = torch.tensor([[1, h, w]])
            windows, _ = get_vision_window_index(frame, merge, vision.window_size, vision.patch_size)
            order = (windows[:, None] * merge**2 + torch.arange(merge**2)).flatten().argsort()
            yield maps.pop(0)[:, order][:, :, order]


def received(maps: Tensor, cls: bool) -> Tensor:
    """Mean over heads, and over the rows of real patches."""
    mean = maps.mean(0)[int(cls) :, int(cls) :]
    return mean[mean.sum(0) > 0].mean(0)


def tokens(model: Any, inputs: dict[str, Any], patches: list[Tensor]) -> dict[int, Tensor]:
    """By placeholder: each token's mean over the patches it is made of, worked out family by family."""
    config = model.config
    kind = config.model_type
    if kind in ("mistral3", "gemma4", "paddleocr_vl", "kimi_k25"):
        return _raster_tokens(model, inputs, patches)
    if kind.startswith(("qwen", "glm")):
        calls = dict(zip((tiny.IMAGE, tiny.VIDEO), _grids(inputs), strict=False))
        return {token: _qwen_tokens(config, grids, patches) for token, grids in calls.items()}
    if kind in ("llava", "vipllava", "paligemma"):
        return {tiny.IMAGE: torch.cat(patches)}
    if kind in ("llava_next", "llava_onevision"):
        return _anyres_tokens(model, inputs, patches)
    if kind == "gemma3":
        side = int(len(patches[0]) ** 0.5)
        pool = model.model.multi_modal_projector.avg_pool
        return {tiny.IMAGE: torch.cat([pool(p.view(1, 1, side, side)).flatten() for p in patches])}
    # The patches of each token, by sending their numbers through the model's own shuffle.
    number = torch.arange(len(patches[0]))[None, :, None]
    if kind == "internvl":
        side = int(number.shape[1] ** 0.5)
        members = model.model.pixel_shuffle(number.view(1, side, side, 1), config.downsample_ratio).flatten(
            1, 2
        )
    elif kind == "llama4":
        members = pixel_shuffle(number, config.vision_config.pixel_shuffle_ratio)
    else:
        members = model.model.connector.pixel_shuffle(number, config.scale_factor)
    return {tiny.IMAGE: torch.cat([p[members[0]].mean(1) for p in patches])}


def _qwen_tokens(config: Any, grids: Tensor, patches: list[Tensor]) -> Tensor:
    """By the place each patch has in its frame; takes the patches of these frames off the list."""
    merge, found = config.vision_config.spatial_merge_size, []
    for t, h, w in grids.tolist():
        row, column = (get_vision_position_ids(torch.tensor([[1, h, w]]), merge) // merge).T
        index = row * (w // merge) + column
        for _ in range(t):
            total = torch.zeros(h * w // merge**2).index_add_(0, index, patches.pop(0))
            found.append(total / merge**2)
    return torch.cat(found)


def _raster_tokens(model: Any, inputs: dict[str, Any], patches: list[Tensor]) -> dict[int, Tensor]:
    """Squares of patches; a video's frames are averaged by Kimi, and pictures of their own to Gemma 4."""
    pixels = "image_position_ids" if "image_position_ids" in inputs else "image_grid_thw"
    images = len(inputs.get(pixels, patches))
    found: dict[int, list[Tensor]] = {tiny.IMAGE: [], tiny.VIDEO: []}
    for i, ((_, h, w), own) in enumerate(zip(_shapes(model, inputs), patches, strict=True)):
        squares = own.view(-1, h // 2, 2, w // 2, 2).mean((0, 2, 4)).flatten()
        found[tiny.IMAGE if i < images else tiny.VIDEO].append(squares)
    return {token: torch.cat(own) for token, own in found.items() if own}


def _anyres_tokens(model: Any, inputs: dict[str, Any], patches: list[Tensor]) -> dict[int, Tensor]:
    """Lay the tiles out as a picture, take its centre, shrink it."""
    counts = inputs.get("batch_num_images", torch.ones(len(inputs["image_sizes"]), dtype=torch.long))
    alone = counts.repeat_interleave(counts) == 1
    found = []
    for (height, width), tiled in zip(inputs["image_sizes"].tolist(), alone.tolist(), strict=True):
        found.append(patches.pop(0))
        if not tiled:
            continue
        across, down = (
            1 if edge <= SIDE * 4 else 2 for edge in (width, height)
        )  # the tiny models' best resolutions
        if across == down == 1:
            across = down = 2
        tiles = [[patches.pop(0).view(SIDE, SIDE) for _ in range(across)] for _ in range(down)]
        canvas = torch.cat([torch.cat(row, 1) for row in tiles])
        rows, columns = canvas.shape
        if width / height > columns / rows:
            cut = (rows - round(height * columns / width)) // 2
            canvas = canvas[cut : rows - cut]
        else:
            cut = (columns - round(width * rows / height)) // 2
            canvas = canvas[:, cut : columns - cut]
        shape = grid(model.config, height, width)
        if canvas.shape != shape:
            canvas = F.interpolate(canvas[None, None], shape, mode="bilinear")[0, 0]
        found.append(canvas.flatten())
    result = {tiny.IMAGE: torch.cat(found)}
    if patches:  # frames of videos
        half = ((SIDE + 1) // 2,) * 2
        frames = [F.interpolate(p.view(1, 1, SIDE, SIDE), half, mode="bilinear") for p in patches]
        result[tiny.VIDEO] = torch.cat([frame.flatten() for frame in frames])
    return result


def expected_scores(
    model: Any, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, layer: int
) -> list[list[Tensor]]:
    """[row][image]: the attention each token receives, from the stock model's own maps."""
    maps = eager_maps(model, inputs, monkeypatch, layer)
    cls = model.config.model_type in ("llava", "vipllava", "llava_next", "internvl", "llama4")
    found = tokens(model, inputs, [received(m, cls) for m in maps])
    result = []
    for ids, images in zip(inputs["input_ids"], tiny.visual_positions(model, inputs), strict=True):
        result.append([])
        for columns in images:
            token = int(ids[columns[0]])
            result[-1].append(found[token][: len(columns)])
            found[token] = found[token][len(columns) :]
    assert not any(len(left) for left in found.values())
    return result


def best(scores: list[list[Tensor]], lists: Any) -> list[list[list[int]]]:
    """The tokens of largest score, as many as were kept."""
    return [
        [
            s.sort(descending=True, stable=True).indices[: len(kept)].sort().values.tolist()
            for s, kept in zip(*row, strict=True)
        ]
        for row in zip(scores, lists, strict=True)
    ]


def make(family: str, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    model = tiny.build(family, **kwargs)
    try:
        return model, tiny.inputs(model, VIDEO)
    except ValueError:  # no videos
        return model, tiny.inputs(model, ROWS)


# -- every family -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attention", "tolerance"), [("eager", 1e-6), ("sdpa", 2e-6)])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_tokens(
    family: str, attention: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every probability of every picture, and every token's share of them.

    With sdpa the layers before round differently.
    """
    model, inputs = make(family, attn_implementation=attention)
    Watching.seen.clear()
    Watching.scores.clear()
    with tokenprune.pruned(model, Watching(), layer=0, keep=0.5, budget="after_cut"), torch.no_grad():
        model(**inputs)
    stock, layer = tiny.build(family, attn_implementation="eager"), LAYER.get(family, -1)
    maps = eager_maps(stock, inputs, monkeypatch, layer)
    assert len(maps) == len(Watching.seen)
    for own, m in zip(Watching.seen, maps, strict=True):
        rows = own.rows(torch.arange(m.shape[1]))
        torch.testing.assert_close(rows, m, atol=tolerance, rtol=0)
    scores = [score for row in expected_scores(stock, inputs, monkeypatch, layer) for score in row]
    assert len(scores) == len(Watching.scores)
    for own, score in zip(Watching.scores, scores, strict=True):
        torch.testing.assert_close(own, score, atol=tolerance, rtol=0)


@pytest.mark.parametrize("how", ["forward", "generate", "beams"])
@pytest.mark.parametrize("cuts", [[(0, 0.6)], [(1, 0.7), (3, 0.4)]], ids=["before", "two"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keeps_the_same(family: str, cuts: Any, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a forward, in generate() (which may encode ahead), with beams, and after an earlier cut."""
    if how == "beams" and family in ("glm4v", "gemma4"):
        pytest.skip("the stock model's generate() repeats a row's images one by one")
    if how == "beams" and OLD and not family.startswith("qwen"):
        pytest.skip("this version's generate() repeats images one by one")
    if how == "beams" and family == "llama4":
        pytest.skip("the stock model's generate() gives the beams too few features")
    model, inputs = make(family)
    with tokenprune.pruned(model, Attention(cls=False), cuts=cuts), torch.no_grad():
        if how == "forward":
            model(**inputs)
        else:
            beams = 2 if how == "beams" else 1
            model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=beams)
        lists = tokenprune.report(model).keep_lists
    if how == "beams":
        assert [kept[::2] for kept in lists] == [kept[1::2] for kept in lists]
        lists = [kept[::2] for kept in lists]
    stock = tiny.build(family, attn_implementation="eager")
    scores = expected_scores(stock, inputs, monkeypatch, LAYER.get(family, -1))
    assert len(lists) == len(cuts)
    for kept in lists:
        assert kept == best(scores, kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_waits_for_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract 21: nothing is copied to the host inside hooks, and of sizes no copy is made that is there already."""
    model, inputs = make(family)
    known = []
    stock = tower.sizes_on_host

    def watched(sizes: Tensor, own: Any) -> Any:
        known.append(any(given is sizes for given, _ in own))
        return stock(sizes, own)

    monkeypatch.setattr(tower, "sizes_on_host", watched)
    names = ("_enter_vision", "_catch_vision", "_enter_text_model", "_enter_layer")
    with refusing(monkeypatch, *names) as ran, torch.no_grad():
        with tokenprune.pruned(model, Attention(cls=False), cuts=[(0, 0.6), (1, 0.3)]):
            model(**inputs)
    assert set(names) <= set(ran)
    # Gemma 4's tower is given places, not sizes: they are copied once.
    packed = family.startswith(("qwen", "glm", "mistral3", "paddle", "kimi", "gemma4"))
    calls = sum(name in inputs for name in ("pixel_values", "pixel_values_videos")) if packed else 0
    assert known == [family != "gemma4"] * calls


# -- towers of their own kind -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [True, False], ids=["cls", "received"])
def test_cls_row(cls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower with a CLS token offers both scores."""
    model = tiny.llava()
    inputs = tiny.inputs(model, ROWS, pad="left")
    with (
        tokenprune.pruned(model, Attention(cls=cls), layer=2, keep=7, budget="after_cut"),
        torch.no_grad(),
    ):
        model(**inputs)
        lists = tokenprune.report(model).keep_lists[0]
    maps = eager_maps(tiny.llava(attn_implementation="eager"), inputs, monkeypatch, -2)
    scores = [m.mean(0)[0, 1:] if cls else m.mean(0)[1:, 1:].mean(0) for m in maps]
    assert lists == best([scores[:1], scores[1:]], lists)


def test_llama4_cls_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its CLS token is the last of the tower's tokens."""
    model = tiny.llama4()
    inputs = tiny.inputs(model, (["text:2", "image:1x1", "text:3"],))
    with tokenprune.pruned(model, Attention(), layer=1, keep=4, budget="after_cut"), torch.no_grad():
        model(**inputs)
        lists = tokenprune.report(model).keep_lists[0]
    made = eager_maps(tiny.llama4(attn_implementation="eager"), inputs, monkeypatch, -1)
    score = tokens(model, inputs, [made[0].mean(0)[0, 1:]])[tiny.IMAGE]
    assert lists == best([[score]], lists)


def test_tower_without_cls(monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP: every patch is a token, and there is no CLS row to read."""
    model, stock = siglip_llava(), siglip_llava()
    stock.set_attn_implementation("eager")
    inputs = {
        "input_ids": torch.tensor([[11, *[tiny.IMAGE] * 25, 12, 13]]),
        "pixel_values": torch.randn(1, 3, 20, 20),
    }
    with tokenprune.pruned(model, Attention(cls=False), layer=1, keep=6, budget="after_cut"), torch.no_grad():
        model(**inputs)
        kept = tokenprune.report(model).keep_lists[0]
    (score,) = eager_maps(stock, inputs, monkeypatch, -2)
    assert kept == best([[score.mean(0).mean(0)]], kept)
    with (
        pytest.raises(tokenprune.ConfigError, match="no CLS token"),
        tokenprune.pruned(model, Attention(), layer=1, keep=6, budget="after_cut"),
        torch.no_grad(),
    ):
        model(**inputs)


def siglip_llava() -> Any:
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=20,
        patch_size=4,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=tiny.llava().config.text_config,
        image_token_index=tiny.IMAGE,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def test_windowed_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2.5-VL, its last layer made a windowed one: the last that attends to whole frames is used."""

    def build(attn: str) -> Any:
        model = tiny.qwen2_5_vl(vision_layers=3, attn_implementation=attn)
        model.model.visual.fullatt_block_indexes = [0, 1]
        return model

    model, stock = build("sdpa"), build("eager")
    inputs = tiny.inputs(model, VIDEO)
    with tokenprune.pruned(model, Attention(cls=False), layer=1, keep=0.5), torch.no_grad():
        model(**inputs)
        kept = tokenprune.report(model).keep_lists[0]
    assert kept == best(expected_scores(stock, inputs, monkeypatch, 1), kept)


def test_normed_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """InternVL's towers may norm queries and keys."""

    def build(attn: str) -> Any:
        model = tiny.internvl(attn_implementation=attn)
        norm = type(model.model.vision_tower.encoder.layer[0].attention.q_norm)
        assert norm is nn.Identity
        for layer in model.model.vision_tower.encoder.layer:
            layer.attention.q_norm, layer.attention.k_norm = nn.RMSNorm(32), nn.RMSNorm(32)
        return model

    model = build("sdpa")
    inputs = tiny.inputs(model, ROWS)
    with tokenprune.pruned(model, Attention(cls=False), layer=1, keep=0.5), torch.no_grad():
        model(**inputs)
        kept = tokenprune.report(model).keep_lists[0]
    assert kept == best(expected_scores(build("eager"), inputs, monkeypatch, -1), kept)


def test_padding_gets_nothing() -> None:
    """Idefics3: patches of padding neither give nor receive attention, and are pruned first."""
    model = tiny.idefics3()
    inputs = tiny.inputs(model, (["text:2", "image:1x1", "text:3"],))
    Watching.seen.clear()
    with tokenprune.pruned(model, Watching(), layer=1, keep=6, budget="after_cut"), torch.no_grad():
        model(**inputs)
        kept = tokenprune.report(model).keep_lists[0][0][0]
    (own,) = Watching.seen
    assert (
        own.real is not None and int((~own.real).sum()) == 12
    )  # 8 of 24 columns of pixels: 2 of 6 of patches
    assert not own.rows(torch.arange(36))[..., ~own.real].any()
    assert kept == [0, 1, 3, 4, 6, 7]


# -- refusals and arithmetic ----------------------------------------------------------------------------------------


def test_refuses_by_name() -> None:
    model = tiny.qwen2_5_vl()
    model.model.visual.fullatt_block_indexes = []
    with pytest.raises(tokenprune.UnsupportedModelError, match=r"qwen2_5_vl.*within windows"):
        tokenprune.wrap(model, Attention(), layer=1, keep=0.5)
    model = tiny.llava()
    model.model.vision_tower = nn.Identity()
    with pytest.raises(tokenprune.UnsupportedModelError, match="llava models with a Identity"):
        tokenprune.wrap(model, Attention(), layer=1, keep=0.5)
    model = tiny.llava()
    model.config.vision_feature_layer = 0
    with pytest.raises(tokenprune.UnsupportedModelError, match="no attention"):
        tokenprune.wrap(model, Attention(), layer=1, keep=0.5)


def test_received_sums_to_one() -> None:
    """Each of the n rows sums to 1, so the mean received attention does as well, whatever the chunk."""
    attention = VisionAttention(torch.randn(3, 50, 8), torch.randn(3, 50, 8), 8**-0.5, has_cls=False)
    torch.testing.assert_close(attention.received().sum(), torch.tensor(1.0))
    torch.testing.assert_close(attention.received(), attention.received(chunk=7))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_makes_no_square_map(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract 22: with 1,024 patches nothing is made that has n x n elements."""
    model = tiny.llava(side=32, layers=3) if family == "llava" else tiny.qwen2_vl(layers=3)
    inputs = tiny.inputs(model, (["text:2", "image" if family == "llava" else "image:16x16", "text:2"],))
    largest = Largest()
    original = tower.TowerTap._catch_vision

    def watched(self: Any, *args: Any) -> Any:
        with largest:
            return original(self, *args)

    monkeypatch.setattr(tower.TowerTap, "_catch_vision", watched)
    monkeypatch.setattr(
        VisionAttention, "cls_row", lambda own: own.rows(torch.zeros(1).long())[:, 0].mean(0)[-1024:]
    )
    with tokenprune.pruned(model, Attention(), layer=1, keep=0.5), torch.no_grad():
        model(**inputs)
    assert 0 < largest.elements < 1024 * 1024 // 4


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_onevision"])
def test_pruning_by_vision_matches_the_oracle(family: str) -> None:
    model = tiny.build(family)
    for layer in (0, 2):
        inputs = tiny.inputs(model, ROWS, pad="right")
        method = Attention(cls=False)
        assert (
            judge.prefill_difference(model, inputs, method=method, layer=layer, keep=0.5) <= judge.TOLERANCE
        )


@pytest.mark.parametrize("how", ["forward", "generate"])
def test_frames_that_are_pictures_to_the_tower(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GLM-4V: a call of videos alone, whose frames the tower is given one by one."""
    model = tiny.build("glm4v")
    inputs = tiny.inputs(model, [["text:2", "video", "text:3"], ["video", "text:4", "video", "text:2"]])
    with tokenprune.pruned(model, Attention(cls=False), cuts=[(0, 0.6), (2, 0.3)]), torch.no_grad():
        if how == "forward":
            model(**inputs)
        else:
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        lists = tokenprune.report(model).keep_lists
    stock = tiny.build("glm4v", attn_implementation="eager")
    scores = expected_scores(stock, inputs, monkeypatch, -1)
    for kept in lists:
        assert kept == best(scores, kept)
