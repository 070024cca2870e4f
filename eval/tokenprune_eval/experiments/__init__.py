"""Arms on a testbed's held-out questions, a row each: ``python -m tokenprune_eval.experiments NAME``."""
