"""A model of a type that is not known, whose layout is the usual one: a stock decoder behind one placeholder token.

What is assumed is tried on its first prompt (`runtime/trial.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.hashing import digest
from tokenprune.models.base import Family, Layout
from tokenprune.tokens import Grid, Image, IntArray

_TEXT_MODELS = ("language_model", "text_model")
_TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower")
_TOKENS = ("image_token_id", "image_token_index")
_NEAR = 2  # columns: a break behind a row of placeholders does not end a picture


class Generic(Family):
    """A picture is a run of placeholders, a line of tokens to methods; nobody looks into its tower.

    Args:
        model: whose parts are looked up.

    Raises:
        UnsupportedModelError: names what it has not.
    """

    name = "generic"
    model_types = ()
    on_trial = True

    def __init__(self, model: nn.Module | None, config: Any = None) -> None:
        super().__init__(model, config)
        self._base: nn.Module = getattr(self.model, "model", self.model)
        self._text = _named(self._base, _TEXT_MODELS, "text model")
        self._tower = _named(self._base, _TOWERS, "vision tower")
        self.mrope = hasattr(self._base, "rope_deltas")  # type: ignore[misc]  # of this model
        layers = getattr(self._text, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not hasattr(self._text, "norm"):
            raise UnsupportedModelError(f"its {type(self._text).__name__} has no `layers` and `norm`")
        if not all(hasattr(layers[i], "self_attn") for i in self.attending()):
            raise UnsupportedModelError(f"a {type(layers[0]).__name__} has no `self_attn`")
        found = [getattr(self.config, name, None) for name in _TOKENS]
        self._token = next((token for token in found if isinstance(token, int)), None)
        if self._token is None:
            raise UnsupportedModelError(f"its config has no {' or '.join(_TOKENS)}")
        if getattr(self.config, "is_encoder_decoder", False):
            raise UnsupportedModelError("it is an encoder and a decoder")

    def base(self) -> nn.Module:
        return self._base

    def text_model(self) -> nn.Module:
        return self._text

    def vision_tower(self) -> nn.Module:
        return self._tower

    def token_id(self, kind: str) -> int:
        assert self._token is not None
        return self._token

    def tower_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        given = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        return given, torch.zeros(1, 1, dtype=torch.long)

    def sizes(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {} if inputs.get("pixel_values") is None else {"image": torch.zeros(1, 1, dtype=torch.long)}

    def layouts(self, kind: str, sizes: IntArray) -> list[Layout]:
        return []  # the prompt tells

    def images(self, kind: str, ids: IntArray, layouts: Sequence[Layout]) -> list[list[Image]]:
        rows: list[list[Image]] = []
        order = 0
        for row in ids:
            columns = np.flatnonzero(row == self._token).astype(np.int64)
            runs = np.split(columns, np.flatnonzero(np.diff(columns) > _NEAR + 1) + 1)
            own = [run for run in runs if len(run)]
            rows.append(
                [Image(run, (Grid(1, 1, len(run)),), kind, order + i, (0, 1)) for i, run in enumerate(own)]
            )
            order += len(own)
        return rows

    def digests(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        return digest(pixels.flatten()[None])  # of all pictures together


def _named(module: nn.Module, names: Sequence[str], what: str) -> nn.Module:
    found = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    if not isinstance(found, nn.Module):
        raise UnsupportedModelError(f"no {what} is found in its {type(module).__name__} ({', '.join(names)})")
    return found
