"""PaliGemma (1 and 2): every patch one token, and a prompt that attends in both directions."""

from __future__ import annotations

from torch import nn

from tokenprune.models.crops import Crops


class PaliGemma(Crops):
    """One image gives (H / patch) x (W / patch) tokens at the head of the prompt."""

    name = "paligemma"
    model_types = ("paligemma",)
    examples = ("google/paligemma-3b-mix-224", "google/paligemma2-3b-mix-224")
    first_position = 1

    def merge(self, model: nn.Module) -> int:
        return 1
