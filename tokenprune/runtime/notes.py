"""Which outcome a thread or task is told of: its own last one. And functions that another thread runs for it."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from typing import Any, ParamSpec, TypeVar

from tokenprune.runtime.outcome import Outcome

P = ParamSpec("P")
R = TypeVar("R")


class _Notes:
    """The last outcomes of a thread or a task, by model.

    A thread that a task waits for (asyncio.to_thread) gets a copy of the task's context, and with it the task's notes.
    """

    def __init__(self) -> None:
        self.thread, self.task = threading.get_ident(), _task()
        self.outcomes: weakref.WeakKeyDictionary[Any, Outcome] = weakref.WeakKeyDictionary()

    def are_own(self) -> bool:
        """Whether they are this thread's or task's, or of the task that waits for this thread."""
        task = _task()
        if task is None:
            return self.task is not None or self.thread == threading.get_ident()
        return self.task is not None and self.task() is task()


_NOTES: ContextVar[_Notes | None] = ContextVar("tokenprune_notes", default=None)


def _task() -> weakref.ref[Any] | None:
    """The asyncio task that runs in this thread."""
    asyncio = sys.modules.get("asyncio")
    try:
        task = None if asyncio is None else asyncio.current_task()
    except RuntimeError:  # no loop runs
        return None
    return None if task is None else weakref.ref(task)


def note_outcome(owner: object, outcome: Outcome) -> None:
    """Make it this thread's or task's last."""
    _own_notes().outcomes[owner] = outcome


def in_context(function: Callable[P, R]) -> Callable[P, R]:
    """The function, to be run by another thread with the overrides of this thread or task.

    A new thread has none of itself (nor of any other context variable), so that `with override(...)` around a thread
    that generates, as streamers have it, would change nothing: give `Thread(target=in_context(model.generate))`. What
    it has reported is this thread's then.

    Example:
        >>> Thread(target=tokenprune.in_context(model.generate), kwargs=inputs).start()  # doctest: +SKIP
    """
    context = copy_context()
    notes = _own_notes()

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        own = context.copy()  # a context is entered by one thread at a time
        try:
            return own.run(function, *args, **kwargs)
        finally:
            made = own.get(_NOTES)
            if made is not None and made is not notes:
                notes.outcomes.update(made.outcomes)

    return run


def _own_notes() -> _Notes:
    notes = _NOTES.get()
    if notes is None or not notes.are_own():
        notes = _Notes()
        _NOTES.set(notes)
    return notes


def last_outcome(owner: object) -> Outcome | None:
    """This thread's or task's."""
    notes = _NOTES.get()
    return notes.outcomes.get(owner) if notes is not None and notes.are_own() else None
