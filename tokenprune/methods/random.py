"""The control every method has to beat: random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.errors import ConfigError
from tokenprune.hashing import mix
from tokenprune.methods.base import ScoreMethod
from tokenprune.methods.seen import ImageTokens, Needs


@dataclass(frozen=True)
class Random(ScoreMethod):
    """Keeps k tokens drawn uniformly, seeded by (seed, the image's pixels, the prompt up to its last image).

    The draw is an integer hash evaluated on the device: batches, beams, reruns and devices agree, and torch's
    random state is not touched.

    Args:
        seed: another seed is another draw.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed must be an int, not {self.seed!r}")

    def needs(self) -> Needs:
        return Needs(digest=True)

    def score(self, image: ImageTokens) -> Tensor:
        assert image.digest is not None
        start = mix(image.digest + mix(torch.full_like(image.digest, self.seed % (1 << 62))))
        return mix(start + image.raster)
