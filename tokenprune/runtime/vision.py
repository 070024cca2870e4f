"""What is noted while the vision tower runs, and how it reaches the call that uses its features.

generate() may encode images ahead of the model's forward, so the facts travel with the tower's own output object.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

_ATTRIBUTE = "_tokenprune_facts"


@dataclass
class VisionFacts:
    """Of one call of the vision tower, image by image.

    Attributes:
        sizes: (N, 3), see `Family.sizes`.
        digests: (N,) int64 hashes of the pixels, or None when no method asked.
        attention: what `Needs.vision` made of each image's attention, (n,) each.
    """

    sizes: Tensor
    digests: Tensor | None = None
    attention: list[Tensor] = field(default_factory=list)


def read_facts(output: Any) -> VisionFacts | None:
    return getattr(output, _ATTRIBUTE, None)


def attach_facts(output: Any, facts: VisionFacts) -> None:
    # Past ModelOutput's __setattr__: its keys are the output's own.
    object.__setattr__(output, _ATTRIBUTE, facts)
