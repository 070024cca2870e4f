"""Evaluation of token pruning: accuracy tables, benchmarks and the bridge to lmms-eval."""
