"""Qwen3.5 (and 3.6, 3.8): Qwen3-VL without deep-stack features, before a decoder that attends in every fourth layer."""

from __future__ import annotations

from tokenprune.models.qwen3_vl import Qwen3VL


class Qwen35(Qwen3VL):
    """Its other layers are Gated DeltaNet: they fold the tokens that are left into a state, and hold no keys."""

    name = "qwen3_5"
    model_types = ("qwen3_5", "qwen3_5_moe")
    examples = ("Qwen/Qwen3.5-27B", "Qwen/Qwen3.5-35B-A3B")
