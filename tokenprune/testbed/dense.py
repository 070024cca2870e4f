"""Stage 1 of training: teach the vision tower and the projector to name what every patch shows.

In *word space*: the projected feature of a patch, normalised, times the (tied) word embeddings must name the
colour, the kind, the row word and the column word of the object under it. That hands the decoder features
it can already read, and question answering "clicks" several times earlier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from tokenprune.testbed.modeling import (
    GRID,
    IMAGE_MEAN,
    IMAGE_STD,
    NUM_VISUAL_TOKENS,
    PATCH_SIZE,
    WIDTH,
    WORD_IDS,
)
from tokenprune.testbed.scenes import (
    COLOR_NAMES,
    COLUMN_WORDS,
    GLYPH_SIZE,
    IMAGE_SIZE,
    KINDS,
    ROW_WORDS,
    Scene,
    UInt8Array,
    make_scene,
)

BACKGROUND, IGNORE = -1, -100
_MIN_COVER = 0.3  # share of a patch's pixels under an object's box from which the patch must name the object


def pixel_values(images: Sequence[UInt8Array]) -> Tensor:
    """(n, 96, 96, 3) uint8 -> (n, 3, 96, 96) float32, exactly as the image processor does for this size."""
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (stacked - mean) / std


def patch_objects(scene: Scene) -> npt.NDArray[np.int64]:
    """(144,) index of the object each patch shows, BACKGROUND for none, IGNORE for a mere edge of one."""
    owner = np.full((IMAGE_SIZE, IMAGE_SIZE), -1)
    for index, obj in enumerate(scene.objects):
        owner[obj.y : obj.y + GLYPH_SIZE, obj.x : obj.x + GLYPH_SIZE] = index
    cells = owner.reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE).swapaxes(1, 2).reshape(NUM_VISUAL_TOKENS, -1)
    labels = np.full(NUM_VISUAL_TOKENS, IGNORE)
    covers = np.stack([(cells == i).mean(-1) for i in range(len(scene.objects))], -1)
    labels[covers.sum(-1) == 0] = BACKGROUND
    named = covers.max(-1) >= _MIN_COVER
    labels[named] = covers.argmax(-1)[named]
    return labels


@dataclass
class DenseTargets:
    """Per patch (n, 144) targets, IGNORE where there is none, and per image (n, 90) which pairs occur."""

    kind: Tensor
    color: Tensor
    row: Tensor
    column: Tensor
    background: Tensor
    pairs: Tensor

    def to(self, device: torch.device) -> DenseTargets:
        return DenseTargets(*(getattr(self, f.name).to(device) for f in fields(self)))


def dense_targets(scenes: Sequence[Scene]) -> DenseTargets:
    """Targets of a batch of scenes."""
    shape = (len(scenes), NUM_VISUAL_TOKENS)
    kind, color, row, column = (np.full(shape, IGNORE) for _ in range(4))
    background = np.zeros(shape, dtype=bool)
    pairs = np.zeros((len(scenes), len(KINDS) * len(COLOR_NAMES)), dtype=np.float32)
    for i, scene in enumerate(scenes):
        owner = patch_objects(scene)
        background[i] = owner == BACKGROUND
        for j, obj in enumerate(scene.objects):
            k, c = KINDS.index(obj.kind), COLOR_NAMES.index(obj.color)
            mine = owner == j
            kind[i, mine], color[i, mine] = k, c
            pairs[i, k * len(COLOR_NAMES) + c] = 1
            if obj.place_margin >= 1:  # nearer than that, either word would do
                row_word, column_word = obj.place.split()
                row[i, mine], column[i, mine] = ROW_WORDS.index(row_word), COLUMN_WORDS.index(column_word)
    tensors = (torch.from_numpy(a) for a in (kind, color, row, column, background, pairs))
    return DenseTargets(*tensors)


_WORDS = {"kind": KINDS, "color": COLOR_NAMES, "row": ROW_WORDS, "column": COLUMN_WORDS}
_WORD_WEIGHTS = {"kind": 1.0, "color": 1.0, "row": 0.5, "column": 0.5}


def word_loss(
    model: LlavaForConditionalGeneration, projected: Tensor, targets: DenseTargets
) -> tuple[Tensor, dict[str, float]]:
    """Loss and accuracies ("object": kind and colour right, "place": row and column word right) in word space.

    ``projected`` is the projector's output (n, 144, width).
    """
    words = model.get_input_embeddings().weight.float()
    normed = F.rms_norm(projected.float(), (WIDTH,))
    logits = {name: normed @ words[[WORD_IDS[w] for w in of]].T for name, of in _WORDS.items()}
    loss = normed.new_zeros(())
    right: dict[str, Tensor] = {}
    for name, weight in _WORD_WEIGHTS.items():
        target = getattr(targets, name)
        loss = loss + weight * F.cross_entropy(
            logits[name].flatten(0, 1), target.flatten(), ignore_index=IGNORE
        )
        right[name] = logits[name].argmax(-1) == target
    quiet = torch.cat([logits["kind"], logits["color"]], -1)[targets.background]
    loss = loss + 0.2 * torch.logsumexp(quiet, -1).clamp(min=0).mean()
    named, placed = targets.kind != IGNORE, targets.row != IGNORE
    accuracy = {
        "object": (right["kind"] & right["color"])[named].float().mean().item(),
        "kind": right["kind"][named].float().mean().item(),
        "place": (right["row"] & right["column"])[placed].float().mean().item(),
    }
    return loss, accuracy


class DenseHead(nn.Module):
    """The word-space loss, and two auxiliary heads that are thrown away after stage 1.

    A linear head reads the patch's exact row and column off the projected feature (reading digits in order
    needs more than thirds), and another predicts from CLS which (kind, colour) pairs occur, so that CLS
    attention means something to methods that rank patches by it.
    """

    patch_row: Tensor
    patch_column: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Linear(WIDTH, 2 * GRID)
        self.presence = nn.Linear(WIDTH, len(KINDS) * len(COLOR_NAMES))
        patches = torch.arange(NUM_VISUAL_TOKENS)
        self.register_buffer("patch_row", patches // GRID, persistent=False)
        self.register_buffer("patch_column", patches % GRID, persistent=False)

    def forward(
        self, model: LlavaForConditionalGeneration, pixels: Tensor, targets: DenseTargets
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss and accuracies for pixels (n, 3, 96, 96), see :func:`word_loss`."""
        hidden = model.model.vision_tower(pixels).last_hidden_state
        projected = model.model.multi_modal_projector(hidden[:, 1:]).float()
        loss, accuracy = word_loss(model, projected, targets)
        exact = self.place(F.rms_norm(projected, (WIDTH,)))
        for part, place in ((exact[..., :GRID], self.patch_row), (exact[..., GRID:], self.patch_column)):
            loss = loss + 0.25 * F.cross_entropy(part.flatten(0, 1), place.expand(len(hidden), -1).flatten())
        presence = self.presence(hidden[:, 0].float())
        loss = loss + F.binary_cross_entropy_with_logits(presence, targets.pairs)
        return loss, accuracy


def dense_scenes(rng: np.random.Generator, count: int, digit_share: float = 0.75) -> Iterator[Scene]:
    """Crowded scenes, some with a written row: more labelled patches for the price of one image.

    Mostly digits, which take many times longer to learn than shapes.
    """
    for _ in range(count):
        row = int(rng.integers(2, 5)) if rng.random() < 0.3 else 0
        yield make_scene(rng, num_objects=int(rng.integers(4, 15)), row_length=row, digit_share=digit_share)


def rescale_to_decoder(model: LlavaForConditionalGeneration, pixels: Tensor) -> None:
    """Bring word embeddings and projected features to the scale the decoder starts from (rms 0.5 and 0.7)."""
    with torch.no_grad():
        hidden = model.model.vision_tower(pixels).last_hidden_state[:, 1:]
        projector = model.model.multi_modal_projector
        gain = 0.7 / projector(hidden).pow(2).mean().sqrt()
        projector.linear_2.weight.mul_(gain)
        projector.linear_2.bias.mul_(gain)
        words = model.get_input_embeddings().weight
        words.mul_(0.5 / words.pow(2).mean().sqrt())
