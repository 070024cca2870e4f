"""Hooks on the text model and its layers: cuts, and the masks and positions of what is left."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModeError
from tokenprune.models.decoders import attention_backend
from tokenprune.releases import cache_of
from tokenprune.runtime import compiled
from tokenprune.runtime.ahead import look_ahead, seen_ahead
from tokenprune.runtime.caches import shrink
from tokenprune.runtime.call import Call
from tokenprune.runtime.choose import choose, enter_prompt
from tokenprune.runtime.early import check_early
from tokenprune.runtime.later import continue_short, rescale
from tokenprune.runtime.layer_masks import KEEP
from tokenprune.runtime.layer_states import asked_for
from tokenprune.runtime.record import begin_writing, record_of
from tokenprune.runtime.stages import pick, pick_positions
from tokenprune.runtime.taps import Taps
from tokenprune.runtime.wrapped import Changed, Wrapped
from tokenprune.tensors import as_written


class LayerHooks:
    """Args:
    runtime: whose hooks they are.
    taps: who sees the states.
    """

    def __init__(self, runtime: Wrapped, taps: Taps) -> None:
        self.runtime, self.taps = runtime, taps

    def install(self) -> None:
        runtime = self.runtime
        family, text_model = runtime.family, runtime.family.text_model()
        runtime.before(text_model, self._enter_text_model, self._step_text_model)
        runtime.after(text_model, self._leave_text_model, _nothing, always=True)
        runtime.before(family.final_norm(), self._enter_norm, _nothing, asleep=True)
        for i, layer in enumerate(runtime.layers):
            # The first that attends decides in each call whether the others are needed.
            hook = partial(self._hook_layer, i, compiled.apart(partial(self._enter_layer, i)))
            runtime.before(layer, hook, asleep=i != runtime.first, chooses=True)
            if i not in runtime.attending:
                continue
            attention: Any = family.attention(layer)
            if runtime.decoder.temperature(attention, torch.zeros(1)) is not None:
                runtime.after(attention.q_proj, partial(rescale, runtime, i, attention), follows=True)

    # -- the text model -----------------------------------------------------------------------------------------------

    def _enter_text_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changed:
        calls = self.runtime.calls
        entry = calls.stack[-1] if calls.stack else None
        if entry is not None and (entry.text_entered or not entry.is_running()):
            calls.drop_interrupted()
            entry = None  # the text model itself is called
        if entry is None:
            return self._called_directly(module, args, kwargs)
        entry.text_entered = True
        if entry.call is None:
            return None
        return args, self._prompt(entry.call, kwargs)

    def _called_directly(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changed:
        """Not through the model: nothing is pruned, and what was pruned before cannot be told.

        Raises:
            UnsupportedModeError: the cache holds a pruned conversation.
        """
        calls = self.runtime.calls
        if not calls.stack:  # or the call's beginning was compiled
            step = self._step_text_model(module, args, kwargs)
            if step is not NotImplemented:
                return step
        if record_of(cache_of(kwargs)) is not None:
            raise UnsupportedModeError(
                "the text model was called directly on the cache of a pruned conversation; call the model itself"
            )
        calls.begin(module, None)
        return None

    def _leave_text_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        calls = self.runtime.calls
        if calls.stack and calls.stack[-1].owner is module:
            calls.end(module)
        call, asked = self.runtime.call, kwargs.get("logits_to_keep")
        return None if call is None or call.stages is None else asked_for(output, asked)

    def _prompt(self, call: Call, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The text model's inputs, after what a cut before the LLM needs."""
        hidden = kwargs["inputs_embeds"]
        call.use(cache_of(kwargs, call.cache))
        record, stages = call.record, call.stages
        if record is not None and self.runtime.first:
            record.unfinished = True  # no length tells that recurrent layers were written to
        if record is not None and record.first_is_short:
            kwargs = continue_short(self.runtime, call, hidden, dict(kwargs))
        if stages is None:
            return kwargs
        self.runtime.assumptions.check_tower(call)
        stages.to(hidden.device)
        enter_prompt(call, hidden, len(self.runtime.layers))
        first = call.config.cuts[0].layer
        if first == 0:
            if call.config.scores and call.config.needs_at(0).ahead is not None:
                with torch.no_grad(), call.scoring.running(hidden.device):
                    shown, caught = look_ahead(self.runtime, call, hidden, kwargs)
                choose(call, 0, hidden=shown, caught=caught)
            else:
                choose(call, 0, hidden=hidden)
            if call.config.arguments.positions == "compact":
                dropped = stages.dropped(0, hidden.device).cumsum(1)
                given = kwargs.get("position_ids")
                if given is None:
                    given = torch.arange(call.length, device=hidden.device)[None]
                call.shift = dropped[:, -1:]
                kwargs = {**kwargs, "position_ids": given - dropped}
        kwargs, features = self.runtime.family.layer_features(kwargs, first)
        for i, (marks, own) in features.items():
            whole = torch.zeros_like(hidden)
            call.features[i] = whole.masked_scatter_(marks[..., None].to(hidden.device), own.to(hidden))
        return kwargs

    # -- decoder layers -----------------------------------------------------------------------------------------------

    def _hook_layer(
        self, i: int, apart: Any, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> Changed:
        """As `compiled.either` has it, in as few calls as can be: every layer comes here at every step."""
        if torch.compiler.is_dynamo_compiling():
            changed = self._step_layer(i, module, args, kwargs)
            return apart(module, args, kwargs) if changed is NotImplemented else changed
        if compiled.is_watched():
            return apart(module, args, kwargs)
        stack = self.runtime.calls.stack
        call = stack[-1].call if stack else None
        if call is None or call.step_masks is None:
            return self._enter_layer(i, module, args, kwargs)
        mask = call.step_masks[i]
        return None if mask is KEEP else (args, {**kwargs, "attention_mask": mask})

    def _enter_layer(
        self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Changed:
        stack = self.runtime.calls.stack
        if not stack:  # the call's beginning was compiled, and this is not
            changed = self._step_layer(i, module, args, kwargs)
            return None if changed is NotImplemented else changed
        call = stack[-1].call
        if call is None:
            if self.runtime.calls.ahead is not None:
                seen_ahead(self.runtime.calls.ahead, i, args[0] if args else kwargs["hidden_states"])
            elif i == self.runtime.first and not self.taps.observers:
                self.runtime.rest()
            return None
        if call.is_plain:
            return None
        if call.changes and self.runtime.assumptions.hold and not call.features:
            made = call.changes.get(self._changes_key(call, i, kwargs))
            if made is not None:
                return args, {**kwargs, **made}
        self.runtime.assumptions.check_layer(i, args, kwargs, call)
        cache = cache_of(kwargs, call.cache)
        if i == 0:
            self._begin_writing(call, cache)
        if cache is not call.cache:  # the text model has just made it
            call.use(cache)
        record, stages = call.record, call.stages
        cuts = call.config.cuts
        given = args[0] if args else kwargs["hidden_states"]
        if i == self.runtime.first and stages is None and not self.taps.observers:
            stock = kwargs.get("attention_mask")
            call.is_plain = record is None or self.runtime.masks.needs_none(call, given, stock)
            if call.is_plain:
                self.runtime.rest()
                return None
            self.runtime.wake()
            call.step_masks = self.runtime.masks.of_step(call, given, stock)
            if call.step_masks is not None:
                mask = call.step_masks[i]
                return None if mask is KEEP else (args, {**kwargs, "attention_mask": mask})
        hidden = _with_features(call, i, given)
        if stages is not None and call.cuts_done < len(cuts) and cuts[call.cuts_done].layer == i:
            hidden = self._cut(call, hidden)
        elif call.cuts_done == 0 and (record is None or self._like_first(call, i)):
            # The model's own mask and positions are right.
            self.taps.show_hidden(i, hidden, call)
            return None if hidden is given else _with_hidden(hidden, args, kwargs)
        self.taps.show_hidden(i, hidden, call)
        mask = self.runtime.masks.of_layer(call, i, hidden, kwargs.get("attention_mask"))
        changes = {**self._positions(call, kwargs), "attention_mask": mask}
        if stages is not None and not self.taps.observers:
            call.changes[self._changes_key(call, i, kwargs)] = changes
        return _with_hidden(hidden, args, {**kwargs, **changes})

    def _changes_key(self, call: Call, i: int, kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """What the mask and positions of a layer depend on; none of a layer that is to cut."""
        stages, record = call.stages, call.record
        cuts, done = call.config.cuts, 0 if stages is None else len(stages.done)
        stock, rope = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        cutting = done < len(cuts) and cuts[done].layer == i
        own = None if record is None else record.layers[i]
        return (cutting, done, id(stock), id(rope), self.runtime.masks.kinds[i], id(own))

    def _begin_writing(self, call: Call, cache: Any) -> None:
        """Before layer 0 writes into the cache."""
        prunes = call.stages is not None
        if cache is None:
            check_early(call)
        elif prunes or (call.record is not None and call.kv.spans_more):
            begin_writing(cache, call.record, len(self.runtime.layers), prunes)

    def _enter_norm(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changed:
        call = self.runtime.call
        if call is None:
            return None
        i, given = len(self.runtime.layers), args[0] if args else kwargs["hidden_states"]
        hidden = _with_features(call, i, given)
        self.taps.show_hidden(i, hidden, call)
        return None if hidden is given else _with_hidden(hidden, args, kwargs)

    def _like_first(self, call: Call, i: int) -> bool:
        """Whether layer i holds what the first that attends holds, by whose length the model makes its masks."""
        assert call.record is not None
        own = call.record.layers[i]
        if i not in self.runtime.attending:
            return True  # it sees what is new only
        if own is not call.record.layers[call.record.first] or (own is not None and own.bias is not None):
            return False
        return own is None or not self.runtime.masks.looks_back(call, i)

    def _cut(self, call: Call, hidden: Tensor) -> Tensor:
        stages, cut = call.stages, call.cuts_done
        assert stages is not None
        # States of the layer before that wait for the hidden states a method also needs.
        self.runtime.assumptions.check_states(call)
        choose(call, cut, hidden=hidden, caught=call.caught)
        call.caught = None
        with as_written(hidden.device, grad=True), call.compacting.running(hidden.device):
            hidden, *features = stages.apply(cut, [hidden, *call.features.values()])
            call.features = dict(zip(call.features, features, strict=True))
        if call.kv.spans_more and not call.past and call.record is None:
            shrink(call.cache, call.config.cuts[cut].layer, call.length, hidden.shape[1])
        return hidden

    def _positions(self, call: Call, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Position ids and rotary embeddings of the tokens that are left, made once for all layers that share them."""
        if not call.cuts_done:
            return {}
        assert call.stages is not None
        rope, ids = kwargs["position_embeddings"], kwargs.get("position_ids")
        key = (call.cuts_done, id(rope))
        if key not in call.positions:
            index = call.stages.done[-1].index.clamp(min=0)
            if ids is not None and "flash" in attention_backend(self.runtime.text_config):
                ids = None  # gaps in them would be read as packed sequences; rotary embeddings carry the positions
            call.positions[key] = {
                "position_embeddings": self.runtime.decoder.rope_of(rope, lambda x: pick(x, index)),
                "position_ids": ids if ids is None else pick_positions(ids, index),
            }
        return call.positions[key]

    # -- the same, of a decoding step under torch.compile -----------------------------------------------------------

    def _step_text_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden, cache = kwargs.get("inputs_embeds"), cache_of(kwargs)
        if hidden is None or not compiled.is_step(self.runtime.text_config, hidden.shape[1], cache):
            return NotImplemented
        return args, compiled.positions(kwargs)

    def _step_layer(self, i: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden, cache = args[0] if args else kwargs["hidden_states"], cache_of(kwargs)
        if not compiled.is_step(self.runtime.text_config, hidden.shape[1], cache):
            return NotImplemented
        return args, compiled.mask(i, hidden, kwargs, self.runtime.text_config)


def _with_features(call: Call, i: int, hidden: Tensor) -> Tensor:
    """The states entering layer i, with what the model would have added to the output of the layer before.

    Added here and not behind that layer: what `output_hidden_states` captures there is without it.
    """
    own = call.features.pop(i - 1, None)
    return hidden if own is None else hidden + own.to(hidden.device)


def _with_hidden(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changed:
    if args:
        return (hidden, *args[1:]), kwargs
    return (), {**kwargs, "hidden_states": hidden}


def _nothing(module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
    """For hooks that compiled calls do not need."""
