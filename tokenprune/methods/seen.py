"""What a pruning method may see: it asks by `Needs`, and gets one image as `ImageTokens`, its row's text as `Text`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.tokens import Grid, State, VisionAttention

PROJECTED: tuple[State, ...] = ("query", "key", "value")


@dataclass(frozen=True)
class Needs:
    """What a method wants to see at a cut entering layer K, and may say there.

    Attributes:
        states: of the image's tokens: "query" / "key" (post-RoPE), "value" of layer K - 1; "hidden": those entering
            layer K.
        prompt: the same of the row's text, in `ImageTokens.prompt`.
        last_row: whether the attention of the prompt's last token in layer K - 1 is wanted.
        features: whether the projector's features are wanted, at every cut.
        words: whether the text's word embeddings are wanted, in `ImageTokens.prompt`.
        vision: a function from `VisionAttention` to a float per patch, or several (patches, c), evaluated inside the
            vision tower's hook; `ImageTokens.vision` is its results, averaged as the model merges patches into tokens.
        pixels: a function from 8-bit RGB patches (patches, 3, h, w) to a float per patch, or several (patches, c),
            evaluated there too.
        digest: whether a seed made from the image's pixels and the prompt is wanted.
        merges: whether selections may merge tokens (refused with `allocation="pooled"`).
        bias: whether selections may carry biases (refused with flash and flex attention).
        ahead: for a cut before the LLM: K, so that `states` are what layer K - 1 (K, for "hidden") would make of the
            image's tokens if they were alone in the prompt. It costs K layers on them.
        counts: whether `Method.count` is to be asked, before layer 0, how many tokens an image keeps. It costs one more
            copy from the device.
        rotary: whether queries and keys must have their rotary embedding. False for what a turn of all heads by the
            same angles does not change: they may then be shown as they were projected, which saves the turn.
    """

    states: tuple[State, ...] = ()
    prompt: tuple[State, ...] = ()
    last_row: bool = False
    features: bool = False
    words: bool = False
    vision: Callable[[VisionAttention], Tensor] | None = None
    pixels: Callable[[Tensor], Tensor] | None = None
    digest: bool = False
    merges: bool = False
    bias: bool = False
    ahead: int | None = None
    counts: bool = False
    rotary: bool = True

    @property
    def projected(self) -> tuple[State, ...]:
        """States of layer K - 1 that have to be caught."""
        wanted = {*self.states, *self.prompt, *(("query", "key") if self.last_row else ())}
        return tuple(state for state in PROJECTED if state in wanted)

    @property
    def not_ahead(self) -> list[str]:
        """What is wanted that is not there before the LLM while images are encoded, as vLLM encodes them."""
        wanted = {
            "states of the decoder": bool(self.states) and self.ahead is None,
            "the prompt's text": bool(self.prompt or self.words or self.last_row),
            "a say in the counts": self.counts,
        }
        return [what for what, wants in wanted.items() if wants]

    @property
    def sees_tower(self) -> bool:
        """Whether the vision tower has to be looked into."""
        return self.vision is not None or self.pixels is not None


@dataclass(frozen=True)
class Text:
    """What a row has beside its images (and padding), in order.

    Attributes:
        columns: (m,) places in the unpruned prompt.
        query, key, value: (m, heads, head_dim), see `Needs.prompt`.
        hidden: (m, hidden_size).
        words: (m, hidden_size) word embeddings, see `Needs.words`.
        behind: how many of them, the last ones, stand behind the row's last image.
        scale: by what the layer multiplies its attention logits.
    """

    columns: Tensor
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    hidden: Tensor | None = None
    words: Tensor | None = None
    behind: int = 0
    scale: float = 1.0

    @property
    def asking(self) -> Tensor:
        """(m, hidden_size) word embeddings behind the row's last image; all of them where none is."""
        assert self.words is not None
        return self.words[-(self.behind or len(self.words)) :]


@dataclass(frozen=True)
class ImageTokens:
    """One image of one sample (or all images of a row, with `allocation="pooled"`), as a method sees it.

    Attributes:
        n: visual tokens that remain at this cut.
        raster: (n,) their raster indices among the image's original tokens, ascending.
        grids: layout of the original tokens, one grid per view of the image (a thumbnail and the tiled image).
        num_heads: attention heads of the decoder.
        cut: number of this cut, from 0.
        starts: raster index at which each image of the row begins; (0,) for one image.
        merged_sizes: `sizes`, or None where nothing was merged yet.
        query, key, value: (n, heads, head_dim), see `Needs.states`; key and value have the KV heads.
        hidden: (n, hidden_size).
        prompt: the row's text, where the method needs any of it.
        last_row: (heads, n) attention probabilities of the prompt's last token in layer K - 1.
        features: (n, hidden_size) as the projector put them out.
        vision: (n,) or (n, c) what `Needs.vision` returned for the remaining tokens.
        pixels: (n,) or (n, c) what `Needs.pixels` returned for them.
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
    cut: int = 0
    starts: tuple[int, ...] = (0,)
    merged_sizes: Tensor | None = None
    prompt: Text | None = None
    last_row: Tensor | None = None
    features: Tensor | None = None
    pixels: Tensor | None = None

    @property
    def sizes(self) -> Tensor:
        """(n,) float32, how many original tokens each stands for: more than 1 where others were merged into it."""
        return (
            torch.ones(self.n, device=self.raster.device) if self.merged_sizes is None else self.merged_sizes
        )

    @property
    def frames(self) -> int:
        """Frames of all views."""
        return sum(grid.frames for grid in self.grids)

    def frame(self) -> Tensor:
        """(n,) the frame (counted over all views) each remaining token lies in."""
        sizes = [grid.height * grid.width for grid in self.grids for _ in range(grid.frames)]
        ends = torch.tensor(sizes).cumsum(0).to(self.raster.device, non_blocking=True)
        return torch.searchsorted(ends, self.raster, right=True)
