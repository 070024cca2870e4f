"""GLM-4.1V, 4.5V and 4.6V: Qwen2-VL's layout, but a video's frames stand one by one, as images do."""

from __future__ import annotations

from dataclasses import replace

from tokenprune.models.base import Layout
from tokenprune.models.qwen2_vl import Qwen2VL
from tokenprune.tokens import IntArray


class Glm4v(Qwen2VL):
    """Images and videos share a placeholder; a call brings one kind. A frame is a picture to the tower."""

    name = "glm4v"
    model_types = ("glm4v", "glm46v", "glm4v_moe", "glm_ocr")
    examples = ("zai-org/GLM-4.1V-9B-Thinking", "zai-org/GLM-4.6V-Flash", "zai-org/GLM-4.5V")

    sizes_ahead = True  # its tower does not know videos

    def token_id(self, kind: str) -> int:
        return super().token_id("image")

    def layouts(self, kind: str, sizes: IntArray) -> list[Layout]:
        made = super().layouts(kind, sizes)
        return [replace(one, items=one.grids[0].frames) for one in made] if kind == "video" else made
