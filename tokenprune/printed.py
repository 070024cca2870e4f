"""Telling dense print from photographs by pixels alone: text goes first of everything when tokens go."""

from __future__ import annotations

import torch
from torch import Tensor

#: Per patch: saturation, contrast, strength of edges, lightness, share of pixels near the patch's lightest or darkest.
COLUMNS = 5
# A logistic regression on means and spreads of these over a picture's patches, fitted by
# `tokenprune_eval.studies.guard` on rendered pages, tables, receipts, screenshots and the testbed's pages against
# photographs and scenes; error rates on held-out ones stand in docs.
_MEAN = (0.1415, 0.1907, 0.0875, 0.5222, 0.5606, 0.0518, 0.1405, 0.0677, 0.0929, 0.2078)
_SCALE = (0.1130, 0.1002, 0.0559, 0.2684, 0.2704, 0.0657, 0.0698, 0.0420, 0.0644, 0.1021)
_WEIGHTS = (0.2475, -0.3574, 0.4413, 0.6296, 1.4340, -1.0939, 2.2742, 2.8319, -1.3437, -0.6368)
_BIAS = 0.6746


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
