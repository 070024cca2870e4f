"""tokenprune: one call, and a stock multimodal model answers with a fraction of its visual tokens."""

from __future__ import annotations

from tokenprune.api import is_wrapped, override, pruned, report, unwrap, wrap
from tokenprune.budget import Cut
from tokenprune.errors import (
    BudgetError,
    ConfigError,
    NothingPrunedWarning,
    TokenPruneError,
    UnsupportedModeError,
    UnsupportedModelError,
)
from tokenprune.report import Report

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "ConfigError",
    "Cut",
    "NothingPrunedWarning",
    "Report",
    "TokenPruneError",
    "UnsupportedModeError",
    "UnsupportedModelError",
    "is_wrapped",
    "override",
    "pruned",
    "report",
    "unwrap",
    "wrap",
]
