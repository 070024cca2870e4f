"""Qwen2.5-VL: Qwen2-VL with windows in its vision tower, and videos timed in seconds."""

from __future__ import annotations

from tokenprune.models.qwen2_vl import Qwen2VL


class Qwen25VL(Qwen2VL):
    """Nothing differs where we look."""

    name = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    examples = ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct")
    published_layer = 1
