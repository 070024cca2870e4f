"""tokenprune: one call, and a stock multimodal model answers with a fraction of its visual tokens."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tokenprune.budget import Cut, Escalate
from tokenprune.errors import (
    BudgetError,
    ConfigError,
    NothingPrunedWarning,
    OverrideWarning,
    TokenPruneError,
    UnsupportedModeError,
    UnsupportedModelError,
    UntestedWarning,
)

if TYPE_CHECKING:
    from tokenprune.adaptive import Adaptive
    from tokenprune.analysis.budgets import calibrate, calibrate_escalation
    from tokenprune.analysis.collapse import NoCollapseError, detect_ecl
    from tokenprune.api import in_context, is_wrapped, override, pruned, report, unwrap, wrap
    from tokenprune.arguments import Arguments
    from tokenprune.profiles.profile import Profile
    from tokenprune.reporting import Report

__version__ = "0.1.0"

__all__ = [
    "Adaptive",
    "Arguments",
    "BudgetError",
    "ConfigError",
    "Cut",
    "Escalate",
    "NoCollapseError",
    "NothingPrunedWarning",
    "OverrideWarning",
    "Profile",
    "Report",
    "TokenPruneError",
    "UnsupportedModeError",
    "UnsupportedModelError",
    "UntestedWarning",
    "calibrate",
    "calibrate_escalation",
    "detect_ecl",
    "in_context",
    "is_wrapped",
    "override",
    "pruned",
    "report",
    "unwrap",
    "wrap",
]

_HOME = {
    "Adaptive": "tokenprune.adaptive",
    "calibrate": "tokenprune.analysis.budgets",
    "calibrate_escalation": "tokenprune.analysis.budgets",
    "Arguments": "tokenprune.arguments",
    "NoCollapseError": "tokenprune.analysis.collapse",
    "Profile": "tokenprune.profiles.profile",
    "detect_ecl": "tokenprune.analysis.collapse",
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers at the first use: `tokenprune --help` does without them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_HOME.get(name, "tokenprune.api")), name)
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] != "tokenprune_kernels":
            raise
        raise ImportError(
            "the kernels are missing: pip install tokenprune-vlm brings them; in a checkout, pip install -e . or add "
            "the folder kernels to PYTHONPATH"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
