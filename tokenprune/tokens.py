"""The words that methods, families and the runtime share: images and their tokens, vision attention, selections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenprune.errors import ConfigError

IntArray = NDArray[np.int64]
State = Literal["query", "key", "value", "hidden"]


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a text decoder."""

    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int


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
class Image:
    """One image (or video) of one row.

    Attributes:
        columns: (n,) columns of `input_ids` that hold its prunable visual tokens, in raster order.
        grids: their layout, one grid per view of the image, one view after the other.
        kind: "image" or "video".
        order: its place among the call's images (or videos), as in `pixel_values`.
        items: which of the pictures the vision tower was given (crops, frames) it consists of, as a range.
        structural: placeholders of it that are never pruned.
        parts: the images pooled into this one (`allocation="pooled"`); empty for an image as it came.
        size: what `Layout.size` says.
        continues: whether it is one more crop of the picture that the image before it shows (Idefics3, SmolVLM).
        cell: the row and column of a crop within its picture; None where it shows all of it.
    """

    columns: IntArray
    grids: tuple[Grid, ...]
    kind: str
    order: int
    items: tuple[int, int]
    structural: int = 0
    parts: tuple[Image, ...] = ()
    size: tuple[int, ...] = ()
    continues: bool = False
    cell: tuple[int, int] | None = None

    @property
    def n(self) -> int:
        return len(self.columns)


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

    def received(self, voters: Tensor | None = None, chunk: int = 256) -> Tensor:
        """Mean attention each patch receives, (n,): c[j] = mean_i A[i, j] over all patches i, mean over heads.

        Patches of padding neither give nor receive any.

        Args:
            voters: (n,) bool or float weights of the patches it is received from, some above 0; None: all alike.
            chunk: rows computed at a time.
        """
        start = int(self.has_cls)
        m, device = self.query.shape[1], self.query.device
        gives = torch.ones(m, device=device) if self.real is None else self.real.float()
        if voters is not None:
            gives = gives * torch.nn.functional.pad(voters.float(), (start, 0))
        total = torch.zeros(m, device=device)
        for low in range(start, m, chunk):
            index = torch.arange(low, min(low + chunk, m), device=device)
            total += gives[low : low + chunk] @ self.rows(index).mean(0)
        return total[start:] / gives[start:].sum()


@dataclass(frozen=True)
class Selection:
    """What one image keeps at one cut. All indices count the image's tokens *at this cut* (0 .. n - 1).

    Attributes:
        keep: (k,) long, ascending.
        merges: (m, 2) long pairs (source, slot), or None: the state of each slot named is replaced by the
            weighted sum of its sources (the slot itself is one only if listed). Slots must be kept tokens.
        weights: (m,) float weights of the pairs.
        bias: (k,) float added to the attention logits of the kept tokens' columns from this cut on, or None; see
            `Needs.bias`. A later cut that gives one again replaces it.
        notes: how often something worth telling happened, by what it was ("scores that were no numbers"): ints, or
            integer tensors () that are read only when the report is. Those above 0 stand in it.
    """

    keep: Tensor
    merges: Tensor | None = None
    weights: Tensor | None = None
    bias: Tensor | None = None
    notes: Mapping[str, int | Tensor] = field(default_factory=dict)

    def merged(self, states: Tensor) -> Tensor:
        """The image's states (n, D) with each merge's slot replaced by the weighted sum of its sources."""
        if self.merges is None or self.weights is None:
            return states
        source, slot = self.merges.to(states.device).unbind(1)
        # Summed in float32 and rounded once.
        parts = states[source].float() * self.weights.to(states.device, torch.float32)[:, None]
        total = parts.new_zeros(states.shape).index_add_(0, slot, parts).to(states.dtype)
        return torch.where(marked(slot, len(states))[:, None], total, states)


def marked(index: Tensor, n: int) -> Tensor:
    """(n,) bool, True at an index."""
    return torch.zeros(n, dtype=torch.bool, device=index.device).index_fill_(0, index, True)
