"""What all hooks of a wrapped model share: where its parts are, and which call is under way."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from tokenprune.config import PruneConfig
from tokenprune.errors import TokenPruneError
from tokenprune.models.base import Family
from tokenprune.runtime import compiled
from tokenprune.runtime.assumptions import Assumptions
from tokenprune.runtime.call import Call
from tokenprune.runtime.current import Calls, Override, overrides_here, warn_of_missed
from tokenprune.runtime.flops import layer_costs
from tokenprune.runtime.layer_masks import LayerMasks
from tokenprune.runtime.notes import last_outcome, note_outcome
from tokenprune.runtime.outcome import Outcome, Total

Hook = Callable[..., Any]
Changed = tuple[tuple[Any, ...], dict[str, Any]] | None  # what a pre-hook returns


@dataclass(eq=False)
class _Put:
    """A hook put on a module, perhaps only half: torch's handle is made too late to take that off.

    Attributes:
        behind: whether it comes after the module.
        always: after an exception too.
        asleep: whether it is put on by `Wrapped.wake` only.
        place: the parent of the module and its name there, where adapters may put another in its place.
        number: torch's, while it is being taken off.
    """

    module: nn.Module
    hook: Hook
    behind: bool = False
    always: bool = False
    asleep: bool = False
    place: tuple[nn.Module, str] | None = None
    number: int | None = None

    def put_on(self) -> None:
        """First of all before a module: who hooks in later sees what the module is given."""
        if self.number is not None:
            self.take_off()  # an interrupt came in the middle of it
        if self._find() is not None:
            return
        if self.behind:
            self.module.register_forward_hook(self.hook, with_kwargs=True, always_call=self.always)
        else:
            self.module.register_forward_pre_hook(self.hook, with_kwargs=True, prepend=self.asleep)

    def take_off(self) -> None:
        module = self.module
        if self.number is None:
            self.number = self._find()
        if self.number is None:
            return
        # The hook first: another thread must not call it without what is noted of it.
        notes = ("pre_hooks_with_kwargs", "hooks_with_kwargs", "hooks_always_called")
        tables = (module._forward_pre_hooks, module._forward_hooks)
        for table in (*tables, *(getattr(module, f"_forward_{name}") for name in notes)):
            table.pop(self.number, None)
        self.number = None

    def _find(self) -> int | None:
        """Torch's number; None where it is not on."""
        table = self.module._forward_hooks if self.behind else self.module._forward_pre_hooks
        for number, hook in table.items():
            if hook is self.hook:
                return number
        return None


class Wrapped:
    """A model and its hooks.

    Args:
        family: of the stock model: where its parts are.
        config: what to do in calls that no `override` says otherwise for.
    """

    def __init__(self, family: Family, config: PruneConfig) -> None:
        self.model: nn.Module = family.model
        self.family, self.config = family, config
        self.decoder = family.decoder()
        self.layers = list(family.layers())
        self.text_config: Any = family.text_model().config
        self.shape, self.costs = family.decoder_shape(), layer_costs(family)
        self.attending = family.attending()
        self.first = self.attending[0]  # whose mask and length the model makes all others' of
        first = family.attention(self.layers[self.first])
        self.masks = LayerMasks(self.text_config, first, family.block_kinds)
        self.calls = Calls({})
        self.assumptions = Assumptions()
        self.on_trial = family.on_trial
        self.gate = threading.RLock()  # between calls that begin and hooks that come and go
        self.overrides: weakref.WeakSet[Override] = weakref.WeakSet()  # in force, in any thread or task
        self.installed = False
        self.awake = False  # whether the hooks that only some calls need are on
        self.latest: Outcome | None = None
        self.total = Total()
        self.hooks: list[_Put] = []

    def before(
        self,
        module: nn.Module,
        hook: Hook,
        quick: Hook | None = None,
        asleep: bool = False,
        chooses: bool = False,
        follows: bool = False,
    ) -> None:
        """Register `hook`; where torch.compile runs, `quick` stands in for it: see `compiled.either`.

        Args:
            module: before which it comes.
            hook, quick: as there.
            asleep: whether it is on only while calls need it, see `wake`.
            chooses: whether the hook itself sees to torch.compile.
            follows: whether it moves on to what is put in the module's place; see `follow`.
        """
        self._put(_Put(module, hook if chooses else compiled.either(hook, quick), asleep=asleep), follows)

    def after(
        self,
        module: nn.Module,
        hook: Hook,
        quick: Hook | None = None,
        always: bool = False,
        asleep: bool = False,
        follows: bool = False,
    ) -> None:
        """The same, behind the module; `always`: after an exception too."""
        self._put(_Put(module, compiled.either(hook, quick), True, always, asleep), follows)

    def follow(self) -> None:
        """Move hooks to what has been put in their modules' places since: adapters, or what they were merged into."""
        for put in self.hooks:
            if put.place is None:
                continue
            parent, name = put.place
            now = parent._modules[name]
            if now is put.module or now is None:
                continue
            compiled.forget()
            put.take_off()
            put.module = now
            if not put.asleep or self.awake:
                put.put_on()

    def _put(self, put: _Put, follows: bool) -> None:
        if follows:
            put.place = next(
                (parent, name)
                for parent in self.model.modules()
                for name, child in parent.named_children()
                if child is put.module
            )
        self.hooks.append(put)  # first: an interrupt may come in the middle of the next line
        if not put.asleep or self.awake:
            put.put_on()

    def wake(self) -> None:
        """Put on the hooks that only some calls need: those that prune, and those that go on with what needs masks."""
        if self.awake:
            return
        with self.gate:
            if not self.installed:
                return
            compiled.forget()  # what was compiled meanwhile would run without them
            for put in self.hooks:
                if put.asleep:
                    put.put_on()
            self.awake = True

    def rest(self) -> None:
        """Take them off again, at a call that does not need them, if nobody else is under way.

        Compiled code does not notice hooks that come and go: where any may be, they stay.
        """
        if not self.awake or compiled.has_compiled():
            return
        with self.gate:
            others = list(self.calls.everywhere.values())  # another thread may begin its first call
            if any(stack is not self.calls.stack and stack for stack in others):
                return
            self.awake = False
            for put in self.hooks:
                if put.asleep:
                    put.take_off()

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
        if not own and self.overrides:
            warn_of_missed(list(self.overrides))
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
