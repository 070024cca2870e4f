"""Finding out what a model stands: drift of its last state between pruned and whole, without labels.

`search` (tokenprune.tune.search) and its report need optuna, and are imported from their own files.
"""

from tokenprune.tune.drift import METRICS, measure
from tokenprune.tune.inspect import Inspection, inspect_drift
from tokenprune.tune.quick import Trial, quick

__all__ = ["METRICS", "Inspection", "Trial", "inspect_drift", "measure", "quick"]
