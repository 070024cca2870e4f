"""What a pruning method is: it declares what it needs, sees one image (`seen.py`), and returns what to keep.

A method knows nothing of batches, padding, caches, hooks or positions; the runtime turns its selections into
shorter tensors.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.budget import Cut, Keep
from tokenprune.errors import ConfigError, TokenPruneError
from tokenprune.methods.seen import ImageTokens, Needs
from tokenprune.space import Dimension, Point, Setting, Whole
from tokenprune.tokens import DecoderShape, Selection

# EntropyPrune's, arXiv 2602.17196. What has published none of its own, the controls for example, cuts there too.
ENTROPYPRUNE_LAYERS: Mapping[str, int] = MappingProxyType({"llava": 2, "qwen2_5_vl": 1})


@dataclass(frozen=True)
class Method(ABC):
    """Base of all pruning methods. Parameters are dataclass fields, checked in `__post_init__`.

    Class attributes:
        name: what users type.
        paper: citation, or "" for a control.
        min_layer: the smallest layer the method can cut at (0 is before the LLM).
        reads_text: whether a text token after the image can change what is kept.
        published_layers: the cut's layer published for the method, by family.
        before_llm: whether its cut was published before the LLM, for all of them.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    min_layer: ClassVar[int] = 0
    reads_text: ClassVar[bool] = False
    published_layers: ClassVar[Mapping[str, int]] = ENTROPYPRUNE_LAYERS
    before_llm: ClassVar[bool] = False

    @abstractmethod
    def needs(self) -> Needs:
        """What `select` will find in its `ImageTokens`."""

    def at(self, cut: int) -> Method:
        """The method that is asked at a cut: itself, unless it is made of several."""
        return self

    def reads(self) -> bool:
        """Whether a text token after the image can change what is kept: `reads_text`, unless it is made of others."""
        return self.reads_text

    def described(self) -> dict[str, Any]:
        """Its parameters, for reports."""
        return dataclasses.asdict(self)

    def check(self, shape: DecoderShape) -> None:  # noqa: B027  # most methods fit every decoder
        """Refuse a decoder the method cannot work with; called by `wrap`, before anything changes.

        Raises:
            ConfigError: says which parameter to change.
        """

    def default_cuts(
        self, family: str, num_layers: int, keep: Keep | None = None
    ) -> tuple[tuple[Cut, ...], str]:
        """Where to cut a family's model when nobody says, the last cut solved from the budget; and why there.

        Args:
            family: its name.
            num_layers: decoder layers L.
            keep: the budget; None where forced lists say what is kept.

        Default: one cut, before the LLM or at the layer published for the method and family, else at L / 16.
        """
        if self.before_llm:
            return (Cut(0),), "before the LLM, as published"
        published = self.published_layers.get(family)
        if published is not None and published < num_layers:
            return (Cut(published),), f"published for {family}"
        return (Cut(max(1, round(num_layers / 16))),), "L / 16"

    @classmethod
    def search_space(cls, setting: Setting) -> Mapping[str, Dimension] | None:
        """What `tokenprune tune` may vary, by name; None: nothing, and the method is left out of searches."""
        return None

    @classmethod
    def arguments_at(cls, point: Point, setting: Setting) -> dict[str, Any]:
        """A point of the search space as arguments of `wrap`, but for the method and the budget."""
        return dict(point)

    def count(self, image: ImageTokens, planned: tuple[int, ...]) -> Tensor:
        """How many tokens an image is to keep after each cut, told before layer 0; only with `Needs.counts`.

        Args:
            image: as it is then: features, words, vision and pixels, no states.
            planned: what the budget says.

        Returns:
            (cuts,) long, on the device. The runtime keeps them within 1 and n, and from growing.
        """
        raise NotImplementedError

    @abstractmethod
    def select(self, image: ImageTokens, k: int) -> Selection:
        """Choose `k` of the image's `n` tokens, 1 <= k < n. Must not copy anything from the device to the host."""

    def select_all(self, images: Sequence[ImageTokens], counts: Sequence[int]) -> list[Selection]:
        """`select` for all images of a call that lose tokens at a cut; a method may do them in one go."""
        return [self.select(image, k) for image, k in zip(images, counts, strict=True)]


@dataclass(frozen=True)
class ScoreMethod(Method):
    """A method that keeps the k tokens of largest score; equal scores: the lower index wins, NaN comes last.

    With a `frame_floor` the best tokens of every frame come first.

    Class attributes:
        pointwise: whether a token's score is a floating number that depends on `Needs.states` of that token alone, so
            that the images of a batch may be scored in one go, as one image of no grid (`ranked` and `notes` are then
            not asked).
    """

    pointwise: ClassVar[bool] = False

    @abstractmethod
    def score(self, image: ImageTokens) -> Tensor:
        """(n,) importance of each token, larger is kept."""

    def checked_score(self, image: ImageTokens) -> Tensor:
        """`score`, refused where its shape is wrong.

        Raises:
            TokenPruneError: says which shape was asked for.
        """
        score = self.score(image)
        if score.shape != (image.n,):
            raise TokenPruneError(
                f"method {self.name!r} returned scores {tuple(score.shape)} where {image.n} were asked for"
            )
        return score

    def notes(self, image: ImageTokens) -> Mapping[str, int | Tensor]:
        """What is to be told of an image in the report; see `Selection.notes`."""
        return {}

    def ranked(self, image: ImageTokens, score: Tensor, k: int) -> Tensor:
        """(n,) by what k tokens are chosen: the score, unless a method takes some of them for another reason."""
        return score

    def best(self, image: ImageTokens, score: Tensor, k: int) -> Selection:
        """The k tokens of largest score, as `ranked` has it."""
        score = self.ranked(image, score, k)
        order = _descending(score)
        if image.frame_floor:
            beyond = _rank_in_frame(image, order) >= image.frame_floor
            order = order[beyond[order].long().sort(stable=True).indices]
        missing = {"scores that were no numbers": score.isnan().sum()} if score.is_floating_point() else {}
        return Selection(order[:k].sort().values, notes={**missing, **self.notes(image)})

    def select(self, image: ImageTokens, k: int) -> Selection:
        return self.best(image, self.checked_score(image), k)

    def select_all(self, images: Sequence[ImageTokens], counts: Sequence[int]) -> list[Selection]:
        joined = getattr(images, "joined", None)
        if not self.pointwise or joined is None or len(images) < 2:
            return super().select_all(images, counts)
        whole = joined()
        if whole is None:  # too many to be held at once, perhaps
            half = len(images) // 2
            return [
                *self.select_all(images[:half], counts[:half]),
                *self.select_all(images[half:], counts[half:]),
            ]
        score = self.checked_score(whole)
        sizes = [b - a for a, b in pairwise((*whole.starts, whole.n))]
        kept: Sequence[Tensor]
        missing: Sequence[Tensor]
        if len(set(sizes)) == len(set(counts)) == 1:  # one sort for all
            score = score.view(len(sizes), -1)
            kept = _descending(score)[:, : counts[0]].sort().values.unbind()
            missing = score.isnan().sum(1).unbind()
        else:
            parts = score.split(sizes)
            kept = [_descending(own)[:k].sort().values for own, k in zip(parts, counts, strict=True)]
            missing = [own.isnan().sum() for own in parts]
        return [
            Selection(own, notes={"scores that were no numbers": nan})
            for own, nan in zip(kept, missing, strict=True)
        ]


def _descending(score: Tensor) -> Tensor:
    """Indices by score, the largest first, NaN last; equal ones in their order."""
    # Ascending order puts NaN last; whole numbers have none, and the least of them no negative.
    if score.is_floating_point():
        return (-score).sort(stable=True).indices
    return score.sort(descending=True, stable=True).indices


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


#: Numbers that one group of images may compare pairwise at a time.
_PAIRS = 2**26


def select_alike(
    images: Sequence[ImageTokens],
    counts: Sequence[int],
    choose: Callable[[Sequence[ImageTokens], int], Tensor],
) -> list[Selection]:
    """Selections of many images, those of one size at a time: what waits for itself step by step waits once for all.

    Args:
        images, counts: as of `Method.select_all`.
        choose: (b, k) indices of b images, which have the same n, in any order.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (image, k) in enumerate(zip(images, counts, strict=True)):
        groups.setdefault((image.n, k), []).append(i)
    found: dict[int, Selection] = {}
    for (n, k), group in groups.items():
        most = max(1, _PAIRS // n**2)
        for part in (group[i : i + most] for i in range(0, len(group), most)):
            kept = choose([images[i] for i in part], k).sort(dim=1).values
            found |= {
                i: Selection(own.to(images[i].raster.device)) for i, own in zip(part, kept, strict=True)
            }
    return [found[i] for i in range(len(images))]


def stacked(images: Sequence[ImageTokens], name: str) -> Tensor:
    """(b, n, ...) an attribute of images of one size."""
    return torch.stack([getattr(image, name) for image in images])


@dataclass(frozen=True)
class Choice:
    """Marks a string parameter with the values it may take (used for validation and `tokenprune methods`)."""

    values: tuple[str, ...] = field(default=())

    def check(self, name: str, value: object) -> None:
        if value not in self.values:
            raise ConfigError(f"{name} must be one of {', '.join(self.values)}, not {value!r}")


def check_count(name: str, value: object, least: int = 0) -> None:
    """Raises ConfigError for what is no number of tokens, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a number of tokens, {least} or more, not {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raises ConfigError for what is neither True nor False: "no" would mean yes."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, not {value!r}")


def cut_layers(setting: Setting, lowest: int = 1) -> Whole:
    """Layers at which a single cut can meet an average budget: K / L lies well below it."""
    keep = setting.keep
    highest = (
        setting.num_layers // 2 if isinstance(keep, int) else math.floor(0.8 * keep * setting.num_layers)
    )
    highest = max(lowest, min(highest, setting.num_layers - 1))
    return Whole(lowest, highest, min(max(lowest, setting.default_layer), highest))
