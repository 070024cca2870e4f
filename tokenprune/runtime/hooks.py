"""The hooks of a wrapped model.

The runtime knows neither methods nor families: it asks the family where things are, gives the method what it needs,
and turns selections into shorter hidden states, masks, positions and caches.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.config import PruneConfig, decoder_shape
from tokenprune.errors import TokenPruneError, UnsupportedModeError
from tokenprune.models.base import Family, VisionCall, VisionTap
from tokenprune.models.decoder import by_token, rotate, state_module
from tokenprune.runtime import compiled
from tokenprune.runtime.frame import Frame, begin
from tokenprune.runtime.layer_masks import LayerMasks, columns
from tokenprune.runtime.masks import attention_backend
from tokenprune.runtime.outcome import Outcome, make_outcome
from tokenprune.runtime.pruning import Key, Pruning, pick
from tokenprune.runtime.record import Columns, attach, extend, record_of
from tokenprune.runtime.vision import VisionFacts, attach_facts, noting_sizes, sizes_on_host

Changed = tuple[tuple[Any, ...], dict[str, Any]] | None


class Runtime:
    """The hooks of one wrapped model, and the outcome of its last prompt.

    Args:
        model: the stock model.
        family: where its parts are.
        config: what to do.
    """

    def __init__(self, model: nn.Module, family: Family, config: PruneConfig) -> None:
        self.model, self.family, self.config = model, family, config
        self.layers = list(family.layers(model))
        self.text_config: Any = family.text_model(model).config
        self.shape = decoder_shape(model, family)
        self.masks = LayerMasks(self.text_config, family.attention(self.layers[0]))
        self.outcome: Outcome | None = None
        self._local = threading.local()
        self._handles: list[RemovableHandle] = []
        self._shadows: list[tuple[nn.Module, str]] = []
        self._sources: list[nn.Module] = []
        self.tap: VisionTap | None = None
        self._names: dict[
            nn.Module, list[str]
        ] = {}  # forward parameters of the modules a call may begin with

    # -- life cycle ---------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Register the hooks; after an error none is left."""
        compiled.forget()
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        compiled.forget()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module, name in self._shadows:
            vars(module).pop(name, None)
        self._shadows.clear()
        self._sources = []

    def _install(self) -> None:
        model, family = self.model, self.family
        for module in dict.fromkeys((model, family.base(model))):
            parameters = inspect.signature(type(module).forward).parameters
            self._names[module] = [name for name in parameters if name != "self"]
            self._before(module, self._enter, self._step)
            self._after(module, self._leave, self._step, always_call=True)
        self._before(family.text_model(model), self._enter_text_model, self._step_text_model)
        for i, layer in enumerate(self.layers):
            self._before(layer, partial(self._enter_layer, i), partial(self._step_layer, i))
            self._after(layer, partial(self._leave_layer, i), _nothing_in_a_step)
            attention: Any = family.attention(layer)
            if family.temperature(attention, torch.zeros(1)) is not None:
                self._after(attention.q_proj, partial(self._rescale, i, attention))
        # The features' grid is noted even when nobody scores: generate() encodes images ahead of the forward.
        tower = family.vision_tower(model)
        self._before(tower, self._enter_tower)
        self._after(tower, self._leave_tower)
        if family.sizes_ahead:
            self._note_sizes()
        if self.config.keep_lists is not None or not self.config.cuts:
            return
        needs = self.config.method.needs()
        if needs.vision is not None:
            self.tap = family.vision_tap(model)
            self._before(self.tap.attention, self._enter_vision)
            for source in self.tap.sources:
                self._after(source, self._catch_vision)
        projected = tuple(s for s in needs.states if s != "hidden")
        for c, cut in enumerate(self.config.cuts if projected else ()):
            layer = self.layers[cut.layer - 1]
            attention = family.attention(layer)
            self._before(attention, partial(self._catch_rope, c), _nothing_in_a_step)
            for state in projected:
                hook = partial(self._catch_state, c, state)
                self._after(
                    state_module(attention, state), hook, partial(_no_state_in_a_step, attention, state)
                )
        self._sources = self._scored()

    def _scored(self) -> list[nn.Module]:
        """The modules whose outputs the method scores."""
        model, family, needs = self.model, self.family, self.config.method.needs()
        found: list[nn.Module] = []
        if needs.vision is not None:
            found += family.vision_tap(model).sources
        for cut in self.config.cuts:
            layer = self.layers[cut.layer - 1]
            found += [state_module(family.attention(layer), s) for s in needs.states if s != "hidden"]
        return found

    def _note_sizes(self) -> None:
        """Put a noting function before get_image_features and get_video_features, until the model is unwrapped."""
        base = self.family.base(self.model)
        for kind in ("image", "video"):
            name = f"get_{kind}_features"
            if hasattr(base, name) and name not in vars(base):
                setattr(base, name, noting_sizes(getattr(base, name), kind, self.family))
                self._shadows.append((base, name))

    def _before(
        self, module: nn.Module, hook: Callable[..., Any], quick: Callable[..., Any] | None = None
    ) -> None:
        self._handles.append(module.register_forward_pre_hook(compiled.either(hook, quick), with_kwargs=True))

    def _after(
        self,
        module: nn.Module,
        hook: Callable[..., Any],
        quick: Callable[..., Any] | None = None,
        always_call: bool = False,
    ) -> None:
        chosen = compiled.either(hook, quick)
        self._handles.append(module.register_forward_hook(chosen, with_kwargs=True, always_call=always_call))

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise TokenPruneError(
            "a wrapped model cannot be copied or pickled; tokenprune.unwrap(model) first and wrap the copy"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self.__deepcopy__(None)

    # -- a call's beginning and end -----------------------------------------------------------------------------

    @property
    def frame(self) -> Frame | None:
        """The call under way in this thread."""
        return getattr(self._local, "frame", None)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changed:
        """Before the model, or before its inner multimodal model when that is called directly."""
        frame = self.frame
        if (
            module is not self.model
            and frame is not None
            and frame.owner is self.model
            and not frame.base_entered
        ):
            frame.base_entered = True
            return None
        self._local.frame = None  # left behind by a call that was interrupted
        names = self._names[module]
        inputs = {**kwargs, **dict(zip(names, args, strict=False))}
        frame = begin(self.model, self.family, self.config, module, inputs)
        if frame is not None and frame.pruning is not None and self._sources:
            self._check_sources()
        self._local.frame = frame
        if frame is None or frame.pruning is None or module is not self.model:
            return None
        frame.labels = inputs.pop("labels", None)
        # What the stock forward would pass on to the loss (the Trainer's num_items_in_batch, for example).
        frame.loss_options = {name: value for name, value in inputs.items() if name not in names}
        if isinstance(inputs.get("logits_to_keep"), Tensor):
            inputs["logits_to_keep"] = _after_last_image(frame.pruning, inputs["logits_to_keep"])
        return (), inputs

    def _check_sources(self) -> None:
        """Adapters put in or merged since: the hooks would see other states than the model uses, or none at all."""
        if any(now is not then for now, then in zip(self._scored(), self._sources, strict=True)):
            raise TokenPruneError(
                "modules whose outputs are scored were replaced since tokenprune.wrap; unwrap the model and wrap it "
                "again"
            )

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        frame = self.frame
        if frame is None or module is not frame.owner:
            return None
        self._local.frame = None
        if output is None:  # the call failed: nothing of it stays
            return None
        pruning = frame.pruning
        if pruning is None and frame.record is not None:
            frame.record.after += frame.length
        if pruning is not None:
            if frame.cache is not None:
                cuts = [sum(cut.layer <= i for cut in self.config.cuts) for i in range(len(self.layers))]
                new = [pruning.stages[c - 1] if c else None for c in cuts]
                record = extend(
                    frame.record,
                    frame.past,
                    frame.visible,
                    frame.batch,
                    new,
                    frame.length,
                    pruning.last + 1,
                    frame.shift,
                )
                attach(frame.cache, record)
            if frame.labels is not None:
                output = self._with_loss(frame, pruning.stages[-1], frame.labels, output)
        if frame.rows is not None:
            self.outcome = make_outcome(self.config, self.text_config, len(self.layers), frame)
        return output

    def _with_loss(self, frame: Frame, columns: Columns, labels: Tensor, output: Any) -> Any:
        """The model's own loss, on the labels of the columns that are left."""
        index = columns.index.to(labels.device)
        labels = labels.gather(1, index.clamp(min=0)).masked_fill(index < 0, -100)
        model: Any = self.model
        logits = output[0] if isinstance(output, tuple) else output.logits
        loss = model.loss_function(
            logits=logits, labels=labels, vocab_size=self.text_config.vocab_size, **frame.loss_options
        )
        if isinstance(output, tuple):
            return (loss, *output)
        return type(output)(**{**dict(output), "loss": loss})

    # -- the same, of a decoding step under torch.compile --------------------------------------------------------

    def _step(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any = None) -> Any:
        inputs = {**kwargs, **dict(zip(self._names[module], args, strict=False))}
        ids = inputs.get("input_ids")
        cache = inputs.get("past_key_values")
        if ids is None or not compiled.is_step(self.text_config, ids.shape[1], cache):
            return NotImplemented
        record = record_of(cache)
        if record is not None:
            record.compiled = True
        return None

    def _step_text_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        length = kwargs["inputs_embeds"].shape[1]
        if not compiled.is_step(self.text_config, length, kwargs.get("past_key_values")):
            return NotImplemented
        return args, compiled.positions(kwargs)

    def _step_layer(self, i: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if not compiled.is_step(self.text_config, hidden.shape[1], kwargs.get("past_key_values")):
            return NotImplemented
        return args, compiled.mask(i, hidden, kwargs, self.text_config)

    # -- the text model -----------------------------------------------------------------------------------------

    def _enter_text_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changed:
        frame = self.frame
        if frame is not None and frame.text_entered:
            self._local.frame = frame = None  # left behind by a call that was interrupted
        if frame is None:
            return _done(self._step_text_model(module, args, kwargs))
        frame.text_entered = True
        hidden = kwargs["inputs_embeds"]
        frame.cache = kwargs.get("past_key_values", frame.cache)
        record, pruning = frame.record, frame.pruning
        if record is not None and record.before_llm:
            kwargs = self._continue_short(frame, hidden, dict(kwargs))
        if pruning is not None:
            pruning.to(hidden.device)
            if self.config.cuts[0].layer == 0:
                self._select(frame, 0, hidden=hidden)
                if self.config.positions == "compact":
                    dropped = pruning.dropped(0, hidden.device).cumsum(1)
                    given = kwargs.get("position_ids")
                    if given is None:
                        given = torch.arange(frame.length, device=hidden.device)[None]
                    frame.shift = dropped[:, -1:]
                    kwargs = {**kwargs, "position_ids": given - dropped}
            kwargs, features = self.family.layer_features(kwargs, self.config.cuts[0].layer)
            for i, (columns, own) in features.items():
                whole = torch.zeros_like(hidden)
                frame.features[i] = whole.masked_scatter_(
                    columns[..., None].to(hidden.device), own.to(hidden)
                )
        return args, kwargs

    def _continue_short(self, frame: Frame, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Decode after a cut before the LLM: even layer 0 holds fewer entries than the mask has columns."""
        record = frame.record
        assert record is not None
        if not frame.positions_given:  # what the model would make of the cache's length is wrong
            first = frame.past + self.family.first_position
            kwargs["position_ids"] = torch.arange(first, first + frame.length, device=hidden.device)[None]
        if record.shift is not None:
            kwargs["position_ids"] = kwargs["position_ids"] - record.shift.to(hidden.device)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            kwargs["attention_mask"] = self.masks.entries(frame, 0, hidden).to(mask.dtype)
        elif isinstance(mask, dict):
            example = {self.masks.kind(i): i for i in reversed(range(len(self.layers)))}
            kwargs["attention_mask"] = {
                kind: self.masks.rebuild(frame, example[kind], hidden, all_visible=False) for kind in mask
            }
        elif mask is not None or record.layers[0].visible is not None:  # type: ignore[union-attr]
            kwargs["attention_mask"] = self.masks.rebuild(frame, 0, hidden, all_visible=False)
        return kwargs

    # -- decoder layers -----------------------------------------------------------------------------------------

    def _enter_layer(
        self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Changed:
        frame = self.frame
        if frame is None:
            return _done(self._step_layer(i, module, args, kwargs))
        frame.cache = kwargs.get("past_key_values", frame.cache)  # the text model may just have made it
        record, pruning = frame.record, frame.pruning
        hidden = args[0] if args else kwargs["hidden_states"]
        if (
            pruning is not None
            and frame.stage < len(self.config.cuts)
            and self.config.cuts[frame.stage].layer == i
        ):
            hidden = self._cut(frame, hidden, kwargs)
        elif frame.stage == 0 and (record is None or self._like_first(frame, i)):
            return None  # the model's own mask and positions are right
        mask = self.masks.of_layer(frame, i, hidden, kwargs.get("attention_mask"))
        changed = {**kwargs, **self._positions(frame, kwargs), "attention_mask": mask}
        if args:
            return (hidden, *args[1:]), changed
        return (), {**changed, "hidden_states": hidden}

    def _like_first(self, frame: Frame, i: int) -> bool:
        """Whether layer i holds what layer 0 holds, by whose length the model makes its masks."""
        assert frame.record is not None
        columns = frame.record.layers[i]
        if columns is not frame.record.layers[0]:
            return False
        return columns is None or not self.masks.looks_back(frame, i)

    def _cut(self, frame: Frame, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        pruning, cut = frame.pruning, frame.stage
        assert pruning is not None
        # States of the layer before that wait for the hidden states a method also needs.
        caught = getattr(self._local, "states", None) or {}
        self._select(frame, cut, hidden=hidden, **caught)
        self._local.states = self._local.rope = self._local.module = None
        with frame.compacting.running(hidden.device):
            hidden, *features = pruning.apply(cut, [hidden, *frame.features.values()])
            frame.features = dict(zip(frame.features, features, strict=True))
        return hidden

    def _leave_layer(
        self, i: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor | None:
        frame = self.frame
        if frame is None or i not in frame.features:
            return None
        return output + frame.features.pop(i).to(output.device)

    def _rescale(
        self, i: int, attention: nn.Module, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor | None:
        """Queries whose temperature the layer tells from its cache's length get that of their original columns."""
        frame = self.frame
        if frame is None or (not frame.stage and (frame.record is None or frame.record.layers[i] is None)):
            return None
        original = columns(frame, i, output.device)
        assumed = torch.arange(original.shape[1], device=output.device)
        wanted, made = (self.family.temperature(attention, x) for x in (original, assumed))
        assert wanted is not None and made is not None
        ratio = (wanted / made)[:, -output.shape[1] :, None]
        return (output * ratio).to(output.dtype)

    def _positions(self, frame: Frame, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Position ids and rotary embeddings of the tokens that are left, made once for all layers that share them."""
        if not frame.stage:
            return {}
        assert frame.pruning is not None
        rope, ids = kwargs["position_embeddings"], kwargs.get("position_ids")
        key = (frame.stage, id(rope))
        if key not in frame.positions:
            index = frame.pruning.stages[-1].index.clamp(min=0)
            if ids is not None and "flash" in attention_backend(self.text_config):
                ids = None  # gaps in them would be read as packed sequences; rotary embeddings carry the positions
            frame.positions[key] = {
                # Llama 4's is one complex tensor instead of cosines and sines.
                "position_embeddings": pick(rope, index)
                if isinstance(rope, Tensor)
                else tuple(pick(x, index) for x in rope),
                "position_ids": ids if ids is None else pick(ids, index),
            }
        return frame.positions[key]

    def _select(self, frame: Frame, cut: int, **states: Tensor) -> None:
        """Fill in the cut's selections from states (B, L', ...) of the whole sequence, where they are missing."""
        pruning, method = frame.pruning, self.config.method
        assert pruning is not None
        if self.config.keep_lists is not None:
            pruning.force(cut)
            return
        wanted = pruning.wants(cut)
        if not wanted:
            return
        needed = method.needs().states
        with torch.no_grad(), frame.scoring.running(next(iter(states.values())).device):
            for key in wanted:
                own = {
                    name: self._state(pruning, key, name, x) for name, x in states.items() if name in needed
                }
                k = pruning.counts[cut][key]
                selection = method.select(pruning.view(key, frame.facts, **own), k)
                if selection.keep.shape != (k,):
                    raise TokenPruneError(
                        f"method {method.name!r} returned {tuple(selection.keep.shape)} indices where "
                        f"{k} were asked for"
                    )
                pruning.store(cut, key, selection)

    def _state(self, pruning: Pruning, key: Key, name: str, x: Tensor) -> Tensor:
        """One image's states: (n, D) hidden, (n, heads, head_dim) otherwise, rotary applied."""
        if name == "hidden":
            return pruning.take(x, key)
        own = pruning.take(by_token(self._local.module, name, x), key)
        if name == "value":
            return own
        # With several devices the layer's inputs are moved only inside its forward.
        rope = self._local.rope
        rope = pruning.take(rope, key) if isinstance(rope, Tensor) else [pruning.take(x, key) for x in rope]
        return rotate(self._local.module, own, rope)

    # -- states for the methods ---------------------------------------------------------------------------------

    def _catch_rope(self, cut: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._catching(cut):
            self._local.rope, self._local.module = kwargs["position_embeddings"], module
            self._local.states = {}

    def _catch_state(
        self, cut: int, state: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> None:
        """Score as soon as the last state a method needs is there; nothing but its selection is kept."""
        if not self._catching(cut):
            return
        states = self._local.states
        states[state] = output
        if all(s in states for s in self.config.method.needs().states):
            frame = self.frame
            assert frame is not None
            self._select(frame, cut, **states)
            self._local.states = self._local.rope = self._local.module = None

    def _catching(self, cut: int) -> bool:
        frame = self.frame
        return frame is not None and frame.pruning is not None and frame.stage == cut

    # -- the vision tower ---------------------------------------------------------------------------------------

    def _enter_tower(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._local.attention, self._local.vision, self._local.caught = [], None, {}
        if self.tap is None:
            return
        sizes = None
        if self.tap.packed:  # once per call, before its layers
            _, given = self.family.tower_input(args, kwargs)
            sizes = sizes_on_host(given, [] if self.frame is None else self.frame.sizes)
        self._local.vision = VisionCall(kwargs, {}, (), sizes)

    def _enter_vision(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if getattr(self._local, "vision", None) is not None:
            self._local.vision = replace(self._local.vision, attention=kwargs)

    def _catch_vision(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Reduce each picture's attention to the floats the method wants, as soon as queries and keys are there."""
        call, tap = getattr(self._local, "vision", None), self.tap
        if call is None or tap is None:
            return
        caught = self._local.caught
        caught[module] = output
        if len(caught) < len(tap.sources):
            return
        reduce = self.config.method.needs().vision
        assert reduce is not None
        with torch.no_grad():
            for parts in tap.read(replace(call, outputs=[caught[source] for source in tap.sources])):
                self._local.attention.append(torch.cat([reduce(own) for own in parts]))
        self._local.vision, self._local.caught = None, {}

    def _leave_tower(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        frame = self.frame
        pixels, sizes = self.family.tower_input(args, kwargs)
        facts = VisionFacts(sizes, attention=self._local.attention)
        self._local.attention = []
        if self.config.method.needs().digest and self.config.keep_lists is None:
            facts.digests = self.family.digests(pixels, sizes)
        if frame is not None:
            for kind in [k for k in ("image", "video") if k in frame.kinds and k not in frame.facts][:1]:
                frame.facts[kind] = facts
        # Inside a call nobody reads them there, but what looks like one may have been left behind by an interrupt.
        attach_facts(output, facts)


def _after_last_image(pruning: Pruning, index: Tensor) -> Tensor:
    """Columns counted from the left, as the caller sees them, in the shortened sequence."""
    if any(0 <= column <= pruning.last for column in index.tolist()):
        raise UnsupportedModeError(
            "logits_to_keep may only name columns after the last image of a pruned prompt"
        )
    return torch.where(index < 0, index, index - (pruning.length - pruning.lengths[-1]))


def _nothing_in_a_step(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any = None) -> Any:
    """For hooks that only a prompt needs."""
    states = args[0] if args else kwargs["hidden_states"]
    return None if states.shape[1] == 1 else NotImplemented


def _no_state_in_a_step(
    attention: nn.Module, state: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor
) -> Any:
    return None if by_token(attention, state, output).shape[1] == 1 else NotImplemented


def _done(changed: Any) -> Any:
    """Of a call whose beginning was compiled and is not: what a step needs, or nothing."""
    return None if changed is NotImplemented else changed
