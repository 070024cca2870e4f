"""tokenprune: one call, and a stock multimodal model answers with a fraction of its visual tokens."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tokenprune.budget import Cut
from tokenprune.errors import (
    BudgetError,
    ConfigError,
    NoCollapseError,
    NothingPrunedWarning,
    TokenPruneError,
    UnsupportedModeError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from tokenprune.analysis.collapse import detect_ecl
    from tokenprune.api import is_wrapped, override, pruned, report, unwrap, wrap
    from tokenprune.arguments import Arguments
    from tokenprune.reporting import Report

__version__ = "0.1.0"

__all__ = [
    "Arguments",
    "BudgetError",
    "ConfigError",
    "Cut",
    "NoCollapseError",
    "NothingPrunedWarning",
    "Report",
    "TokenPruneError",
    "UnsupportedModeError",
    "UnsupportedModelError",
    "detect_ecl",
    "is_wrapped",
    "override",
    "pruned",
    "report",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Import torch and transformers at the first use: `tokenprune --help` does without them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # detect_ecl needs pydantic, which the rest does not.
    module = {"detect_ecl": "tokenprune.analysis.collapse", "Arguments": "tokenprune.arguments"}
    value = getattr(importlib.import_module(module.get(name, "tokenprune.api")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
