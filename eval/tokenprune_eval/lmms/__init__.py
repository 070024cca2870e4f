"""The testbed as tasks of lmms-eval, and lmms-eval checked against our own evaluator."""
