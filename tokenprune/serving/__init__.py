"""Pruned models inside serving engines."""
