"""PaliGemma (1 and 2): every patch one token, and a prompt that attends in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune.models.crops import Crops


class PaliGemma(Crops):
    """One image gives (H / patch) x (W / patch) tokens at the head of the prompt."""

    name = "paligemma"
    model_types = ("paligemma",)
    examples = ("google/paligemma-3b-mix-224", "google/paligemma2-3b-mix-224")
    first_position = 1

    def merge(self) -> int:
        return 1

    def blocks(self, inputs: Mapping[str, Any], total: int) -> Tensor | None:
        types = inputs.get("token_type_ids")
        if types is None:
            return None
        return torch.where(torch.nn.functional.pad(types, (total - types.shape[1], 0), value=1) == 0, 0, -1)
