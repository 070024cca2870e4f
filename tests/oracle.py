"""The masked oracle: the judge of the pruning runtime. It imports nothing from the library under test.

`masked_forward` runs one cache-free, full-length forward of a *stock* model, in which nothing is dropped:
what pruning removes is masked instead. In decoder layer l the columns dropped at a cut <= l are invisible. A
token that is physically gone and a token that nobody may look at give the same states everywhere else, so a
correct runtime must agree with this forward at every position it kept.

Only plain temporary pre-hooks on the decoder layers are used; they replace `attention_mask` by an explicit 4D
additive mask and, at a cut with merges, edit the hidden states. They are removed whatever happens.

Multi-turn: the oracle is teacher-forced and full length, so it needs no notion of a turn. Give the whole
history (prompt 1, answer 1, prompt 2, ...) as `input_ids`, the pixels (and grids) of all turns concatenated
in order, and count images of later turns as further images of the row. A cut that concerned the images of one
turn only names None for the others.

Beams and several returned sequences: every hypothesis is a row; see `expand` and `expand_rows`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Indices = torch.Tensor | Sequence[int]
KeepLists = Sequence[Sequence[Indices | None]]
"""[row][image] -> kept raster indices, ascending; None: as at the previous cut."""
Cuts = Sequence[tuple[int, KeepLists]]
"""Cuts in ascending order of layer: layers >= the number run on the kept tokens; 0 is before the LLM."""
Merges = Sequence[Sequence[Sequence[tuple[torch.Tensor, torch.Tensor] | None]] | None]
"""[cut][row][image] -> (pairs (m, 2) of source and slot raster index, weights (m,)); None: no merge."""
Positions = Sequence[Sequence[torch.Tensor]]
"""[row][image] -> the columns of input_ids where the image's visual tokens stand."""

_TEXT_MODEL_PATHS = ("model.language_model", "model.text_model", "language_model.model", "model")
_NOT_FORWARDED = ("labels", "logits_to_keep", "use_cache", "return_dict", "cache_implementation")


@dataclass
class OracleOutput:
    logits: torch.Tensor
    """(B, L, V), full length: prompt and generated tokens, dropped columns included (meaningless there)."""
    alive: torch.Tensor
    """(layers, B, L) bool: columns that are neither padding nor dropped in that layer."""
    prompt_length: int
    hidden: list[torch.Tensor] = field(default_factory=list)
    """With `output_hidden`: the states entering each layer (after its merges), then the last one's output."""

    def steps(self) -> torch.Tensor:
        """(B, T, V): the logits each generated token was chosen from, as in generate's `output_logits`."""
        return self.logits[:, self.prompt_length - 1 : -1]


def masked_forward(
    model: nn.Module,
    inputs: dict[str, Any],
    cuts: Cuts,
    visual_positions: Positions,
    merges: Merges | None = None,
    generated: torch.Tensor | None = None,
    *,
    biases: Merges | None = None,
    positions: str = "auto",
    base_mask: Callable[[int], torch.Tensor] | None = None,
    output_hidden: bool = False,
) -> OracleOutput:
    """One full-length stock forward in which the dropped visual tokens are masked.

    inputs: what the model was called with (`expand` it for beams). `attention_mask` is 2D; padding may be
        left, right, or in the middle.
    cuts, merges: see the types above. A merge at a cut of layer l replaces the slot's state entering layer l
        by the weighted sum of its sources' states entering that layer; all sums are taken first.
    generated: (B, T) ids appended to `input_ids`.
    biases: per cut, [row][image] -> (raster indices, values): added to the attention logits of these columns
        from the cut on (a size term, for example). A later cut that names a column again replaces its value.
    positions: which position ids. "generate": those `generate` makes (the mask's running count, or the
        model's 3D index of the prompt; then one more per generated token). "forward": left to the model, as
        in a plain call. "auto": "generate" with generated ids, else "forward". `position_ids` in the inputs
        win over all.
    base_mask: layer -> (B, L, L) bool, which columns a row sees before anything is dropped; for models whose
        rule is not a causal one (with or without a sliding window).
    """
    if generated is None:
        generated = inputs["input_ids"][:, :0]
    if "past_key_values" in inputs:
        raise ValueError("the oracle takes the whole history as input_ids, not a cache")
    text_model = _text_model(model)
    layers = list(text_model.layers)
    forwarded, real = _with_generated(model, inputs, generated, positions)
    _check(cuts, visual_positions, len(layers), forwarded["input_ids"].shape)

    device = real.device
    dropped, bias = _columns(cuts, biases, visual_positions, len(layers), real)
    hidden: list[torch.Tensor] = []
    edits = {layer: _merge_matrix(i, cuts, merges, visual_positions) for i, (layer, _) in enumerate(cuts)}
    if any(edits.values()) and hasattr(text_model, "_deepstack_process"):
        raise NotImplementedError("merges with deep-stack features")

    def mask_of(layer: int, dtype: torch.dtype) -> torch.Tensor:
        length = real.shape[1]
        column = torch.arange(length, device=device)
        if base_mask is None:
            sees = (column[None, :] <= column[:, None])[None]
            window = _window(text_model.config, layer)
            if window is not None:  # in original columns: what was dropped still counts as distance
                sees = sees & (column[None, :] > column[:, None] - window)[None]
        else:
            sees = base_mask(layer).to(device)
        sees = sees & (real & ~dropped[layer])[:, None, :]
        # A row always sees itself. For a kept row this changes nothing; a dropped or padded row would
        # otherwise see no column at all, and its NaN would spread through the vanishing weights of others (0
        # * NaN).
        sees = sees | torch.eye(length, dtype=torch.bool, device=device)
        additive = bias[layer][:, None, :].expand_as(sees).masked_fill(~sees, torch.finfo(dtype).min)
        return additive[:, None].to(dtype)

    def pre_hook(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if "attention_mask" not in kwargs:
                raise NotImplementedError(f"{type(module).__name__} gets no attention_mask keyword")
            states = args[0]
            if edits.get(layer):
                states = _merged(states, edits[layer])
            if output_hidden:
                hidden.append(states.detach().clone())
            return (states, *args[1:]), {**kwargs, "attention_mask": mask_of(layer, states.dtype)}

        return hook

    handles = []
    # The model keeps the offset between columns and 3D positions as an attribute: leave it as it was found.
    remembered = [(m, m.rope_deltas) for m in model.modules() if hasattr(m, "rope_deltas")]
    try:
        for index, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(pre_hook(index), with_kwargs=True))
        if output_hidden:
            handles.append(
                layers[-1].register_forward_hook(lambda _m, _a, out: hidden.append(out.detach().clone()))
            )
        with torch.no_grad():
            logits = model(**forwarded, use_cache=False, return_dict=True).logits
    finally:
        for handle in handles:
            handle.remove()
        for module, value in remembered:
            module.rope_deltas = value
    return OracleOutput(logits, real[None] & ~dropped, inputs["input_ids"].shape[1], hidden)


def expand(inputs: dict[str, Any], times: int, visual_positions: Positions) -> dict[str, Any]:
    """The inputs with every row repeated `times` times in place, each copy with its own copy of the row's
    images.

    (Repeating pixels image by image, as one does with rows, would mix them up as soon as a row has two.)
    """
    images = [len(row) for row in visual_positions]
    grids = inputs.get("image_grid_thw")
    starts = torch.tensor([0, *images]).cumsum(0).tolist()
    out: dict[str, Any] = {}
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            out[name] = value
        elif name == "position_ids":
            out[name] = value.repeat_interleave(times, dim=value.ndim - 2)
        elif name in ("pixel_values", "image_grid_thw", "image_sizes"):
            parts = list(value)
            if name == "pixel_values" and grids is not None:  # patches of all images in one long list
                parts = list(value.split(grids.prod(-1).tolist()))
            again = [part for a, b in itertools.pairwise(starts) for part in parts[a:b] * times]
            out[name] = (
                torch.cat(again) if name == "pixel_values" and grids is not None else torch.stack(again)
            )
        else:
            out[name] = value.repeat_interleave(times, dim=0)
    return out


def expand_rows(per_row: Sequence[Any], times: int) -> list[Any]:
    """[row] -> ... repeated to match `expand`: for visual positions, keep lists and one cut's merges."""
    return [row for row in per_row for _ in range(times)]


def expand_cuts(cuts: Cuts, times: int) -> list[tuple[int, list]]:
    return [(layer, expand_rows(keep, times)) for layer, keep in cuts]


def _text_model(model: nn.Module) -> nn.Module:
    for path in _TEXT_MODEL_PATHS:
        module: Any = model
        for name in path.split("."):
            module = getattr(module, name, None)
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            return module
    raise NotImplementedError(f"no decoder layers found in {type(model).__name__}")


def _window(config: Any, layer: int) -> int | None:
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] not in ("full_attention", "sliding_attention"):
        raise NotImplementedError(f"layer {layer} is a {types[layer]} layer: pass base_mask")
    if types is not None and types[layer] == "full_attention":
        return None
    return getattr(config, "sliding_window", None)  # Mistral has no layer types: the window holds everywhere


def _with_generated(
    model: nn.Module, inputs: dict[str, Any], generated: torch.Tensor, positions: str
) -> tuple[dict[str, Any], torch.Tensor]:
    """The inputs with the generated ids appended, and which columns are real (not padding)."""
    if positions not in ("auto", "generate", "forward"):
        raise ValueError(f"positions is {positions!r}")
    ids, new = inputs["input_ids"], generated.to(inputs["input_ids"].device)
    if new.shape[0] != ids.shape[0]:
        raise ValueError(f"{new.shape[0]} generated rows for {ids.shape[0]} rows: expand the inputs first")
    visual = [getattr(model.config, name, None) for name in ("image_token_id", "video_token_id")]
    if any((new == token).any() for token in visual if token is not None):
        raise ValueError(
            "a generated id is a visual placeholder: it has no image, a full forward cannot replay it"
        )

    out = {k: v for k, v in inputs.items() if k not in _NOT_FORWARDED and v is not None}
    mask = out.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.ndim != 2 or mask.shape != ids.shape:
        raise ValueError(f"attention_mask has the shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}")
    count = new.shape[1]
    use_generate = positions == "generate" or (positions == "auto" and count > 0)
    if "position_ids" not in out and use_generate:
        out["position_ids"] = _generate_positions(model, out, mask)
    if "position_ids" in out:
        # generate goes on from the last column of the prompt, in every dimension on its own
        last = out["position_ids"][..., -1:]
        step = torch.arange(1, count + 1, device=ids.device)
        out["position_ids"] = torch.cat([out["position_ids"], last + step], dim=-1)
    out["input_ids"] = torch.cat([ids, new], dim=1)
    out["attention_mask"] = torch.cat([mask, mask.new_ones(new.shape)], dim=1)
    if "mm_token_type_ids" in out:
        types = out["mm_token_type_ids"]
        out["mm_token_type_ids"] = torch.cat([types, types.new_zeros(new.shape)], dim=1)
    if "token_type_ids" in out:
        types = out["token_type_ids"]
        out["token_type_ids"] = torch.cat([types, types[:, -1:].expand_as(new)], dim=1)
    return out, out["attention_mask"].bool()


def _generate_positions(model: nn.Module, inputs: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
    text = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    rope_index = getattr(getattr(model, "model", None), "get_rope_index", None)
    grids = ("image_grid_thw", "video_grid_thw")
    if rope_index is None or "mm_token_type_ids" not in inputs or not any(name in inputs for name in grids):
        return text
    extras = {k: inputs[k] for k in (*grids, "second_per_grid_ts", "mm_token_type_ids") if k in inputs}
    return rope_index(inputs["input_ids"], attention_mask=mask, **extras)[0]


def _check(cuts: Cuts, positions: Positions, layers: int, shape: torch.Size) -> None:
    """A record that makes no sense is refused here, so that it cannot pass for a small numerical
    difference."""
    if len(positions) != shape[0]:
        raise ValueError(f"visual positions of {len(positions)} rows for {shape[0]} rows")
    numbers = [layer for layer, _ in cuts]
    in_order = all(a < b for a, b in itertools.pairwise(numbers))
    if not in_order or any(not 0 <= number < layers for number in numbers):
        raise ValueError(f"cuts at {numbers}: not strictly ascending layers below {layers}")
    current = [[set(range(len(image))) for image in row] for row in positions]
    for layer, keep in cuts:
        if len(keep) != len(positions):
            raise ValueError(f"cut at {layer}: keep lists of {len(keep)} rows for {len(positions)} rows")
        for row, images in enumerate(keep):
            if len(images) != len(positions[row]):
                raise ValueError(
                    f"cut at {layer}, row {row}: {len(images)} lists, {len(positions[row])} images"
                )
            for image, kept in enumerate(images):
                if kept is None:
                    continue
                kept = torch.as_tensor(kept, dtype=torch.long).tolist()
                where = f"cut at {layer}, row {row}, image {image}"
                if any(a >= b for a, b in itertools.pairwise(kept)):
                    raise ValueError(f"{where}: the kept indices do not ascend")
                if not set(kept) <= current[row][image]:
                    raise ValueError(
                        f"{where}: keeps {sorted(set(kept) - current[row][image])}, gone or never there"
                    )
                current[row][image] = set(kept)


def _columns(
    cuts: Cuts, biases: Merges | None, positions: Positions, layers: int, real: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layers, B, L): which columns are dropped in a layer, and what is added to a column's logits there."""
    dropped = torch.zeros(layers, *real.shape, dtype=torch.bool, device=real.device)
    bias = torch.zeros(layers, *real.shape, device=real.device)
    for cut, (layer, keep) in enumerate(cuts):
        for row, images in enumerate(keep):
            for image, kept in enumerate(images):
                columns = positions[row][image].to(real.device)
                if kept is not None:
                    gone = torch.ones(len(columns), dtype=torch.bool, device=real.device)
                    gone[torch.as_tensor(kept, dtype=torch.long, device=real.device)] = False
                    dropped[layer:, row, columns[gone]] = True
                entry = _entry(biases, cut, row, image)
                if entry is not None:
                    bias[layer:, row, columns[entry[0].to(real.device)]] = entry[1].float().to(real.device)
    return dropped, bias


def _entry(table: Merges | None, cut: int, row: int, image: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    per_cut = None if table is None else table[cut]
    entry = None if per_cut is None else per_cut[row][image]
    return None if entry is None or len(entry[0]) == 0 else entry


def _merge_matrix(
    cut: int, cuts: Cuts, merges: Merges | None, positions: Positions
) -> list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """[(row, source columns, slot columns, weights)], checked: sources live before the cut, slots after
    it."""
    edits = []
    for row, images in enumerate(positions):
        for image, columns in enumerate(images):
            entry = _entry(merges, cut, row, image)
            if entry is None:
                continue
            pairs, weights = entry[0].long().cpu(), entry[1]
            if pairs.ndim != 2 or pairs.shape[1] != 2 or weights.shape != pairs.shape[:1]:
                raise ValueError(
                    f"merge at cut {cut}: shapes {tuple(pairs.shape)} and {tuple(weights.shape)}"
                )
            alive = {-1: torch.arange(len(columns))}  # per cut, the previous one for None
            for i in range(cut + 1):
                kept = cuts[i][1][row][image]
                alive[i] = alive[i - 1] if kept is None else torch.as_tensor(kept, dtype=torch.long).cpu()
            if not (
                torch.isin(pairs[:, 0], alive[cut - 1]).all() and torch.isin(pairs[:, 1], alive[cut]).all()
            ):
                raise ValueError(
                    f"merge at cut {cut}, row {row}, image {image}: a source or slot is not there"
                )
            columns = columns.cpu()
            edits.append((row, columns[pairs[:, 0]], columns[pairs[:, 1]], weights))
    return edits


def _merged(states: torch.Tensor, edits: list) -> torch.Tensor:
    result = states.clone()
    for row, sources, slots, weights in edits:
        sources, slots = sources.to(states.device), slots.to(states.device)
        # summed in fp32, as the judge should not add rounding of its own
        moved = states[row, sources].float() * weights.float().to(states.device)[:, None]
        total = torch.zeros_like(states[row], dtype=torch.float32).index_add_(0, slots, moved)
        used = slots.unique()
        result[row, used] = total[used].to(states.dtype)
    return result
