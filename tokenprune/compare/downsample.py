"""The control that prunes nothing: the picture itself is made smaller, until it has as few tokens.

Source: VTC-Bench (ACL 2026), where plain downsampling beats many pruning methods, and whose "group A" are the questions
it gets wrong.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from PIL import Image
from torch import nn

from tokenprune.analysis.calibration import make_prompt
from tokenprune.errors import UnsupportedModelError
from tokenprune.models import Family

_TRIES = 40
_STEP = 0.95


def shrunk_prompt(
    family: Family, processor: Any, images: Sequence[Image.Image], text: str, keep: float
) -> Any:
    """Inputs of a question whose pictures are so small that they have at most `keep` of their tokens.

    Where the number of tokens follows the picture's size (Qwen-VL), the picture is resized before the processor; where
    the processor makes every picture as large (LLaVA-1.5), it is asked for a smaller size, and the model has to run
    inside `interpolated`.

    Raises:
        UnsupportedModelError: the model's tokens do not follow from the picture's size, and its tower takes one only.
        ConfigError: see `make_prompt`.
    """
    token = family.token_id("image")
    whole = _tokens(make_prompt(processor, images, text), token)
    most = keep * whole
    quarter = [image.resize(_scaled(image, 0.25)) for image in images]
    if _tokens(make_prompt(processor, quarter, text), token) == whole:
        inputs = make_prompt(_smaller(family, processor, most / len(images)), images, text)
        if _tokens(inputs, token) > most:  # a projector that makes as many tokens of any picture (Gemma 3)
            raise _no_smaller(family)
        return inputs
    scale = math.sqrt(keep)
    for _ in range(_TRIES):
        small = [image.resize(_scaled(image, scale), Image.Resampling.BICUBIC) for image in images]
        inputs = make_prompt(processor, small, text)
        if _tokens(inputs, token) <= most:
            return inputs
        scale *= _STEP
    raise UnsupportedModelError(
        f"pictures cannot be made so small that this model sees {keep:.0%} of their tokens"
    )


@contextmanager
def interpolated(family: Family) -> Iterator[None]:
    """Inside, a tower with learned positions interpolates them for pictures of another size."""
    tower = family.vision_tower()
    if not _interpolates(tower):
        yield
        return
    handle = tower.register_forward_pre_hook(
        lambda _module, args, kwargs: (args, {**kwargs, "interpolate_pos_encoding": True}), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


def _smaller(family: Family, processor: Any, most: float) -> Any:
    """A processor that makes pictures of at most `most` patches, as square as that allows."""
    tower = family.vision_tower()
    patch = getattr(tower.config, "patch_size", None)
    images: Any = processor.image_processor
    # Pinpoints: it makes tiles, whose number a smaller size would change.
    if not _interpolates(tower) or not isinstance(patch, int) or hasattr(images, "image_grid_pinpoints"):
        raise _no_smaller(family)
    rows = max(1, math.isqrt(int(most)))
    columns = max(rows, int(most) // rows)
    changed = {"size": {"height": rows * patch, "width": columns * patch}, "do_center_crop": False}
    smaller = copy.copy(processor)
    smaller.image_processor = type(images).from_dict({**images.to_dict(), **changed})
    return smaller


def _no_smaller(family: Family) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{family.name} models see every picture in one size, and the tower takes no other: there is no smaller "
        f"picture to compare with"
    )


def _interpolates(tower: nn.Module) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters


def _scaled(image: Image.Image, scale: float) -> tuple[int, int]:
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def _tokens(inputs: Any, token: int) -> int:
    return int((inputs["input_ids"] == token).sum())
