"""What belongs to the thread or task that runs: the settings in effect, the calls under way.

Hooks know no settings. A call takes its own on entry: those of the innermost `override` of its thread or task, else
those of `wrap`. Overrides are context variables, so a task has its own and a new thread starts from wrap's; calls under
way are a stack per thread, for a forward is never suspended.
"""

from __future__ import annotations

import gc
import sys
import threading
import warnings
import weakref
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

from tokenprune.config import PruneConfig
from tokenprune.errors import OverrideWarning
from tokenprune.runtime import compiled
from tokenprune.runtime.call import Call
from tokenprune.runtime.layer_states import Ahead


@dataclass(frozen=True, eq=False)
class Override:
    """An `override` in force.

    Attributes:
        owner: the runtime whose calls it is for.
        config: what they are asked.
        threads: that were alive when it began, by number.
    """

    owner: Any
    config: PruneConfig
    threads: frozenset[int | None] = field(
        default_factory=lambda: frozenset(thread.ident for thread in threading.enumerate())
    )


# Weak: an override is in force as long as the block that made it lives, whatever interrupts its beginning or its end.
_OVERRIDES: ContextVar[tuple[weakref.ref[Override], ...]] = ContextVar("tokenprune_overrides", default=())


def begin_override(override: Override) -> None:
    _OVERRIDES.set((*_OVERRIDES.get(), weakref.ref(override)))


def end_override(override: Override) -> None:
    _OVERRIDES.set(tuple(o for o in _OVERRIDES.get() if o() not in (None, override)))


def overrides_here(owner: object) -> list[Override]:
    """This thread's or task's overrides of a model, the innermost last."""
    return [own for own in (o() for o in _OVERRIDES.get()) if own is not None and own.owner is owner]


def warn_of_missed(overrides: Collection[Override]) -> None:
    """A call has none of these, which are of other threads and tasks: say so where its thread was begun inside one."""
    if any(threading.get_ident() not in override.threads for override in overrides):
        warnings.warn(
            "this thread was started inside a tokenprune.override, which is of the thread that made it: the call runs "
            "without; start the thread with tokenprune.in_context(function) as its target",
            OverrideWarning,
            stacklevel=2,
        )


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
    """Whether `sought` is `frame`, or among its callers."""
    while frame is not None:
        if frame is sought:
            return True
        frame = frame.f_back
    return False


GENERATE, LOGITS_PROCESSORS = "transformers/generation/utils.py", "transformers/generation/logits_process.py"


def called_from(file: str) -> bool:
    """Whether a function of a file of transformers is among the callers of what runs in this thread right now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.endswith(file):
        frame = frame.f_back
    return frame is not None


class Calls(threading.local):
    """The calls of one model under way in this thread, the innermost last.

    No hook runs after a KeyboardInterrupt, so what such a call held is let go by the next garbage collection or call,
    whichever comes first.

    Attributes:
        ahead: what is wanted of the text model while it runs on images alone.
        trying: whether a prompt runs once more, unpruned, to compare with; see `trial.py`.
    """

    everywhere: dict[int, list[Entry]]  # by thread

    def __init__(self, everywhere: dict[int, list[Entry]]) -> None:
        self.stack: list[Entry] = []
        self.ahead: Ahead | None = None
        self.trying = False
        self._tower: tuple[object, FrameType | None] | None = None
        self.everywhere = everywhere
        everywhere[threading.get_ident()] = self.stack
        self._watch = _Watch(weakref.ref(self))

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
        self._watch.begin()
        entry = Entry(owner, call, _module_call())
        self.stack.append(entry)
        if call is not None and call.stages is not None:
            compiled.eager.begin(entry)

    def end(self, owner: object) -> Entry | None:
        """The call of `owner` that is running ends; None if it is not its own (the model's inner model)."""
        for last in reversed(list(self.stack)):
            if last.is_running():
                if last.owner is not owner:
                    return None
                self._forget(last)
                self._rest()
                return last
            self._forget(last)
        return None

    def enter_tower(self, state: object) -> None:
        """A call of the vision tower begins."""
        self._watch.begin()
        self._tower = state, _module_call()

    def leave_tower(self) -> None:
        """It ends."""
        self._tower = None
        self._rest()

    @property
    def tower(self) -> Any:
        """The state of the vision tower's call under way; None where there is none."""
        return None if self._tower is None else self._tower[0]

    def running(self) -> Call | None:
        """The innermost call of this thread that has not been interrupted."""
        return next((entry.call for entry in reversed(list(self.stack)) if entry.is_running()), None)

    def drop_interrupted(self, unknown: bool = True) -> None:
        """Forget what an interrupt, after which no hooks run, has left behind.

        Args:
            unknown: also calls of which nobody knows whether they run.
        """
        for entry in reversed(list(self.stack)):
            if entry.is_running() and not (unknown and entry.python is None):
                break
            self._forget(entry)
        if self._tower is not None:
            _, python = self._tower
            if unknown if python is None else not _is_caller(python, sys._getframe()):
                self._tower = None

    def _forget(self, entry: Entry) -> None:
        # An interrupt may come in between: what is still on the stack is forgotten once more.
        compiled.eager.end(entry)
        # By identity: a garbage collection, which forgets too, may come between any two steps of this thread.
        self.stack[:] = [own for own in self.stack if own is not entry]

    def _rest(self) -> None:
        if not self.stack and self._tower is None:
            self._watch.end()

    def close(self) -> None:
        """Forget everything of this thread."""
        for entry in list(self.stack):
            self._forget(entry)
        self._tower = self.ahead = None
        self._watch.end()


class _Watch:
    """Looks for interrupted calls at garbage collections, while there are calls."""

    def __init__(self, calls: weakref.ref[Calls]) -> None:
        self._calls = calls

    def begin(self) -> None:
        if self not in gc.callbacks:
            gc.callbacks.append(self)

    def end(self) -> None:
        if self in gc.callbacks:
            gc.callbacks.remove(self)

    def __call__(self, phase: str, info: Mapping[str, int]) -> None:
        calls = self._calls()
        if calls is None:  # its thread, or the model, has ended in the middle of a call
            self.end()
        elif phase == "start" and info["generation"]:
            calls.drop_interrupted(unknown=False)


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
