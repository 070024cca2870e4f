"""Hooks, masks, caches: what turns keep lists into shorter tensors."""
