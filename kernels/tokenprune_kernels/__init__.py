"""Kernels of tokenprune: one folder per operation, each with its reference, its backends and one public function."""
