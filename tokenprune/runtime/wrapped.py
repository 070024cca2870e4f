"""What all hooks of a wrapped model share: where its parts are, and which call is under way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from tokenprune.config import PruneConfig, decoder_shape
from tokenprune.errors import TokenPruneError
from tokenprune.models.base import Family
from tokenprune.runtime import compiled
from tokenprune.runtime.assumptions import Assumptions
from tokenprune.runtime.current import Calls, last_outcome, note_outcome, overrides_here
from tokenprune.runtime.layer_masks import LayerMasks
from tokenprune.runtime.outcome import Outcome, Total
from tokenprune.runtime.state import Call

Hook = Callable[..., Any]
Changed = tuple[tuple[Any, ...], dict[str, Any]] | None  # what a pre-hook returns


@dataclass(eq=False)
class _Put:
    """A hook put on a module, perhaps only half: torch's handle is made too late to take that off.

    Attributes:
        number: torch's, once it was looked for.
    """

    module: nn.Module
    hook: Hook
    number: int | None = None

    def take_off(self) -> None:
        module = self.module
        tables = (module._forward_pre_hooks, module._forward_hooks)
        if self.number is None:
            self.number = next((n for own in tables for n, hook in own.items() if hook is self.hook), None)
        if self.number is None:
            return
        # The hook first: another thread must not call it without what is noted of it.
        notes = ("pre_hooks_with_kwargs", "hooks_with_kwargs", "hooks_always_called")
        for table in (*tables, *(getattr(module, f"_forward_{name}") for name in notes)):
            table.pop(self.number, None)


class Wrapped:
    """A model and its hooks.

    Args:
        model: the stock model.
        family: where its parts are.
        config: what to do in calls that no `override` says otherwise for.
    """

    def __init__(self, model: nn.Module, family: Family, config: PruneConfig) -> None:
        self.model, self.family, self.config = model, family, config
        self.decoder = family.decoder(model)
        self.layers = list(family.layers(model))
        self.text_config: Any = family.text_model(model).config
        self.shape = decoder_shape(model, family)
        self.masks = LayerMasks(self.text_config, family.attention(self.layers[0]))
        self.calls = Calls({})
        self.assumptions = Assumptions()
        self.gate = threading.RLock()  # between calls that begin and hooks that come and go
        self.installed = False
        self.latest: Outcome | None = None
        self.total = Total()
        self.hooks: list[_Put] = []

    def before(self, module: nn.Module, hook: Hook, quick: Hook | None = None) -> None:
        """Register `hook`; where torch.compile runs, `quick` stands in for it: see `compiled.either`."""
        chosen = compiled.either(hook, quick)
        self.hooks.append(_Put(module, chosen))  # first: an interrupt may come in the middle of the next line
        module.register_forward_pre_hook(chosen, with_kwargs=True)

    def after(self, module: nn.Module, hook: Hook, quick: Hook | None = None, always: bool = False) -> None:
        """The same, behind the module; `always`: after an exception too."""
        chosen = compiled.either(hook, quick)
        self.hooks.append(_Put(module, chosen))
        module.register_forward_hook(chosen, with_kwargs=True, always_call=always)

    def take_off(self, known: int = 0) -> None:
        """Remove the hooks but for the first `known`; where an interrupt breaks it off, the next call completes it."""
        for put in self.hooks[known:]:
            put.take_off()
        del self.hooks[known:]

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise TokenPruneError(
            "a wrapped model cannot be copied or pickled; tokenprune.unwrap(model) first and wrap the copy"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self.__deepcopy__(None)

    # -- of this thread or task ---------------------------------------------------------------------------------------

    @property
    def settings(self) -> PruneConfig:
        """Those a call that begins now would have."""
        own = overrides_here(self)
        return own[-1].config if own else self.config

    @property
    def call(self) -> Call | None:
        """The call under way in this thread."""
        stack = self.calls.stack
        return stack[-1].call if stack else None

    @property
    def outcome(self) -> Outcome | None:
        """Of this thread's or task's last prompt; where it has had none, of the model's."""
        return last_outcome(self) or self.latest

    @outcome.setter
    def outcome(self, outcome: Outcome) -> None:
        note_outcome(self, outcome)
        self.latest = outcome
        self.total.add(outcome)
