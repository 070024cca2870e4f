"""What a model family is: where visual tokens sit, where layers live, how positions look. Nothing about methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenprune.errors import ConfigError, UnsupportedModelError
from tokenprune.models.decoders import Decoder, attends, find_decoder
from tokenprune.tokens import DecoderShape, Grid, Image, IntArray, VisionAttention

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Layout:
    """The placeholder tokens of one image, in the order of the sequence.

    Attributes:
        grids: of the prunable ones, one grid per view.
        structural: (m,) True at tokens that are never pruned (the newlines after a row); None when there are none.
        items: pictures (crops, frames) the vision tower is given for it.
        size: its height and width in pixels, where the family's `to_tokens` has to know.
    """

    grids: tuple[Grid, ...]
    structural: BoolArray | None = None
    items: int = 1
    size: tuple[int, ...] = ()

    @property
    def columns(self) -> int:
        """Placeholders, structural ones included."""
        return sum(g.tokens for g in self.grids) if self.structural is None else len(self.structural)


@dataclass(frozen=True)
class VisionCall:
    """What was caught of one call of the vision tower.

    Attributes:
        tower, attention: keyword arguments of the tower, and of the attention module of the tap.
        outputs: of the tap's sources, in their order.
        sizes: (N, k) of the pictures, on the host, for taps that are `packed`; see `Family.sizes`.
    """

    tower: Mapping[str, Any]
    attention: Mapping[str, Any]
    outputs: Sequence[Tensor]
    sizes: IntArray | None = None


@dataclass(frozen=True)
class VisionTap:
    """Where the queries and keys of one layer of the vision tower can be had.

    Attributes:
        attention: the layer's attention module; its arguments are noted (rotary embeddings, for example).
        sources: modules inside it whose outputs its queries and keys are made of.
        read: what they say, per picture (see `Image.items`): the attention of each part that attends within
            itself, the frames of a video for example, patches in the order that `Family.to_tokens` takes.
        packed: whether pictures stand in one sequence, so that `read` has to know their sizes.
    """

    attention: nn.Module
    sources: tuple[nn.Module, ...]
    read: Callable[[VisionCall], Iterable[Sequence[VisionAttention]]]
    packed: bool = False


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def runs_of(marks: Tensor, total: int) -> Tensor:
    """(B, total) the number of the run that a column marked in (B, L), the last columns, belongs to; -1 for none."""
    marks = torch.nn.functional.pad(marks, (total - marks.shape[1], 0))
    first = marks & ~torch.nn.functional.pad(marks, (1, -1))
    return torch.where(marks, first.long().cumsum(1), -1)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply a vision layer's rotary embedding (m, d) to x (m, heads, d), in float32 as they do."""
    cos, sin = (part.to(x.device).float().unsqueeze(1) for part in (cos, sin))
    wide = x.float()
    return (wide * cos + rotate_half(wide) * sin).to(x.dtype)


class Family(ABC):
    """One model family, of one model. Subclasses have one file each under `tokenprune/models/`.

    Args:
        model: whose parts are asked for; None where only arithmetic is (sizes, layouts, pixels), as inside vLLM.
        config: of the checkpoint; default: the model's.

    Class attributes:
        name: key of the registry.
        model_types: values of `config.model_type` it serves.
        examples: checkpoints people run, for `tokenprune models`.
        mrope: whether positions have several axes (then `positions="compact"` is refused).
        first_position: position id of the first token.
        sizes_ahead: whether generate() hides from the model what `sizes` reads, so that it has to be noted when
            the features are computed.
        on_trial: whether what it assumes is tried on a model's first prompt.
        block_kinds: kinds of layers in which `blocks` are seen both ways; none named: all of them.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    examples: ClassVar[tuple[str, ...]] = ()
    mrope: ClassVar[bool] = False
    first_position: ClassVar[int] = 0
    sizes_ahead: ClassVar[bool] = False
    on_trial: ClassVar[bool] = False
    block_kinds: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: nn.Module | None, config: Any = None) -> None:
        self.model: Any = model
        self.config: Any = getattr(model, "config", None) if config is None else config

    # -- where things are ---------------------------------------------------------------------------------------

    def base(self) -> nn.Module:
        """The module that merges visual features into the prompt (it receives `input_ids` and pixels).

        The model itself where it has no head, as models that embed have not.
        """
        return getattr(self.model, "model", self.model)

    def text_model(self) -> nn.Module:
        return self.base().language_model  # type: ignore[return-value]

    def decoder(self) -> Decoder:
        """The kind of its text model."""
        return find_decoder(self.text_model().config)

    def layers(self) -> Sequence[nn.Module]:
        return self.text_model().layers  # type: ignore[return-value]

    def final_norm(self) -> nn.Module:
        """The norm after the last decoder layer."""
        return self.text_model().norm  # type: ignore[return-value]

    def attention(self, layer: nn.Module) -> nn.Module:
        """The self-attention module of a decoder layer that attends, with `q_proj`, `k_proj`, `v_proj`, `head_dim`."""
        return layer.self_attn  # type: ignore[return-value]

    def attending(self) -> list[int]:
        """The decoder layers that attend: in hybrids the others are recurrent, have no keys and see what is left."""
        text: Any = self.text_model().config
        return [i for i in range(len(self.layers())) if attends(text, i)]

    def decoder_shape(self) -> DecoderShape:
        """Its text model's sizes."""
        text: Any = self.text_model().config
        attention: Any = self.attention(self.layers()[self.attending()[0]])
        heads = text.num_attention_heads
        return DecoderShape(
            num_layers=len(self.layers()),
            num_heads=heads,
            num_key_value_heads=heads // getattr(attention, "num_key_value_groups", 1),
            head_dim=int(getattr(attention, "head_dim", None) or attention.qk_head_dim),  # latent attention
            hidden_size=text.hidden_size,
        )

    def vision_tap(self) -> VisionTap:
        """Queries and keys of the layer of the vision tower that yields the features.

        Raises:
            UnsupportedModelError: the family does not offer them.
        """
        raise UnsupportedModelError(
            f"the vision attention of {self.name} models is not available; use a method that does not need it"
        )

    def check_model(self) -> None:  # noqa: B027  # optional
        """Refuse a model of one of the family's types that it cannot serve.

        Raises:
            UnsupportedModelError: says why.
        """

    # -- what a call brings -------------------------------------------------------------------------------------

    @abstractmethod
    def vision_tower(self) -> nn.Module:
        """The module that is called once per kind of visual input, inside the forward or ahead of it by generate()."""

    @abstractmethod
    def tower_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Pixels and sizes (N, k) of a call of the vision tower; what a size means is for `layouts` to know."""

    @abstractmethod
    def sizes(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Sizes (N, k) of the images ("image") and videos ("video") whose pixels a call of the model brings."""

    @abstractmethod
    def layouts(self, kind: str, sizes: IntArray) -> list[Layout]:
        """The placeholders of the images of these sizes, on the host."""

    @abstractmethod
    def digests(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """(items,) int64: a hash of each picture's pixels, computed on their device without copying anything off it."""

    def images(self, kind: str, ids: IntArray, layouts: Sequence[Layout]) -> list[list[Image]]:
        """The images of each row, found by their placeholders in `ids` (B, L).

        Raises:
            ConfigError: placeholders and images do not line up.
        """
        return locate(ids, self.token_id(kind), layouts, kind)

    def token_id(self, kind: str) -> int:
        """The placeholder's id in `input_ids`."""
        return int(getattr(self.config, f"{kind}_token_id"))

    def check_call(self, inputs: Mapping[str, Any]) -> None:  # noqa: B027  # optional
        """Refuse a way of calling the model that the family cannot serve.

        Raises:
            UnsupportedModeError: says which.
        """

    def blocks(self, inputs: Mapping[str, Any], total: int) -> Tensor | None:
        """Which tokens attend to each other both ways in a later turn.

        Args:
            inputs: of the call.
            total: columns of the conversation, those of the call included.

        Returns:
            (B, total) the number of a token's block, -1 for none; None when attention is causal.
        """
        return None

    def to_tokens(self, patches: Tensor, image: Image) -> Tensor:
        """Numbers (items, m, c) of an image's patches -> (n, c) of its tokens: the mean over those merged."""
        (grid,) = image.grids
        rows = patches.reshape(-1, grid.merge, grid.width, grid.merge, patches.shape[-1])
        return rows.mean((1, 3)).flatten(0, 1) if grid.merge > 1 else patches.flatten(0, 1)

    def pixel_scale(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation by which the family's processors normalise pixels in [0, 1], per channel.

        Raises:
            UnsupportedModelError: the family does not offer pixels.
        """
        raise self._no_pixels()

    def patches(self, pixels: Tensor, sizes: IntArray | None) -> Iterable[Tensor]:
        """What the vision tower is given, picture by picture (see `Image.items`), as patches (m, 3, h, w).

        The patches stand in the order that `to_tokens` takes; a video's patch has the frames it was made of one above
        the other.

        Raises:
            UnsupportedModelError: the family does not offer pixels.
        """
        raise self._no_pixels()

    def _no_pixels(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"the pixels of {self.name} models are not available; use a method that does not need them"
        )

    def eight_bit(self, patches: Tensor) -> Tensor:
        """Normalised patches (m, 3, h, w) -> uint8 of the same shape, the pixels as they were."""
        mean, deviation = (
            torch.tensor(part, device=patches.device)[:, None, None] for part in self.pixel_scale()
        )
        return ((patches.float() * deviation + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def layer_features(
        self, inputs: dict[str, Any], first: int
    ) -> tuple[dict[str, Any], dict[int, tuple[Tensor, Tensor]]]:
        """Take out of the text model's inputs what it would add to the states after layers `first` and later.

        Returns:
            The inputs without them, and per layer the columns (B, L) bool and the features of those columns (V, D).
        """
        return inputs, {}


def locate(
    ids: IntArray, token_id: int, layouts: Sequence[Layout], kind: str = "image", surplus: bool = False
) -> list[list[Image]]:
    """Share out the placeholder columns of `token_id` among images, row by row, in order.

    Args:
        ids: (B, L).
        token_id: the placeholder.
        layouts: of the images, in order.
        kind: "image" or "video".
        surplus: whether layouts may be left over.

    Raises:
        ConfigError: placeholders and images do not line up.
    """
    rows: list[list[Image]] = []
    order = items = 0
    for row in ids:
        columns = np.flatnonzero(row == token_id).astype(np.int64)
        images, start = [], 0
        while start < len(columns):
            layout = layouts[order] if order < len(layouts) else None
            if layout is None or layout.columns == 0 or start + layout.columns > len(columns):
                raise ConfigError(
                    f"the prompt's {kind} placeholders and the {len(layouts)} {kind}s given do not line up; make the "
                    f"inputs with the model's own processor"
                )
            own = columns[start : start + layout.columns]
            start += layout.columns
            if layout.structural is not None:
                own = own[~layout.structural]
            rest = layout.columns - len(own)
            crops = (items, items + layout.items)
            images.append(Image(own, layout.grids, kind, order, crops, rest, size=layout.size))
            order, items = order + 1, items + layout.items
        rows.append(images)
    if order != len(layouts) and not surplus:
        raise ConfigError(f"{len(layouts)} {kind}s were given but the prompt has placeholders for {order}")
    return rows


def join(images: Sequence[Image], belongs: Callable[[Image, Image], bool]) -> list[Image]:
    """Make one image of each series of equal crops.

    Args:
        images: the crops of a row, in order.
        belongs: whether a crop belongs to the image of the crop before it.
    """
    series: list[list[Image]] = []
    for image in images:
        if series and belongs(series[-1][-1], image):
            series[-1].append(image)
        else:
            series.append([image])
    joined = []
    for crops in series:
        first, last = crops[0], crops[-1]
        (grid,) = first.grids
        joined.append(
            replace(
                first,
                columns=np.concatenate([crop.columns for crop in crops]),
                grids=(replace(grid, frames=len(crops)),),
                items=(first.items[0], last.items[1]),
            )
        )
    return joined
