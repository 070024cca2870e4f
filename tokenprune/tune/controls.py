"""What a drift has to be compared with: methods that look at nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenprune.analysis.memory import Memory
from tokenprune.budget import Keep
from tokenprune.errors import BudgetError, ConfigError, UnsupportedModelError
from tokenprune.tune.drift import measure

CONTROLS = ("random", "uniform")


def control_drifts(
    model: Any, batches: Sequence[Mapping[str, Any]], keep: Keep, memory: Memory, metric: str = "cosine"
) -> dict[str, NDArray[np.float64]]:
    """Each control's drift of each prompt at an average budget, cut before the LLM; for arguments see `measure`.

    There they lose least, on what was measured (docs/results.md); a control that the model or budget does not allow is
    left out.
    """
    found = {}
    for method in CONTROLS:
        try:
            found[method] = measure(
                model, batches, {"method": method, "layer": 0, "keep": keep}, memory, metric
            )
        except (BudgetError, ConfigError, UnsupportedModelError):
            continue
    return found
