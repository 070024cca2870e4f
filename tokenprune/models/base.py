"""What a model family is: where visual tokens sit, where layers live, how positions look. Nothing about methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenprune.errors import ConfigError, UnsupportedModelError
from tokenprune.methods.base import Grid

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Image:
    """One image (or video) of one row.

    Attributes:
        columns: (n,) columns of `input_ids` that hold its prunable visual tokens, in raster order.
        grid: their layout.
        kind: "image" or "video".
        order: its place among the call's images (or videos), as in `pixel_values`.
    """

    columns: IntArray
    grid: Grid
    kind: str
    order: int

    @property
    def n(self) -> int:
        return len(self.columns)


@dataclass(frozen=True)
class VisionTap:
    """Where the vision tower's queries and keys can be had: two Linear modules whose outputs are (B, m, h * d)."""

    query: nn.Module
    key: nn.Module
    heads: int
    scale: float
    has_cls: bool


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class Family(ABC):
    """One model family. Subclasses are stateless; one file each under `tokenprune/models/`.

    Class attributes:
        name: key of the registry.
        model_types: values of `config.model_type` it serves.
        text_types: model types of text decoders it serves; empty for any.
        examples: checkpoints people run, for `tokenprune models`.
        published_layer: the cut's layer published for it (EntropyPrune's collapse layer), or None.
        mrope: whether positions have several axes (then `positions="compact"` is refused).
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    text_types: ClassVar[tuple[str, ...]] = ()
    examples: ClassVar[tuple[str, ...]] = ()
    published_layer: ClassVar[int | None] = None
    mrope: ClassVar[bool] = False

    # -- where things are ---------------------------------------------------------------------------------------

    def base(self, model: nn.Module) -> nn.Module:
        """The module that merges visual features into the prompt (it receives `input_ids` and pixels)."""
        return model.model  # type: ignore[return-value]

    def text_model(self, model: nn.Module) -> nn.Module:
        return self.base(model).language_model  # type: ignore[return-value]

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        return self.text_model(model).layers  # type: ignore[return-value]

    def final_norm(self, model: nn.Module) -> nn.Module:
        """The norm after the last decoder layer."""
        return self.text_model(model).norm  # type: ignore[return-value]

    def attention(self, layer: nn.Module) -> nn.Module:
        """The self-attention module of a decoder layer, with `q_proj`, `k_proj`, `v_proj` and `head_dim`."""
        return layer.self_attn  # type: ignore[return-value]

    def state_module(self, layer: nn.Module, state: str) -> nn.Module:
        """The module whose output is a layer's "query", "key" or "value" states before rotary embedding."""
        return getattr(self.attention(layer), f"{state[0]}_proj")

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply rotary embeddings to x (n, heads, d) with cos, sin (n, d'), d' <= d."""
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        width = cos.shape[-1]
        turned = x[..., :width] * cos + rotate_half(x[..., :width]) * sin
        return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)

    def vision_tap(self, model: nn.Module) -> VisionTap:
        """Queries and keys of the vision layer that yields the features.

        Raises:
            UnsupportedModelError: the family does not offer them.
        """
        raise UnsupportedModelError(
            f"the vision attention of {self.name} models is not available; use a method that does not need it"
        )

    # -- what a call brings -------------------------------------------------------------------------------------

    @abstractmethod
    def vision_tower(self, model: nn.Module) -> nn.Module:
        """The module that is called once per kind of visual input, inside the forward or ahead of it by generate()."""

    @abstractmethod
    def tower_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Pixels and sizes (N, 3) of a call of the vision tower; what a size means is for `grid` to know."""

    @abstractmethod
    def sizes(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Sizes (N, 3) of the images ("image") and videos ("video") whose pixels a call of the model brings."""

    @abstractmethod
    def grid(self, model: nn.Module, size: IntArray) -> Grid:
        """The visual tokens made of one image of that size, on the host."""

    @abstractmethod
    def digests(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """(N,) int64: a hash of each image's pixels, computed on their device without copying anything off it."""

    def token_id(self, model: nn.Module, kind: str) -> int:
        """The placeholder's id in `input_ids`."""
        return int(getattr(model.config, f"{kind}_token_id"))

    def check_call(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:  # noqa: B027  # optional
        """Refuse a way of calling the model that the family cannot serve.

        Raises:
            UnsupportedModeError: says which.
        """


def locate(ids: IntArray, token_id: int, grids: Sequence[Grid], kind: str = "image") -> list[list[Image]]:
    """Share out the placeholder columns of `token_id` among images, row by row, in order.

    Raises:
        ConfigError: placeholders and images do not line up.
    """
    rows: list[list[Image]] = []
    order = 0
    for row in ids:
        columns = np.flatnonzero(row == token_id).astype(np.int64)
        images, start = [], 0
        while start < len(columns):
            n = grids[order].tokens if order < len(grids) else 0
            if n == 0 or start + n > len(columns):
                raise ConfigError(
                    f"the prompt's {kind} placeholders and the {len(grids)} {kind}s given do not line up; make the "
                    f"inputs with the model's own processor"
                )
            images.append(Image(columns[start : start + n], grids[order], kind, order))
            start, order = start + n, order + 1
        rows.append(images)
    if order != len(grids):
        raise ConfigError(f"{len(grids)} {kind}s were given but the prompt has placeholders for {order}")
    return rows
