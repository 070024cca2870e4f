"""Prefill, decoding and memory of a pruned model, against the unpruned one and against the ideal."""
