"""What a method returned, checked before it is used."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import TokenPruneError
from tokenprune.tokens import Selection

DEBUG = "TOKENPRUNE_DEBUG"


def check_selection(name: str, selection: Any, n: int, k: int, biased: bool) -> None:
    """Refuse a selection that cannot be one of `k` out of `n` tokens, or that has biases nobody allowed for.

    Shapes and dtypes are looked at always, which costs nothing; values only with TOKENPRUNE_DEBUG=1 in the
    environment, since they have to be copied from the device.

    Raises:
        TokenPruneError: names the method and what is wrong.
    """
    if not isinstance(selection, Selection):
        raise TokenPruneError(f"method {name!r} returned {type(selection).__name__} instead of a Selection")
    keep, merges, weights = selection.keep, selection.merges, selection.weights
    wrong = (
        _wrong("keep", keep, (k,), floating=False)
        or ("either merges or weights without the other" if (merges is None) != (weights is None) else None)
        or (merges is not None and _wrong("merges", merges, (None, 2), floating=False))
        or (merges is not None and _wrong("weights", weights, (len(merges),), floating=True))
        or (selection.bias is not None and _wrong("bias", selection.bias, (k,), floating=True))
        or ("a bias without Needs(bias=True)" if selection.bias is not None and not biased else None)
        or (os.environ.get(DEBUG, "0") not in ("", "0") and _wrong_values(selection, n))
    )
    if wrong:
        raise TokenPruneError(f"method {name!r} returned {wrong}")


def _wrong(name: str, tensor: Any, shape: tuple[int | None, ...], floating: bool) -> str | None:
    if not isinstance(tensor, Tensor):
        return f"{name} as {type(tensor).__name__}, not as a tensor"
    if floating != tensor.is_floating_point() or not (floating or tensor.dtype == torch.long):
        return f"{name} of {tensor.dtype} where {'floats' if floating else 'torch.long'} were asked for"
    if tensor.ndim != len(shape) or any(
        s is not None and s != t for s, t in zip(shape, tensor.shape, strict=True)
    ):
        asked = tuple("any" if s is None else s for s in shape)
        return f"{name} of shape {tuple(tensor.shape)} where {asked} was asked for"
    return None


def _wrong_values(selection: Selection, n: int) -> str | None:
    keep = selection.keep
    if len(keep) and (bool((keep.diff() <= 0).any()) or not 0 <= int(keep[0]) <= int(keep[-1]) < n):
        return f"keep that is not ascending within the image's {n} tokens: {keep.tolist()[:20]}"
    if selection.bias is not None and not bool(selection.bias.isfinite().all()):
        return "biases that are no finite numbers"
    if selection.merges is None or selection.weights is None or not len(selection.merges):
        return None
    source, slot = selection.merges.unbind(1)
    if not 0 <= int(source.min()) <= int(source.max()) < n:
        return f"merges from tokens outside the image's {n}"
    if not bool(torch.isin(slot, keep).all()):
        return "merges into tokens that are not kept"
    if not bool(selection.weights.isfinite().all()):
        return "weights that are no finite numbers"
    return None
