"""What belongs to the thread or task that runs: the settings in effect, its last outcome, the calls under way.

Hooks know no settings. A call takes its own on entry: those of the innermost `override` of its thread or task, else
those of `wrap`. Overrides and outcomes are context variables, so a task has its own and a new thread starts from
wrap's; calls under way are a stack per thread, for a forward is never suspended.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from tokenprune.config import PruneConfig
from tokenprune.runtime.outcome import Outcome
from tokenprune.runtime.state import Call
from tokenprune.runtime.states import Ahead


@dataclass(frozen=True, eq=False)
class Override:
    """An `override` in force.

    Attributes:
        owner: the runtime whose calls it is for.
        config: what they are asked.
    """

    owner: Any
    config: PruneConfig


_OVERRIDES: ContextVar[tuple[Override, ...]] = ContextVar("tokenprune_overrides", default=())
_OUTCOMES: ContextVar[Mapping[weakref.ref[Any], Outcome]] = ContextVar("tokenprune_outcomes", default={})  # noqa: B039


def begin_override(override: Override) -> None:
    _OVERRIDES.set((*_OVERRIDES.get(), override))


def end_override(override: Override) -> None:
    _OVERRIDES.set(tuple(o for o in _OVERRIDES.get() if o is not override))


def overrides_here(owner: object) -> list[Override]:
    """This thread's or task's overrides of a model, the innermost last."""
    return [o for o in _OVERRIDES.get() if o.owner is owner]


def note_outcome(owner: object, outcome: Outcome) -> None:
    """Make it this thread's or task's last."""
    alive = {ref: own for ref, own in _OUTCOMES.get().items() if ref() not in (None, owner)}
    _OUTCOMES.set({**alive, weakref.ref(owner): outcome})


def last_outcome(owner: object) -> Outcome | None:
    return next((own for ref, own in _OUTCOMES.get().items() if ref() is owner), None)


@dataclass(eq=False)
class Entry:
    """A call under way.

    Attributes:
        owner: the module that was called.
        call: its state; None where it is none of our business.
        python: the interpreter's frame that runs it, by which a call that was interrupted is told; None if unknown.
    """

    owner: object
    call: Call | None
    python: FrameType | None
    base_entered: bool = False
    text_entered: bool = False

    def is_running(self) -> bool:
        """Whether it is among the callers of what runs in this thread right now, as far as is known."""
        return self.python is None or _is_caller(self.python, sys._getframe(1))


def _is_caller(sought: FrameType | None, frame: FrameType | None) -> bool:
    while frame is not None:
        if frame is sought:
            return True
        frame = frame.f_back
    return False


class Calls(threading.local):
    """The calls of one model under way in this thread, the innermost last.

    Attributes:
        ahead: what is wanted of the text model while it runs on images alone.
    """

    everywhere: dict[int, list[Entry]]  # by thread

    def __init__(self, everywhere: dict[int, list[Entry]]) -> None:
        self.stack: list[Entry] = []
        self.ahead: Ahead | None = None
        self.everywhere = everywhere
        everywhere[threading.get_ident()] = self.stack

    def are_running(self) -> bool:
        """Whether any thread is in the middle of a call."""
        now = sys._current_frames()
        return any(
            _is_caller(entry.python, now.get(thread))
            for thread, stack in list(self.everywhere.items())
            for entry in list(stack)
        )

    def begin(self, owner: object, call: Call | None) -> None:
        """A call begins; its state is `call`."""
        self.stack.append(Entry(owner, call, _module_call()))

    def end(self, owner: object) -> Entry | None:
        """The call of `owner` that is running ends; None if it is not its own (the model's inner model)."""
        while self.stack:
            last = self.stack[-1]
            if last.is_running():
                return self.stack.pop() if last.owner is owner else None
            self.stack.pop()
        return None

    def drop_interrupted(self) -> None:
        """Forget what an interrupt, after which no hooks run, has left behind."""
        while self.stack and (self.stack[-1].python is None or not self.stack[-1].is_running()):
            self.stack.pop()


_MODULE_FILE = torch.nn.modules.module.__file__


def _module_call() -> FrameType | None:
    """The interpreter's outermost frame of the module call that runs the hook: it sees exceptions, too."""
    caller: FrameType | None = sys._getframe(2)
    while caller is not None and caller.f_code.co_filename != _MODULE_FILE:
        caller = caller.f_back
    while (
        caller is not None and caller.f_back is not None and caller.f_back.f_code.co_filename == _MODULE_FILE
    ):
        caller = caller.f_back
    return caller
