"""Attention mass that went with dropped tokens, given back to those that stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tokenprune.errors import ConfigError
from tokenprune.methods.around import Around
from tokenprune.methods.seen import ImageTokens, Needs
from tokenprune.tokens import Selection


@dataclass(frozen=True)
class Restore(Around):
    """Another method, and a bias on what it keeps: an image is attended to as much as if it were whole.

    With N tokens of an image and k of them kept, strength log(N / k) is added to the attention logits of the kept ones:
    if those that went would have got as much attention as those that stay, softmax gives the image the same mass as
    before. Where the method merges and says biases of its own (log of sizes), the rest of the mass is shared out:
    strength log(N / sum of sizes) on top of them.

    Source: ours, after ERA (arXiv 2606.31982) and RESTORE (arXiv 2606.01711), which estimate the lost mass from
    attention; this takes it as even, and so needs to look at nothing.

    Args:
        of: what chooses: a name, with its defaults, or an instance.
        strength: 0 gives nothing back, 1 everything.
    """

    name: ClassVar[str] = "restore"
    paper: ClassVar[str] = "after arXiv 2606.31982"

    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        strength = self.strength
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 10:
            raise ConfigError(f"strength must be a number from 0 to 10, not {strength!r}")

    def needs(self) -> Needs:
        return replace(super().needs(), bias=True)

    def select(self, image: ImageTokens, k: int) -> Selection:
        return self.select_all([image], [k])[0]

    def select_all(self, images: Sequence[ImageTokens], counts: Sequence[int]) -> list[Selection]:
        method = self.chooser
        sized, found = method.needs().bias, method.select_all(images, counts)
        return [self._restored(image, own, sized) for image, own in zip(images, found, strict=True)]

    def _restored(self, image: ImageTokens, found: Selection, sized: bool) -> Selection:
        bias = found.bias
        if bias is None:
            sizes = image.sizes if sized else torch.ones_like(image.sizes)
            bias = sizes.to(found.keep.device)[found.keep].log()
        whole = sum(grid.tokens for grid in image.grids)
        lost = math.log(whole) - bias.float().logsumexp(0)
        return replace(found, bias=bias + self.strength * lost)
