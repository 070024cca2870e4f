"""What a pruning method is: it declares what it needs, sees one image, and returns what to keep.

A method knows nothing of batches, padding, caches, hooks or positions; the runtime turns its selections into
shorter tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenprune.errors import ConfigError, TokenPruneError

State = Literal["query", "key", "value", "hidden"]


@dataclass(frozen=True)
class Grid:
    """Spatial layout of visual tokens: `frames` (or crops) x `height` x `width` in raster order.

    Each token was made of `merge` x `merge` patches of the vision tower.
    """

    frames: int
    height: int
    width: int
    merge: int = 1

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class DecoderShape:
    """The decoder a method is about to be used with, for `Method.check`."""

    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int


@dataclass(frozen=True)
class VisionAttention:
    """Queries and keys of the vision layer whose output becomes the features, for one picture.

    That is what the tower attends within: an image, or one of its crops, or a frame of a video.
    Only the rows a method asks for are ever computed; an n x n map is not materialised.

    Attributes:
        query: (heads, m, head_dim), m = patches, plus one when the tower has a CLS token (it comes first).
        key: (heads, m, head_dim).
        scale: factor on the dot products.
        has_cls: whether token 0 is a CLS token.
        real: (m,) bool, False at patches of padding, to which nothing attends; None where there are none.
    """

    query: Tensor
    key: Tensor
    scale: float
    has_cls: bool
    real: Tensor | None = None

    def rows(self, index: Tensor) -> Tensor:
        """Attention probabilities of the given query tokens, (heads, len(index), m), float32."""
        logits = self.query[:, index].float() @ self.key.float().transpose(1, 2) * self.scale
        if self.real is not None:
            logits = logits.masked_fill(~self.real, float("-inf"))
        return logits.softmax(-1)

    def cls_row(self) -> Tensor:
        """Attention from CLS to each patch, mean over heads, (n,).

        Raises:
            ConfigError: the tower has no CLS token.
        """
        if not self.has_cls:
            raise ConfigError("this vision tower has no CLS token; use the received attention instead")
        first = torch.zeros(1, dtype=torch.long, device=self.query.device)
        return self.rows(first)[:, 0, 1:].mean(0)

    def received(self, chunk: int = 256) -> Tensor:
        """Mean attention each patch receives from all patches, (n,): c[j] = mean_i A[i, j], mean over heads.

        Patches of padding neither give nor receive any.
        """
        start = int(self.has_cls)
        m, device = self.query.shape[1], self.query.device
        gives = torch.ones(m, device=device) if self.real is None else self.real.float()
        total = torch.zeros(m, device=device)
        for low in range(start, m, chunk):
            index = torch.arange(low, min(low + chunk, m), device=device)
            total += gives[low : low + chunk] @ self.rows(index).mean(0)
        return total[start:] / gives[start:].sum()


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
class Selection:
    """What one image keeps at one cut. All indices count the image's tokens *at this cut* (0 .. n - 1).

    Attributes:
        keep: (k,) long, ascending.
        merges: (m, 2) long pairs (source, slot), or None: the state of each slot named is replaced by the
            weighted sum of its sources (the slot itself is one only if listed). Slots must be kept tokens.
        weights: (m,) float weights of the pairs.
        notes: how often something worth telling happened, by what it was ("scores that were no numbers"): ints, or
            integer tensors () that are read only when the report is. Those above 0 stand in it.
    """

    keep: Tensor
    merges: Tensor | None = None
    weights: Tensor | None = None
    notes: Mapping[str, int | Tensor] = field(default_factory=dict)


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
