"""The oracle is judged here: against stock forwards, and against tokens that are physically gone.

Nothing of the library under test is imported. `physical` below is the plainest pruning there is (one row, a
loop over stock layers, index_select); it shares no code with the oracle.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import judge
import limits
import oracle
import tiny

ROWS = [["text:5", "image", "text:3", "image", "text:4"], ["text:3", "image", "text:6"], ["text:7"]]
ONE = [["text:5", "image", "text:3", "image", "image", "text:4"]]
VIDEOS = [
    ["text:3", "video", "text:2", "image", "text:4"],
    ["text:4"],
    ["video", "text:3", "image", "text:2"],
]
FAMILIES = list(tiny.FAMILIES)
WITH_VIDEOS = ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl", "smolvlm"]
TWO = ["llava", "qwen2_5_vl"]
WINDOWS = [
    "llava_mistral",
    "llava_qwen2",
    "llava_qwen3",
    "llava_onevision",
    "qwen2_vl",
    "gemma3",
    "gemma4",
    "llama4",
]

build = tiny.build


def each(images: list, videos: list, families: list[str] = FAMILIES) -> pytest.MarkDecorator:
    """Every family with rows of images, and again with rows of videos where it has them."""
    cases = [pytest.param(f, images, id=f) for f in families]
    cases += [pytest.param(f, videos, id=f"{f}-videos") for f in families if f in WITH_VIDEOS]
    return pytest.mark.parametrize(("family", "rows"), cases)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def near(model: Any) -> float:
    """1e-5; of hybrids see `judge.tolerance`, and Mistral 3's and Gemma 4's states are larger."""
    own = judge.tolerance(model)
    return (
        own if own > judge.TOLERANCE else 5e-5 if model.config.model_type in ("mistral3", "gemma4") else 1e-5
    )


def stock(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def generate(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
    kwargs = {"max_new_tokens": 6, "do_sample": False, **kwargs}
    return model.generate(**inputs, **kwargs, return_dict_in_generate=True, output_logits=True)


# -- what physically dropped tokens give -----------------------------------------------------------


def text_model(model: Any) -> Any:
    inner = getattr(model, "model", model.language_model if hasattr(model, "language_model") else None)
    for name in ("language_model", "text_model", "model"):
        if hasattr(inner, name):
            return getattr(inner, name)
    raise AssertionError(type(model))


def captured(model: Any, inputs: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What a stock forward hands to each layer (its states under "states"), and to its text model."""
    calls: list[dict[str, Any]] = []
    outer: dict[str, Any] = {}
    text = text_model(model)
    handles = [text.register_forward_pre_hook(lambda _m, _a, kw: outer.update(kw), with_kwargs=True)]
    for layer in text.layers:
        handles.append(
            layer.register_forward_pre_hook(
                lambda _m, a, kw: calls.append({**kw, "states": a[0]}), with_kwargs=True
            )
        )
    try:
        stock(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls, outer


def entering(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings with the images in place, and position ids."""
    _, seen = captured(model, inputs)
    embeds, positions = seen["inputs_embeds"], seen.get("position_ids")
    return embeds, torch.arange(embeds.shape[1])[None] if positions is None else positions


def causal(length: int) -> torch.Tensor:
    above = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.zeros(length, length).masked_fill(above, torch.finfo(torch.float32).min)[None, None]


def with_text(model: Any, inputs: dict[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    """One row with more text behind it; in PaliGemma the suffix."""
    kind = 1 if model.config.model_type == "paligemma" else 0
    out = dict(inputs)
    for name, value in [("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", kind)]:
        if name in inputs:
            more = torch.full_like(ids, value, dtype=inputs[name].dtype)
            out[name] = torch.cat([inputs[name], more], 1)
    out["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    return out


def physical(
    model: Any,
    inputs: dict[str, Any],
    cuts: Any,
    positions: Any,
    merges: Any = None,
    biases: Any = None,
    generated: torch.Tensor | None = None,
    shift: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row, pruned for real, then decoded with a cache: logits, and the input columns they belong to.

    Masks, rotary angles and embeddings are those of a stock forward over the whole row, selected.
    `shift` is a fault to be found: it gives what follows the last image the angles of later columns.
    """
    text = text_model(model)
    length = inputs["input_ids"].shape[1]
    new = torch.zeros(1, 0, dtype=torch.long) if generated is None else generated
    whole = with_text(model, inputs, torch.cat([new, torch.full((1, shift), tiny.FIRST_TEXT_ID)], 1))
    calls, outer = captured(model, whole)
    embeds = calls[0]["states"]
    total = length + new.shape[1]
    order = torch.arange(total)
    order[int(positions[0][-1][-1]) + 1 :] += shift

    def full_mask(call: dict[str, Any]) -> torch.Tensor:
        mask = call["attention_mask"]
        if mask is None:
            return causal(total)[0, 0]
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return mask[0, 0, :total, :total]

    def angles(call: dict[str, Any], columns: torch.Tensor) -> Any:
        given = call["position_embeddings"]
        pick = order[columns]
        return given[:, pick] if isinstance(given, torch.Tensor) else tuple(x[:, pick] for x in given)

    def run(states: torch.Tensor, columns: torch.Tensor, index: int) -> torch.Tensor:
        seen = torch.cat([left[index][0], torch.arange(length, int(columns[-1]) + 1)]).unique()
        added = torch.zeros(total)
        added[left[index][0]] = left[index][1]
        mask = None  # a recurrent layer takes what comes
        if not hasattr(text.layers[index], "linear_attn"):
            mask = (full_mask(calls[index])[columns][:, seen] + added[seen])[None, None]
        # Gemma 4's layers may lend keys to others.
        more = {"shared_kv_states": {}} if "shared_kv_states" in calls[index] else {}
        return text.layers[index](
            states,
            attention_mask=mask,
            position_embeddings=angles(calls[index], columns),
            past_key_values=cache,
            use_cache=True,
            **more,
        )

    states = embeds[:, :length]
    features = []
    for feature in outer.get("deepstack_visual_embeds") or []:
        features.append(torch.zeros_like(embeds))
        features[-1][outer["visual_pos_masks"]] = feature
        features[-1] = features[-1][:, :length]
    columns, added = torch.arange(length), torch.zeros(length)
    by_layer = {layer: (number, keep[0]) for number, (layer, keep) in enumerate(cuts)}
    cache = DynamicCache(config=text.config) if hasattr(text.layers[0], "linear_attn") else DynamicCache()
    left: list[tuple[torch.Tensor, torch.Tensor]] = []
    for index in range(len(text.layers)):
        if index in by_layer:
            number, keep = by_layer[index]
            place = {int(column): i for i, column in enumerate(columns)}
            old, added = [states, *features], added.clone()
            edited = [x.clone() for x in old]
            gone: set[int] = set()
            for image, kept in enumerate(keep):
                where = positions[0][image]
                gone |= {int(c) for c in where} - {int(where[k]) for k in kept}
                if merges is not None:
                    pairs, weights = merges[number][0][image]
                    for slot in pairs[:, 1].unique():
                        for before, after in zip(old, edited, strict=True):
                            after[0, place[int(where[slot])]] = sum(
                                w * before[0, place[int(where[source])]]
                                for (source, to), w in zip(pairs, weights, strict=True)
                                if to == slot
                            )
                if biases is not None:
                    for raster, value in zip(*biases[number][0][image], strict=True):
                        added[place[int(where[raster])]] = value
            select = torch.tensor([i for i, column in enumerate(columns) if int(column) not in gone])
            states, *features = [x.index_select(1, select) for x in edited]
            columns, added = columns[select], added[select]
        left.append((columns, added))
        states = run(states, columns, index)
        if index < len(features):
            states = states + features[index]
    head = model.get_output_embeddings()
    logits = [head(text.norm(states))[0]]
    for column in range(length, total):
        states = embeds[:, column : column + 1]
        for index in range(len(text.layers)):
            states = run(states, torch.tensor([column]), index)
        logits.append(head(text.norm(states))[0])
    return torch.cat(logits).detach(), torch.cat([columns, torch.arange(length, total)])


def some_biases(cuts: Any) -> list:
    """A size term for the first kept tokens of every image, another one at the next cut."""
    return [
        [
            [(kept[: 1 + len(kept) // 2], 0.7 + number + torch.rand(1 + len(kept) // 2)) for kept in row]
            for row in keep
        ]
        for number, (_, keep) in enumerate(cuts)
    ]


# -- without cuts it is the stock model ------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pad", ["left", "right"])
@each(ROWS, VIDEOS)
def test_without_cuts_equals_the_stock_forward(family: str, rows: list, pad: str, attention: str) -> None:
    model = build(family, attn_implementation=attention)
    inputs = tiny.inputs(model, rows, pad=pad)
    out = oracle.masked_forward(model, inputs, [], tiny.visual_positions(model, inputs), output_hidden=True)
    real = inputs["attention_mask"].bool()
    assert difference(out.logits[real], stock(model, inputs)[real]) <= near(model)
    assert torch.isfinite(out.logits).all()
    assert len(out.hidden) == 7
    assert out.alive.equal(real[None].expand(6, -1, -1))
    explicit = oracle.masked_forward(
        model, inputs, [], tiny.visual_positions(model, inputs), positions="generate"
    )
    assert difference(out.logits[real], explicit.logits[real]) <= near(model)  # rotary: only distances count


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@each(ROWS, VIDEOS)
def test_generated_tokens_equal_greedy_search(family: str, attention: str, rows: list) -> None:
    greedy_search_agrees(family, attention, rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generated_tokens_after_text_only(family: str, attention: str) -> None:
    greedy_search_agrees(family, attention, [["text:4"], ["text:6"]])


def greedy_search_agrees(family: str, attention: str, rows: list) -> None:
    model = build(family, attn_implementation=attention)
    inputs = tiny.inputs(model, rows)
    found = generate(model, inputs)
    new = found.sequences[:, inputs["input_ids"].shape[1] :]
    out = oracle.masked_forward(model, inputs, [], tiny.visual_positions(model, inputs), generated=new)
    assert difference(out.steps(), torch.stack(found.logits, 1)) <= judge.tolerance(model)
    allowed = out.steps().clone()
    allowed[..., : tiny.FIRST_TEXT_ID] = -torch.inf
    assert allowed.argmax(-1).equal(new)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [ROWS[1:2], ROWS], ids=["no padding", "padding"])
@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_without_token_types(family: str, rows: list, attention: str) -> None:
    """Stock is then causal, but PaliGemma's prompt is seen both ways where sdpa gets no mask."""
    model = build(family, attn_implementation=attention)
    inputs = tiny.inputs(model, rows)
    del inputs["token_type_ids"]
    positions = tiny.visual_positions(model, inputs)
    found = generate(model, inputs)
    new = found.sequences[:, inputs["input_ids"].shape[1] :]
    out = oracle.masked_forward(model, inputs, [], positions, generated=new)
    assert difference(out.steps(), torch.stack(found.logits, 1)) <= 1e-4


@pytest.mark.parametrize("family", WINDOWS)
def test_sliding_windows(family: str) -> None:
    model = build(family, sliding_window=12)
    inputs = tiny.inputs(model, ROWS)
    found = generate(model, inputs)
    new = found.sequences[:, inputs["input_ids"].shape[1] :]
    out = oracle.masked_forward(model, inputs, [], tiny.visual_positions(model, inputs), generated=new)
    assert difference(out.steps(), torch.stack(found.logits, 1)) <= 1e-4
    wide = build(family)
    assert difference(out.steps(), torch.stack(generate(wide, inputs).logits, 1)) > 1e-2


@each(ROWS, VIDEOS)
def test_beams(family: str, rows: list) -> None:
    model = build(family)
    inputs = tiny.inputs(model, limits.expandable(model, rows))
    positions = tiny.visual_positions(model, inputs)
    found = generate(model, inputs, num_beams=3, num_return_sequences=2, output_scores=True)
    new = found.sequences[:, inputs["input_ids"].shape[1] :]
    out = oracle.masked_forward(
        model,
        oracle.expand(inputs, 2, positions, tiny.VIDEO),
        [],
        oracle.expand_rows(positions, 2),
        generated=new,
    )
    chosen = out.steps().log_softmax(-1).gather(-1, new[..., None])[..., 0]
    assert difference(chosen.mean(-1), found.sequences_scores) <= 1e-4


@pytest.mark.parametrize("family", TWO)
def test_returned_sequences(family: str) -> None:
    model = build(family)
    inputs = tiny.inputs(model, limits.expandable(model, ROWS))
    positions = tiny.visual_positions(model, inputs)
    torch.manual_seed(0)
    found = generate(model, inputs, do_sample=True, num_return_sequences=3)
    new = found.sequences[:, inputs["input_ids"].shape[1] :]
    out = oracle.masked_forward(
        model, oracle.expand(inputs, 3, positions), [], oracle.expand_rows(positions, 3), generated=new
    )
    assert difference(out.steps(), torch.stack(found.logits, 1)) <= 1e-4


@pytest.mark.parametrize("family", TWO)
def test_prompt_lookup(family: str) -> None:
    model = build(family)
    inputs = tiny.inputs(model, ONE)
    inputs["input_ids"][0, -2:] = inputs["input_ids"][0, :2]  # a bigram to look up
    found = generate(model, inputs, prompt_lookup_num_tokens=3)
    new = found.sequences[:, inputs["input_ids"].shape[1] :]
    out = oracle.masked_forward(model, inputs, [], tiny.visual_positions(model, inputs), generated=new)
    assert difference(out.steps(), torch.stack(found.logits, 1)) <= 1e-4


@pytest.mark.parametrize("second", [["text:6"], ["text:3", "image", "text:2"]], ids=["text", "image"])
@pytest.mark.parametrize("family", TWO)
def test_two_turns_with_a_cache(family: str, second: list[str]) -> None:
    """The second turn of a chat, continued from the returned cache, is one long teacher-forced row."""
    model = build(family)
    first, turn = tiny.inputs(model, [ONE[0], ROWS[1]]), tiny.inputs(model, [second, second], seed=1)
    before = generate(model, first)
    answer = before.sequences[:, first["input_ids"].shape[1] :]
    whole = join(first, answer, turn)
    if family == "qwen2_5_vl" and "image" in second:
        # Stock cannot go on from the cache: positions need the grids of all images, features of the new ones.
        found = generate(model, whole)
    else:
        call = {k: v for k, v in whole.items() if k not in ("pixel_values", "image_grid_thw")}
        call |= {k: turn[k] for k in ("pixel_values",) if k in turn}
        found = generate(model, call | {"past_key_values": before.past_key_values})
    new = found.sequences[:, whole["input_ids"].shape[1] :]
    out = oracle.masked_forward(model, whole, [], tiny.visual_positions(model, whole), generated=new)
    assert difference(out.steps(), torch.stack(found.logits, 1)) <= 1e-4


def join(first: dict[str, Any], answer: torch.Tensor, turn: dict[str, Any]) -> dict[str, Any]:
    """Turn 1, its answer and turn 2 as one prompt. Two rows: the images are put back into the rows' order."""
    out: dict[str, Any] = {}
    for name, middle in [
        ("input_ids", answer),
        ("attention_mask", torch.ones_like(answer)),
        ("mm_token_type_ids", torch.zeros_like(answer)),
    ]:
        if name in first:
            out[name] = torch.cat([first[name], middle.to(first[name].dtype), turn[name]], 1)
    images = 3  # of the first row in turn 1; the second row has one, and each row at most one in turn 2
    for name in ("pixel_values", "image_grid_thw"):
        if name not in first:
            continue
        parts = [images_of(part, name) for part in (first, turn)]
        out[name] = torch.cat(parts[0][:images] + parts[1][:1] + parts[0][images:] + parts[1][1:])
    return out


def images_of(inputs: dict[str, Any], name: str) -> list[torch.Tensor]:
    if name not in inputs:
        return []
    if name == "pixel_values" and "image_grid_thw" in inputs:
        return list(inputs[name].split(inputs["image_grid_thw"].prod(-1).tolist()))
    return list(inputs[name].split(1))


# -- with cuts it is the shortened model -----------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "llava_mistral", "llava_qwen2", "qwen2_5_vl"])
def test_cut_before_the_llm_equals_a_shortened_stock_forward(family: str, attention: str) -> None:
    model = build(family, attn_implementation=attention)
    inputs = tiny.inputs(model, [["text:5", "image", "text:4"]])
    positions = tiny.visual_positions(model, inputs)
    cuts = tiny.random_cuts(positions, [0], [0.4])
    out = oracle.masked_forward(model, inputs, cuts, positions)
    kept = out.alive[-1][0].nonzero().flatten()
    assert len(kept) == inputs["input_ids"].shape[1] - len(positions[0][0]) + len(cuts[0][1][0][0])

    embeds, position_ids = entering(model, inputs)
    # The 4D mask is needed: without a mask and a cache, gaps in the positions are read as packed sequences.
    with torch.no_grad():
        states = model.model.language_model(
            inputs_embeds=embeds[:, kept],
            position_ids=position_ids[..., kept],
            attention_mask=causal(len(kept)),
            use_cache=False,
        ).last_hidden_state
        short = model.lm_head(states)
    assert difference(out.logits[:, kept], short) <= near(model)
    assert difference(out.logits[:, kept], stock(model, inputs)[:, kept]) > 1e-2


@pytest.mark.parametrize("extras", ["", "merges", "biases", "merges biases"])
@pytest.mark.parametrize("layers", [(0,), (3,), (5,), (1, 4), (0, 2, 3)], ids=str)
@pytest.mark.parametrize("family", [*TWO, "qwen3_vl", "qwen3_5"])
def test_cuts_equal_tokens_physically_gone(family: str, layers: tuple[int, ...], extras: str) -> None:
    """Prefill and decode with a cache, against a plain loop over stock layers that selects and shortens."""
    torch.manual_seed(0)
    model = build(family)
    inputs = tiny.inputs(model, ONE)
    positions = tiny.visual_positions(model, inputs)
    cuts = tiny.random_cuts(positions, layers, [0.6, 0.3, 0.1][: len(layers)])
    more: dict[str, Any] = {}
    if "merges" in extras:
        more["merges"] = tiny.random_merges(positions, cuts)
    if "biases" in extras:
        more["biases"] = some_biases(cuts)
    new = torch.randint(tiny.FIRST_TEXT_ID, tiny.VOCAB, (1, 4))
    out = oracle.masked_forward(model, inputs, cuts, positions, generated=new, **more)
    expected, columns = physical(model, inputs, cuts, positions, generated=new, **more)
    assert out.alive[-1][0].nonzero().flatten().equal(columns)
    assert difference(out.logits[0, columns], expected) <= near(model)
    for name in more:  # each of them is felt
        rest = {k: v for k, v in more.items() if k != name}
        without = oracle.masked_forward(model, inputs, cuts, positions, generated=new, **rest)
        assert difference(out.logits[0, columns], without.logits[0, columns]) > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@each(ONE, VIDEOS[:1])
def test_every_family_with_tokens_physically_gone(family: str, rows: list, attention: str) -> None:
    torch.manual_seed(0)
    window = {"sliding_window": 20} if family in WINDOWS else {}
    model = build(family, attn_implementation=attention, **window)
    inputs = tiny.inputs(model, rows)
    positions = tiny.visual_positions(model, inputs)
    cuts = tiny.random_cuts(positions, [0, 1, 4], [0.7, 0.5, 0.2])
    more: dict[str, Any] = {"merges": tiny.random_merges(positions, cuts), "biases": some_biases(cuts)}
    new = torch.randint(tiny.FIRST_TEXT_ID, tiny.VOCAB, (1, 3))
    out = oracle.masked_forward(model, inputs, cuts, positions, generated=new, **more)
    expected, columns = physical(model, inputs, cuts, positions, generated=new, **more)
    assert out.alive[-1][0].nonzero().flatten().equal(columns)
    assert difference(out.logits[0, columns], expected) <= near(model)
    bare = oracle.masked_forward(model, inputs, [], positions, generated=new).logits
    dropped = oracle.masked_forward(model, inputs, cuts, positions, generated=new).logits
    text = columns[columns > int(positions[0][-1][-1])]
    assert difference(bare[0, text], dropped[0, text]) > 1e-3
    for name in more:  # each of them is felt
        rest = {k: v for k, v in more.items() if k != name}
        without = oracle.masked_forward(model, inputs, cuts, positions, generated=new, **rest)
        assert difference(out.logits[0, text], without.logits[0, text]) > 1e-3


@pytest.mark.parametrize("pad", ["left", "right"])
@each(ROWS, VIDEOS)
def test_a_row_equals_its_own_batch_of_one(family: str, rows: list, pad: str) -> None:
    model = build(family)
    inputs = tiny.inputs(model, rows, pad=pad)
    positions = tiny.visual_positions(model, inputs)
    cuts = tiny.random_cuts(positions, [1, 3], [0.5, 0.2])
    merges = tiny.random_merges(positions, cuts)
    out = oracle.masked_forward(model, inputs, cuts, positions, merges)
    for row in range(len(rows)):
        real = inputs["attention_mask"][row].bool()
        single = row_of(inputs, positions, row)
        alone = oracle.masked_forward(
            model,
            single,
            [(layer, [keep[row]]) for layer, keep in cuts],
            tiny.visual_positions(model, single),
            [[per_cut[row]] for per_cut in merges],
        )
        kept = alone.alive[-1][0]
        assert difference(out.logits[row, real][kept], alone.logits[0, kept]) <= near(model)


def row_of(inputs: dict[str, Any], positions: Any, row: int) -> dict[str, Any]:
    out = {}
    for name, value in inputs.items():
        shares = oracle.shares(name, inputs, positions, tiny.VIDEO) or [1] * len(positions)
        part = value.split(shares)[row]
        if value.shape[:2] == inputs["input_ids"].shape:
            out[name] = part[:, inputs["attention_mask"][row].bool()]
        elif len(part) and positions[row]:
            out[name] = part
    return out


def test_sliding_window_counts_original_columns() -> None:
    """All but one token between the text and the end is dropped: the gap stays wider than the window."""
    model = build("llava_mistral", sliding_window=12)
    inputs = tiny.inputs(model, [["text:5", "image", "text:1"]])
    positions = tiny.visual_positions(model, inputs)
    changed = inputs | {"input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, 4] = 10 + changed["input_ids"][0, 4] % 100

    def reaches_the_end(cuts: Any) -> bool:
        a, b = (oracle.masked_forward(model, x, cuts, positions).logits[0, -1] for x in (inputs, changed))
        return not a.equal(b)

    assert reaches_the_end([])  # from window to window, layer by layer
    assert not reaches_the_end([(0, [[[24]]])])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "idefics3", "llama4"])
def test_no_row_sees_a_later_column(family: str) -> None:
    """Nor do padding and dropped rows, which keep their own diagonal where all before them is gone."""
    model = build(family)
    inputs = tiny.inputs(model, [["image", "text:3"], ["text:1", "image", "text:9"]])
    positions = tiny.visual_positions(model, inputs)
    keep = [[list(range(len(image) // 2, len(image))) for image in row] for row in positions]
    changed = inputs | {"input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, -1] = 10 + changed["input_ids"][:, -1] % 100
    a, b = (oracle.masked_forward(model, x, [(0, keep)], positions).logits for x in (inputs, changed))
    assert torch.isfinite(a).all()
    assert difference(a[:, :-1], b[:, :-1]) == 0
    assert difference(a[:, -1], b[:, -1]) > 1e-3


# -- it can fail -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TWO)
def test_faults_are_seen(family: str) -> None:
    torch.manual_seed(0)
    model = build(family)
    inputs = tiny.inputs(model, ONE)
    positions = tiny.visual_positions(model, inputs)
    cuts = tiny.random_cuts(positions, [2, 4], [0.5, 0.3])
    merges = tiny.random_merges(positions, cuts)
    new = torch.randint(tiny.FIRST_TEXT_ID, tiny.VOCAB, (1, 3))
    out = oracle.masked_forward(model, inputs, cuts, positions, merges, new)

    def error(cuts: Any = cuts, merges: Any = merges, **kwargs: Any) -> float:
        logits, columns = physical(model, inputs, cuts, positions, merges, generated=new, **kwargs)
        text = columns > int(positions[0][-1][-1])  # the columns every variant keeps
        return difference(out.logits[0, columns[text]], logits[text])

    assert error() <= 1e-5
    wrong_token = copy.deepcopy(cuts)
    kept = wrong_token[1][1][0][0]
    instead = next(int(k) for k in cuts[0][1][0][0] if int(k) not in kept.tolist())
    wrong_token[1][1][0][0] = torch.cat([kept[:-1], torch.tensor([instead])]).sort().values
    faults = {
        "another token": error(wrong_token, None),
        "one layer late": error([(3, cuts[0][1]), cuts[1]]),
        "shifted positions": error(shift=1),
        "weights": error(merges=[[[(p, 0.9 * w) for p, w in row] for row in cut] for cut in merges]),
        "no merges": error(merges=None),
    }
    assert min(faults.values()) > 1e-3, faults


# -- its manners -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TWO)
def test_leaves_the_model_as_it_was(family: str) -> None:
    model = build(family)
    inputs, other = tiny.inputs(model, ROWS), tiny.inputs(model, ONE, seed=5)
    positions = tiny.visual_positions(model, other)
    cuts = tiny.random_cuts(positions, [2], [0.5])

    def state() -> Any:
        # (stock leaves hooks of its own in the vision tower, from the first forward on)
        hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
        deltas = getattr(model.model, "rope_deltas", None)
        return hooks, model.config.to_dict(), None if deltas is None else deltas.tolist()

    before = stock(model, inputs)
    found = state()
    oracle.masked_forward(model, other, cuts, positions, output_hidden=True)
    assert state() == found

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.language_model.layers[3].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        oracle.masked_forward(model, other, cuts, positions)
    handle.remove()
    assert state() == found
    assert stock(model, inputs).equal(before)


def test_refuses_records_that_make_no_sense() -> None:
    model = build("llava")
    inputs = tiny.inputs(model, [["text:2", "image", "text:2"]])
    positions = tiny.visual_positions(model, inputs)

    def run(cuts: Any, *args: Any, **kwargs: Any) -> None:
        oracle.masked_forward(model, inputs, cuts, positions, *args, **kwargs)

    with pytest.raises(ValueError, match="never there"):
        run([(2, [[[3, 25]]])])
    with pytest.raises(ValueError, match="gone"):
        run([(2, [[[3, 4]]]), (3, [[[4, 5]]])])
    with pytest.raises(ValueError, match="ascend"):
        run([(2, [[[4, 3]]])])
    with pytest.raises(ValueError, match="ascending layers"):
        run([(3, [[[3, 4]]]), (2, [[[3]]])])
    with pytest.raises(ValueError, match="ascending layers"):
        run([(6, [[[3, 4]]])])
    with pytest.raises(ValueError, match="images"):
        run([(2, [[[3], [4]]])])
    with pytest.raises(ValueError, match="source or slot"):
        run([(2, [[[3, 4]]])], [[[(torch.tensor([[3, 7]]), torch.ones(1))]]])
    with pytest.raises(ValueError, match="source or slot"):
        run([(2, [[[3, 4]]]), (3, [[[3]]])], [None, [[(torch.tensor([[9, 3]]), torch.ones(1))]]])
    with pytest.raises(ValueError, match="placeholder"):
        run([], generated=torch.tensor([[tiny.IMAGE]]))


def test_none_means_as_before() -> None:
    """Two images of two turns, pruned at different layers: the lists of one cut name None for the other."""
    model = build("llava")
    inputs = tiny.inputs(model, [["text:2", "image", "text:2", "image", "text:2"]])
    positions = tiny.visual_positions(model, inputs)
    everything = list(range(25))
    a = oracle.masked_forward(model, inputs, [(1, [[[3], None]]), (3, [[None, [4]]])], positions)
    b = oracle.masked_forward(model, inputs, [(1, [[[3], everything]]), (3, [[[3], [4]]])], positions)
    assert a.logits.equal(b.logits)
    assert a.alive.sum(-1).flatten().tolist() == [56, 32, 32, 8, 8, 8]


def test_the_oracle_stands_alone() -> None:
    files = [Path(str(oracle.__file__)), *Path(str(tiny.__file__)).parent.glob("*.py")]
    assert len(files) > 2
    assert not [file for file in files if "tokenprune" in file.read_text()]
