"""Telling dense print from photographs by pixels alone: text goes first of everything when tokens go."""

from __future__ import annotations

import torch
from torch import Tensor

#: Per patch: saturation, contrast, strength of edges, lightness, share of pixels near the patch's lightest or darkest.
COLUMNS = 5
# A logistic regression on means and spreads of these over a picture's patches, fitted by `tokenprune_eval.guard` on
# rendered pages, tables, receipts and screenshots against photographs; error rates on held-out ones stand in docs.
_MEAN = (0.1096, 0.1770, 0.0602, 0.5606, 0.6311, 0.0434, 0.1522, 0.0567, 0.1135, 0.1393)
_SCALE = (0.1348, 0.1016, 0.0412, 0.2747, 0.3358, 0.0715, 0.0714, 0.0340, 0.0813, 0.0916)
_WEIGHTS = (0.2975, 0.2165, -0.1375, 0.5601, 2.2948, -0.0424, 1.2444, 1.1614, -0.7777, -1.3794)
_BIAS = 0.2251


def look(patches: Tensor) -> Tensor:
    """What is read of 8-bit RGB patches (m, 3, h, w): (m, COLUMNS) float32, each between 0 and 1."""
    x = patches.float() / 255
    grey = x.mean(1)
    saturation = (x.amax(1) - x.amin(1)).mean((1, 2))
    contrast = grey.flatten(1).std(1, correction=0) * 2
    edges = (grey[:, :, 1:] - grey[:, :, :-1]).abs().mean((1, 2)) + (grey[:, 1:] - grey[:, :-1]).abs().mean(
        (1, 2)
    )
    low, high = (edge[:, None, None] for edge in (grey.flatten(1).amin(1), grey.flatten(1).amax(1)))
    near = torch.minimum(grey - low, high - grey) <= 0.15 * (high - low)
    return torch.stack([saturation, contrast, edges, grey.mean((1, 2)), near.float().mean((1, 2))], dim=1)


def summary(looked: Tensor) -> Tensor:
    """Of a picture's patches or tokens (n, COLUMNS): means, then spreads, (2 * COLUMNS,)."""
    return torch.cat([looked.mean(0), looked.std(0, correction=0)])


def is_print(looked: Tensor) -> Tensor:
    """How sure it is that a picture is dense print, () between 0 and 1; above a half the guard raises its budget."""
    shape = summary(looked.float())
    mean, scale, weights = (shape.new_tensor(own) for own in (_MEAN, _SCALE, _WEIGHTS))
    return torch.sigmoid(((shape - mean) / scale * weights).sum() + _BIAS)
