"""What is noted while the vision tower runs, and how it reaches the call that uses its features.

generate() may encode images ahead of the model's forward, so the facts travel with the tower's own output object.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tokenprune.config import PruneConfig
from tokenprune.errors import UnsupportedModeError
from tokenprune.methods import Method
from tokenprune.models.base import Family
from tokenprune.tokens import IntArray

_ATTRIBUTE = "_tokenprune_facts"


@dataclass
class VisionFacts:
    """Of one call of the vision tower, image by image.

    Attributes:
        sizes: (N, k), see `Family.sizes`.
        method: whose needs were looked for; None where nobody scored.
        reader: what looked at the pixels; None where nothing did.
        digests: (items,) int64 hashes of the pixels, or None when no method asked.
        vision: what `Needs.vision` made of each picture's attention, (patches,) or (patches, c) each.
        pixels: what `Needs.pixels` made of its pixels, likewise.
    """

    sizes: Tensor
    method: Method | None = None
    reader: Callable[[Tensor], Tensor] | None = None
    digests: Tensor | None = None
    vision: list[Tensor] = field(default_factory=list)
    pixels: list[Tensor] = field(default_factory=list)


def sizes_on_host(sizes: Tensor, known: Sequence[tuple[Tensor, IntArray]]) -> IntArray:
    """Copy a tower's sizes to the host, unless the call it belongs to knows these very ones already."""
    found = next((host for given, host in known if given is sizes), None)
    return sizes.long().cpu().numpy() if found is None else found


def read_facts(output: Any) -> VisionFacts | None:
    return getattr(output, _ATTRIBUTE, None)


def attach_facts(output: Any, facts: VisionFacts) -> None:
    # Past ModelOutput's __setattr__: its keys are the output's own.
    object.__setattr__(output, _ATTRIBUTE, facts)


def check_facts(facts: Mapping[str, VisionFacts], config: PruneConfig) -> None:
    """Refuse features encoded ahead of a call while other settings were in force.

    Raises:
        UnsupportedModeError: what the method, or the budget, wants of the tower was not looked for, or by another.
    """
    needs, method = config.needs, config.method
    for kind, own in facts.items():
        looked = needs.vision is None and needs.pixels is None
        other = own.method != method or own.reader != needs.pixels
        if (not looked and other) or (needs.digest and own.digests is None):
            raise UnsupportedModeError(
                f"the {kind} features were encoded while other settings were in force, and {method.name!r} looks into "
                f"the vision tower; encode them again, or pass the pixels"
            )


def visual_inputs(family: Family, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, VisionFacts]]:
    """Sizes of the call's images by kind, and what the vision tower's hook noted of those encoded ahead of the call.

    Raises:
        UnsupportedModeError: features that were made while the model was not wrapped.
    """
    sizes, facts = family.sizes(inputs), {}
    for kind, output in (inputs.get("mm_encoder_outputs") or {}).items():
        if output is None:
            continue
        noted = read_facts(output)
        if noted is None:
            raise UnsupportedModeError(
                f"precomputed {kind} features do not say which grid they come from; compute them with "
                f"get_{kind}_features while the model is wrapped, or pass the pixels "
                f"(prefill_chunk_size is not supported)"
            )
        sizes[kind], facts[kind] = noted.sizes, noted
    return sizes, facts


def noting_sizes(stock: Callable[..., Any], kind: str, family: Family) -> Callable[..., Any]:
    """`stock` (get_image_features or get_video_features), which notes the sizes it is called with on its output.

    generate() may call it ahead of the forward and keep its arguments to itself. It is no module and takes no hook.
    """
    signature = inspect.signature(stock)
    pixels = next(iter(signature.parameters))  # older releases call a video's pixel_values, too

    @functools.wraps(stock)
    def noting(*args: Any, **kwargs: Any) -> Any:
        output = stock(*args, **kwargs)
        facts = read_facts(output)
        if facts is not None:
            given = signature.bind_partial(*args, **kwargs).arguments
            given["pixel_values" if kind == "image" else "pixel_values_videos"] = given.pop(pixels)
            facts.sizes = family.sizes(given).get(kind, facts.sizes)
        return output

    return noting
