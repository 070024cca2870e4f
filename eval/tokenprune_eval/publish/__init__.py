"""What stands in README and docs, out of committed measurements: ``python -m tokenprune_eval.publish``."""
