"""Finding out what a model stands: drift of its last state between pruned and whole, without labels."""

from tokenprune.tune.drift import METRICS, measure
from tokenprune.tune.quick import Trial, quick

__all__ = ["METRICS", "Trial", "measure", "quick"]
