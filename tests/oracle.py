"""The masked oracle: the judge of the pruning runtime. It imports nothing from the library under test.

`masked_forward` runs one cache-free, full-length forward of a *stock* model, in which nothing is dropped:
what pruning removes is masked instead. In decoder layer l the columns dropped at a cut <= l are invisible. A
token that is physically gone and a token that nobody may look at give the same states everywhere else, so a
correct runtime must agree with this forward at every position it kept.

Only plain temporary pre-hooks on the text model and its layers are used; they replace `attention_mask` by an
explicit 4D additive mask and, at a cut with merges, edit the hidden states and the deep-stack features that
later layers add to them. They are removed whatever happens.

The mask starts from the one the stock model itself gives the layer, if it is 4D: it holds what differs from
family to family (blocks seen both ways, windows, chunks), always in original columns. No mask means causal, or
all of the prompt where the attention module says it is not causal (PaliGemma without token types). Any other
kind (2D for flash, BlockMask) is taken for causal, with the layer's window if it has one.

A layer that is recurrent (`linear_attn`) cannot be masked: it sees each row's real tokens that are left, closed up
and at once, and nothing else.

Generated ids are text: of type 0 (of PaliGemma's type 1, the suffix), seen from later columns only, whatever
`generate` writes into its token types; it never looks at them again after the prefill.

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
    early: Sequence[Sequence[int]] | None = None,
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
    base_mask: layer -> (B, L, L) bool, which columns a row sees before anything is dropped, in place of the
        model's own rule.
    early: [row][image] -> the column where the image's prompt ends: from there on rows no longer see, in any layer
        but 0 and those that look back only so far, what the image's cuts dropped (`compact_early`).
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
    until = _until(early, dropped[-1], visual_positions)
    hidden: list[torch.Tensor] = []
    edits = {layer: _merge_matrix(i, cuts, merges, visual_positions) for i, (layer, _) in enumerate(cuts)}
    prompt = inputs["input_ids"].shape[1]
    recurrent = {i: layer.linear_attn for i, layer in enumerate(layers) if hasattr(layer, "linear_attn")}
    first = min(i for i in range(len(layers)) if i not in recurrent)

    def mask_of(layer: int, given: Any, dtype: torch.dtype) -> torch.Tensor:
        length = real.shape[1]
        if base_mask is not None:
            sees = base_mask(layer).to(device)
        elif isinstance(given, torch.Tensor) and given.ndim == 4:
            sees = (given if given.dtype == torch.bool else given == 0)[:, 0, :, :length]
        else:
            column = torch.arange(length, device=device)
            sees = (column[None, :] <= column[:, None])[None]
            if given is None and not getattr(layers[layer].self_attn, "is_causal", True):
                sees = sees | ((column[None, :] < prompt) & (column[:, None] < prompt))[None]
            window = _window(text_model.config, layer, given)
            if window is not None:  # in original columns: what was dropped still counts as distance
                sees = sees & (column[None, :] > column[:, None] - window)[None]
        sees = sees & (real & ~dropped[layer])[:, None, :]
        if layer != first and _looks_everywhere(text_model.config, layer):
            sees = sees & (torch.arange(real.shape[1], device=device)[None, :, None] < until[:, None, :])
        # A row always sees itself. For a kept row this changes nothing; a dropped or padded row would
        # otherwise see no column at all, and its NaN would spread through the vanishing weights of others (0
        # * NaN).
        sees = sees | torch.eye(length, dtype=torch.bool, device=device)
        additive = bias[layer][:, None, :].expand_as(sees).masked_fill(~sees, torch.finfo(dtype).min)
        return additive[:, None].to(dtype)

    def closed_up(layer: int, stock: Callable) -> Callable:
        def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            out = torch.zeros_like(hidden_states)
            for row, alive in enumerate(real & ~dropped[layer]):
                columns = alive.nonzero().flatten()
                out[row, columns] = stock(hidden_states[row : row + 1, columns])[0]
            return out

        return forward

    def pre_hook(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if "attention_mask" not in kwargs:
                raise NotImplementedError(f"{type(module).__name__} gets no attention_mask keyword")
            states = args[0]
            if edits.get(layer):
                states = _merged(states, edits[layer])
            if output_hidden:
                hidden.append(states.detach().clone())
            if layer in recurrent:
                return (states, *args[1:]), {**kwargs, "attention_mask": None}
            return (states, *args[1:]), {
                **kwargs,
                "attention_mask": mask_of(layer, kwargs["attention_mask"], states.dtype),
            }

        return hook

    def merge_deepstack(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        features = kwargs.get("deepstack_visual_embeds")
        if features is None:
            return None
        where, merged = kwargs["visual_pos_masks"], []
        for layer, feature in enumerate(features):
            full = feature.new_zeros(*where.shape, feature.shape[-1])
            full[where] = feature
            for cut, _ in cuts:
                if cut <= layer:  # this layer's features are added to states already merged
                    full = _merged(full, edits[cut])
            merged.append(full[where])
        return args, {**kwargs, "deepstack_visual_embeds": merged}

    handles = []
    # The model keeps the offset between columns and 3D positions as an attribute: leave it as it was found.
    remembered = [(m, m.rope_deltas) for m in model.modules() if hasattr(m, "rope_deltas")]
    try:
        handles.append(text_model.register_forward_pre_hook(merge_deepstack, with_kwargs=True))
        for index, module in recurrent.items():
            module.forward = closed_up(index, module.forward)
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
        for module in recurrent.values():
            module.__dict__.pop("forward", None)
        for module, value in remembered:
            module.rope_deltas = value
    return OracleOutput(logits, real[None] & ~dropped, prompt, hidden)


def expand(
    inputs: dict[str, Any], times: int, visual_positions: Positions, video_token_id: int | None = None
) -> dict[str, Any]:
    """The inputs with every row repeated `times` times in place, each copy with its own copy of the row's
    images.

    (Repeating pixels image by image, as one does with rows, would mix them up as soon as a row has two.)

    video_token_id: needed where a batch has both images and videos, to tell them apart.
    """
    out: dict[str, Any] = {}
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            out[name] = value
            continue
        of_rows = shares(name, inputs, visual_positions, video_token_id)
        if name == "position_ids":
            out[name] = value.repeat_interleave(times, dim=value.ndim - 2)
        elif of_rows is None:
            out[name] = value.repeat_interleave(times, dim=0)
        else:
            out[name] = torch.cat([part for row in value.split(of_rows) for part in [row] * times])
    return out


def shares(
    name: str, inputs: dict[str, Any], positions: Positions, video_token_id: int | None
) -> list[int] | None:
    """How many entries of an input belong to each row, in order; None: it has one entry per row."""
    value, ids = inputs[name], inputs["input_ids"]
    per_image = ("pixel_values", "image_grid_thw", "image_sizes", "image_position_ids")
    per_video = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "num_frames_per_video")
    if name not in per_image + per_video:
        return None
    if "image_sizes" not in inputs and value.ndim == 5 and name == "pixel_values":
        return None  # Idefics3: filled up to the same number of images for every row
    both = "pixel_values" in inputs and "pixel_values_videos" in inputs
    if both and video_token_id is None:
        raise ValueError("images and videos: pass video_token_id")

    def belongs(row: int, columns: torch.Tensor) -> bool:
        return not both or (int(ids[row, columns[0]]) == video_token_id) == (name in per_video)

    images = [[columns for columns in row if belongs(i, columns)] for i, row in enumerate(positions)]
    counts = [len(row) for row in images]
    grid = inputs.get("image_grid_thw" if name in per_image else "video_grid_thw")
    if name.startswith("pixel_values") and grid is not None:  # patches of all images in one long list
        return [int(part.prod(-1).sum()) for part in grid.split(counts)]
    if len(value) == sum(counts):
        return counts
    tokens = [sum(map(len, row)) for row in images]  # several tiles per image, all of one size
    return [len(value) * n // sum(tokens) for n in tokens]


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


def _window(config: Any, layer: int, given: Any) -> int | None:
    types = getattr(config, "layer_types", None)
    if types is None:
        return getattr(config, "sliding_window", None)  # Mistral: the window holds everywhere
    if types[layer] == "sliding_attention":
        return config.sliding_window
    if types[layer] != "full_attention" and given is not None:  # without a mask all is within one chunk
        raise NotImplementedError(f"layer {layer} is a {types[layer]} layer: pass base_mask")
    return None


def _looks_everywhere(config: Any, layer: int) -> bool:
    types = getattr(config, "layer_types", None)
    return (
        getattr(config, "sliding_window", None) is None if types is None else types[layer] == "full_attention"
    )


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
        suffix = int(model.config.model_type == "paligemma")
        out["token_type_ids"] = torch.cat([types, torch.full_like(new, suffix, dtype=types.dtype)], dim=1)
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


def _until(
    early: Sequence[Sequence[int]] | None, dropped: torch.Tensor, positions: Positions
) -> torch.Tensor:
    """(B, L): the row from which on a column is seen by none, in layers from 1 on."""
    until = torch.full(dropped.shape, dropped.shape[1], device=dropped.device)
    for row, ends in enumerate(early or ()):
        for columns, end in zip(positions[row], ends, strict=True):
            gone = columns.to(dropped.device)
            until[row, gone[dropped[row, gone]]] = end
    return until


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
