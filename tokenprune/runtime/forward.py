"""Hooks on the model itself: a call's beginning and end."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import TokenPruneError, UnsupportedModeError
from tokenprune.models import misfit
from tokenprune.releases import cache_of
from tokenprune.runtime import compiled, deltas
from tokenprune.runtime.call import Call, open_call
from tokenprune.runtime.current import LOGITS_PROCESSORS, called_from
from tokenprune.runtime.early import compact_early
from tokenprune.runtime.escalate import escalated, may_escalate
from tokenprune.runtime.outcome import make_outcome
from tokenprune.runtime.plan import Plan
from tokenprune.runtime.record import Columns, attach, extend, record_of
from tokenprune.runtime.rows import remember
from tokenprune.runtime.taps import Taps
from tokenprune.runtime.trial import try_prompt
from tokenprune.runtime.wrapped import Changed, Wrapped


class CallHooks:
    """Args:
    runtime: whose hooks they are.
    taps: who sees the states.
    """

    def __init__(self, runtime: Wrapped, taps: Taps) -> None:
        self.runtime, self.taps = runtime, taps
        self._names: dict[
            nn.Module, list[str]
        ] = {}  # forward parameters of the modules a call may begin with

    def install(self) -> None:
        runtime = self.runtime
        for module in dict.fromkeys((runtime.model, runtime.family.base())):
            parameters = inspect.signature(type(module).forward).parameters
            self._names[module] = [name for name in parameters if name != "self"]
            runtime.before(module, self._enter, self._step)
            runtime.after(module, self._leave, self._step, always=True)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changed:
        """Before the model, or before its inner multimodal model when that is called directly."""
        runtime = self.runtime
        calls = runtime.calls
        if calls.trying:
            return None
        if module not in self._names:
            raise UnsupportedModeError(
                f"this {type(module).__name__} is a copy (by copy.copy, or a replica of DataParallel) of a wrapped "
                f"model and shares its hooks; unwrap it first, copy with copy.deepcopy, and wrap the copy"
            )
        if torch.compiler.is_exporting():
            raise UnsupportedModeError("a wrapped model cannot be exported; tokenprune.unwrap(model) first")
        if module is not runtime.model and calls.stack:
            outer = calls.stack[-1]
            if outer.owner is runtime.model and not outer.base_entered and outer.is_running():
                outer.base_entered = True
                return None
        calls.drop_interrupted()
        names = self._names[module]
        inputs = {**kwargs, **dict(zip(names, args, strict=False))}
        call = self._open(inputs)
        given = inputs
        if call is not None and runtime.family.mrope:
            inputs = deltas.restore(runtime.family.base(), call, inputs)
        again = call is not None and module is runtime.model and may_escalate(call, inputs)
        with runtime.gate:
            if not runtime.installed:  # another thread unwraps the model at this moment: it is stock already
                return None
            if call is not None and call.stages is not None:
                runtime.follow()
            calls.begin(module, call)
            if (call is not None and call.stages is not None) or self.taps.observers:
                runtime.wake()
        if call is None or call.stages is None or module is not runtime.model:
            return None if inputs is given else ((), inputs)
        if runtime.on_trial and not call.past:
            call.given = dict(inputs)
        if again:
            call.again = dict(inputs)
        call.labels = inputs.pop("labels", None)
        # What the stock forward would pass on to the loss (the Trainer's num_items_in_batch, for example).
        call.loss_options = {name: value for name, value in inputs.items() if name not in names}
        if isinstance(inputs.get("logits_to_keep"), Tensor):
            inputs["logits_to_keep"] = _after_last_image(call.stages.plan, inputs["logits_to_keep"])
        return (), inputs

    def _open(self, inputs: dict[str, Any]) -> Call | None:
        runtime = self.runtime
        try:
            return open_call(runtime.family, runtime.settings, inputs, runtime.masks.shortest)
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            if runtime.config.asked.family is None or isinstance(error, TokenPruneError):
                raise
            raise misfit(runtime.family.name, runtime.model, error) from error

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        entry = self.runtime.calls.end(module)
        if (
            entry is None or entry.call is None or output is None
        ):  # not its end, none of our business, or it failed
            return None
        return self._finish(entry.call, output)

    def _finish(self, call: Call, output: Any) -> Any:
        runtime, stages = self.runtime, call.stages
        layers = len(runtime.layers)
        if stages is None and call.record is not None:
            call.record.after += call.length
            call.record.unfinished = False
            remember(call.cache, call.record)
        if stages is not None:
            runtime.assumptions.check_call(call, output, layers)
            if call.again is not None:
                better = escalated(runtime, call, output)
                if better is not None:
                    return better
            if call.given is not None:
                try_prompt(runtime, call, call.given, output)
                runtime.on_trial = False
            if call.cache is not None:
                new = [stages.done[c - 1] if c else None for c in call.config.cuts_by(layers)]
                if call.config.arguments.compact_early:
                    with torch.no_grad(), call.compacting.running(stages.done[-1].index.device):
                        new = compact_early(call, new, runtime.text_config)
                record = extend(
                    call.record,
                    call.past,
                    call.visible,
                    call.batch,
                    new,
                    call.length,
                    stages.plan.last + 1,
                    call.shift,
                    runtime.first,
                )
                runtime.assumptions.check_cache(call, record)
                if runtime.family.mrope:
                    deltas.note(runtime.family.base(), call, record)
                attach(call.cache, record)
                remember(call.cache, record)
            if call.labels is not None:
                output = self._with_loss(call, stages.done[-1], call.labels, output)
        # What a logits processor asks about (guidance, negative prompts) follows the prompt that the report is of.
        if call.rows is not None and (any(call.rows) or not called_from(LOGITS_PROCESSORS)):
            runtime.outcome = make_outcome(runtime.costs, call)
        return output

    def _with_loss(self, call: Call, columns: Columns, labels: Tensor, output: Any) -> Any:
        """The model's own loss, on the labels of the columns that are left."""
        index = columns.index.to(labels.device)
        labels = labels.gather(1, index.clamp(min=0)).masked_fill(index < 0, -100)
        model: Any = self.runtime.model
        logits = output[0] if isinstance(output, tuple) else output.logits
        vocabulary = self.runtime.text_config.vocab_size
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **call.loss_options)
        if isinstance(output, tuple):
            return (loss, *output)
        return type(output)(**{**dict(output), "loss": loss})

    def _step(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any = None) -> Any:
        """The same, of a decoding step under torch.compile."""
        inputs = {**kwargs, **dict(zip(self._names[module], args, strict=False))}
        ids = inputs.get("input_ids")
        cache = cache_of(inputs)
        if ids is None or not compiled.is_step(self.runtime.text_config, ids.shape[1], cache):
            return NotImplemented
        record = record_of(cache)
        if record is not None:
            record.compiled = True
        return None


def _after_last_image(plan: Plan, index: Tensor) -> Tensor:
    """Columns counted from the left, as the caller sees them, in the shortened sequence."""
    if any(0 <= column <= plan.last for column in index.tolist()):
        raise UnsupportedModeError(
            "logits_to_keep may only name columns after the last image of a pruned prompt"
        )
    return torch.where(index < 0, index, index - plan.length)  # from the right, where nothing moves
