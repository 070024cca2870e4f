"""Everything tokenprune raises or warns with. Each message is one line that says what to do."""

from __future__ import annotations


class TokenPruneError(Exception):
    """Base of all errors of this library; catching it catches every refusal."""


class ConfigError(TokenPruneError, ValueError):
    """An argument of `wrap` / `override` is unknown, of the wrong type, or out of range."""


class BudgetError(ConfigError):
    """The number of tokens to keep cannot be met; the message names the reachable range."""


class UnsupportedModelError(TokenPruneError, TypeError):
    """The model (or the installed transformers) is not one this library can prune."""


class UnsupportedModeError(TokenPruneError, RuntimeError):
    """This way of calling the model cannot be pruned exactly, so it is refused before anything changes."""


class NothingPrunedWarning(UserWarning):
    """The call had visual tokens and a budget below all of them, and yet nothing was pruned."""


class OverrideWarning(UserWarning):
    """A thread that was started inside an `override` runs without it; `in_context` takes it along."""


class SkippedFilesWarning(UserWarning):
    """Files of a folder could not be read and were left out; the message counts and names them."""


class UntestedWarning(UserWarning):
    """Nobody here has tried this: a model of which no profile is known, or a release of transformers."""
