"""What a pruning method is: it declares what it needs, sees one image, and returns what to keep.

A method knows nothing of batches, padding, caches, hooks or positions; the runtime turns its selections into
shorter tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.errors import ConfigError, TokenPruneError
from tokenprune.tokens import Grid, Selection, State, VisionAttention


@dataclass(frozen=True)
class DecoderShape:
    """The decoder a method is about to be used with, for `Method.check`."""

    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int


@dataclass(frozen=True)
class Needs:
    """What a method wants to see at a cut entering layer K.

    Attributes:
        states: "query" / "key" (post-RoPE), "value": of layer K - 1; "hidden": the states entering layer K.
        vision: a function from `VisionAttention` to a float per patch, evaluated inside the vision tower's hook;
            `ImageTokens.vision` is its results, averaged as the model merges patches into tokens.
        digest: whether a seed made from the image's pixels and the prompt is wanted.
    """

    states: tuple[State, ...] = ()
    vision: Callable[[VisionAttention], Tensor] | None = None
    digest: bool = False


@dataclass(frozen=True)
class ImageTokens:
    """One image of one sample, as a method sees it.

    Attributes:
        n: visual tokens that remain at this cut.
        raster: (n,) their raster indices among the image's original tokens, ascending.
        grids: layout of the original tokens, one grid per view of the image (a thumbnail and the tiled image).
        query, key, value: (n, heads, head_dim), see `Needs.states`; key and value have the KV heads.
        hidden: (n, hidden_size).
        num_heads: attention heads of the decoder.
        vision: (n,) what `Needs.vision` returned for the remaining tokens.
        digest: scalar int64 tensor, on the device.
        frame_floor: tokens every frame (or view) has to keep.
    """

    n: int
    raster: Tensor
    grids: tuple[Grid, ...]
    num_heads: int = 0
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    hidden: Tensor | None = None
    vision: Tensor | None = None
    digest: Tensor | None = None
    frame_floor: int = 0

    @property
    def frames(self) -> int:
        """Frames of all views."""
        return sum(grid.frames for grid in self.grids)

    def frame(self) -> Tensor:
        """(n,) the frame (counted over all views) each remaining token lies in."""
        sizes = [grid.height * grid.width for grid in self.grids for _ in range(grid.frames)]
        ends = torch.tensor(sizes).cumsum(0).to(self.raster.device, non_blocking=True)
        return torch.searchsorted(ends, self.raster, right=True)


@dataclass(frozen=True)
class Method(ABC):
    """Base of all pruning methods. Parameters are dataclass fields, checked in `__post_init__`.

    Class attributes:
        name: what users type.
        paper: citation, or "" for a control.
        min_layer: the smallest layer the method can cut at (0 is before the LLM).
        reads_text: whether a text token after the image can change what is kept.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    min_layer: ClassVar[int] = 0
    reads_text: ClassVar[bool] = False

    @abstractmethod
    def needs(self) -> Needs:
        """What `select` will find in its `ImageTokens`."""

    def check(self, shape: DecoderShape) -> None:  # noqa: B027  # most methods fit every decoder
        """Refuse a decoder the method cannot work with; called by `wrap`, before anything changes.

        Raises:
            ConfigError: says which parameter to change.
        """

    @abstractmethod
    def select(self, image: ImageTokens, k: int) -> Selection:
        """Choose `k` of the image's `n` tokens, 1 <= k < n. Must not copy anything from the device to the host."""


@dataclass(frozen=True)
class ScoreMethod(Method):
    """A method that keeps the k tokens of largest score; equal scores: the lower index wins, NaN comes last.

    With a `frame_floor` the best tokens of every frame come first.
    """

    @abstractmethod
    def score(self, image: ImageTokens) -> Tensor:
        """(n,) importance of each token, larger is kept."""

    def select(self, image: ImageTokens, k: int) -> Selection:
        score = self.score(image)
        if score.shape != (image.n,):
            raise TokenPruneError(
                f"method {self.name!r} returned scores {tuple(score.shape)} where {image.n} were asked for"
            )
        # Ascending order puts NaN last; whole numbers have none, and the least of them no negative.
        floats = score.is_floating_point()
        order = (
            (-score).sort(stable=True).indices if floats else score.sort(descending=True, stable=True).indices
        )
        if image.frame_floor:
            beyond = _rank_in_frame(image, order) >= image.frame_floor
            order = order[beyond[order].long().sort(stable=True).indices]
        return Selection(order[:k].sort().values, notes={"scores that were no numbers": score.isnan().sum()})


def _rank_in_frame(image: ImageTokens, order: Tensor) -> Tensor:
    """(n,) place of each token among those of its frame, the best being 0."""
    frame = image.frame()
    by_frame = order[frame[order].sort(stable=True).indices]
    sizes = torch.zeros(image.frames, dtype=torch.long, device=frame.device).index_add_(
        0, frame, torch.ones_like(frame)
    )
    start = sizes.cumsum(0) - sizes
    place = torch.arange(image.n, device=frame.device)
    return torch.empty_like(place).index_copy_(0, by_frame, place - start[frame[by_frame]])


@dataclass(frozen=True)
class Choice:
    """Marks a string parameter with the values it may take (used for validation and `tokenprune methods`)."""

    values: tuple[str, ...] = field(default=())

    def check(self, name: str, value: object) -> None:
        if value not in self.values:
            raise ConfigError(f"{name} must be one of {', '.join(self.values)}, not {value!r}")
