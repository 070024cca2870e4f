"""Stage 1 of training: teach the vision tower and the projector to name what every patch shows.

In *word space*: the projected feature of a patch, normalised, times the word embeddings must name the colour, the
kind, the row word and the column word of what is on it: an object, or the ground of a mosaic scene. That hands
the decoder features it can already read, and question answering "clicks" several times earlier.
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

from tokenprune_testbed.grounds import COLUMN_WORDS, IMAGE_SIZE, ROW_WORDS, UInt8Array
from tokenprune_testbed.language import PATCH_WORDS
from tokenprune_testbed.modeling import (
    GRID,
    IMAGE_MEAN,
    IMAGE_STD,
    NUM_VISUAL_TOKENS,
    PATCH_SIZE,
    SMALL,
    WIDTH,
)
from tokenprune_testbed.scenes import COLOR_NAMES, KINDS, Scene, SceneKind, make_scene

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
        owner[obj.y : obj.y + obj.size, obj.x : obj.x + obj.size] = index
    cells = owner.reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE).swapaxes(1, 2).reshape(NUM_VISUAL_TOKENS, -1)
    labels = np.full(NUM_VISUAL_TOKENS, IGNORE)
    covers = np.stack([(cells == i).mean(-1) for i in range(len(scene.objects))], -1)
    labels[covers.sum(-1) == 0] = BACKGROUND
    named = covers.max(-1) >= _MIN_COVER
    labels[named] = covers.argmax(-1)[named]
    return labels


@dataclass
class DenseTargets:
    """Per patch (n, 144) indices into `PATCH_WORDS`, IGNORE where there is none; per image (n, 90) which pairs occur.

    ``background`` marks patches without an object; they have targets of their own in mosaic scenes.
    """

    kind: Tensor
    color: Tensor
    row: Tensor
    column: Tensor
    background: Tensor
    pairs: Tensor

    def to(self, device: torch.device) -> DenseTargets:
        return DenseTargets(*(getattr(self, f.name).to(device) for f in fields(self)))


def _patch_thirds() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The third of the rows and of the columns each of the 144 patches lies in; patches do not cross the borders."""
    row, column = np.divmod(np.arange(NUM_VISUAL_TOKENS), GRID)
    return row // (GRID // 3), column // (GRID // 3)


def dense_targets(scenes: Sequence[Scene]) -> DenseTargets:
    """Targets of a batch of scenes."""
    thirds = _patch_thirds()
    shape = (len(scenes), NUM_VISUAL_TOKENS)
    kind, color, row, column = (np.full(shape, IGNORE) for _ in range(4))
    background = np.zeros(shape, dtype=bool)
    pairs = np.zeros((len(scenes), len(KINDS) * len(COLOR_NAMES)), dtype=np.float32)
    for i, scene in enumerate(scenes):
        owner = patch_objects(scene)
        background[i] = owner == BACKGROUND
        if scene.ground is not None:
            mine = background[i]
            row[i, mine], column[i, mine] = (third[mine] for third in thirds)
            shown = [scene.ground.cells[cell] for cell in 3 * row[i, mine] + column[i, mine]]
            kind[i, mine] = [PATCH_WORDS["kind"].index(name) for name in shown]
            color[i, mine] = [PATCH_WORDS["color"].index(scene.ground.tints[name]) for name in shown]
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


_WORD_WEIGHTS = {"kind": 1.0, "color": 1.0, "row": 0.5, "column": 0.5}
_GROUND_WEIGHT = 0.5  # of a mosaic scene's ground against its objects, of which there is less


def word_loss(
    words: dict[str, Tensor], projected: Tensor, targets: DenseTargets
) -> tuple[Tensor, dict[str, float]]:
    """Loss and accuracies in word space.

    Args:
        words: see `Language.word_space`.
        projected: the projector's output (n, 144, width).

    Returns:
        The loss, and the shares of patches that are named right: "object" and "ground" (kind and colour), "kind" (of
        objects), "place" (row and column word).
    """
    normed = F.rms_norm(projected.float(), projected.shape[-1:])
    logits = {role: normed @ of.float().T for role, of in words.items()}
    loss = normed.new_zeros(())
    right: dict[str, Tensor] = {}
    ground = targets.background & (targets.kind != IGNORE)
    for role, weight in _WORD_WEIGHTS.items():
        target = getattr(targets, role)
        right[role] = logits[role].argmax(-1) == target
        for share, where in ((1.0, ~targets.background), (_GROUND_WEIGHT, ground)):
            if where.any():
                part = F.cross_entropy(logits[role][where], target[where], ignore_index=IGNORE)
                loss = loss + weight * share * part
    quiet = targets.background & ~ground  # nothing to say: object words stay low
    if quiet.any():
        names = torch.cat([logits["kind"][..., : len(KINDS)], logits["color"][..., : len(COLOR_NAMES)]], -1)
        loss = loss + 0.2 * torch.logsumexp(names[quiet], -1).clamp(min=0).mean()
    named, both = (targets.kind != IGNORE) & ~targets.background, right["kind"] & right["color"]
    accuracy = {
        "object": both[named].float().mean().item(),
        "kind": right["kind"][named].float().mean().item(),
        "ground": both[ground].float().mean().item(),
        "place": (right["row"] & right["column"])[targets.row != IGNORE].float().mean().item(),
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
        words = SMALL.word_space(model.get_input_embeddings().weight)
        loss, accuracy = word_loss(words, projected, targets)
        exact = self.place(F.rms_norm(projected, (WIDTH,)))
        for part, place in ((exact[..., :GRID], self.patch_row), (exact[..., GRID:], self.patch_column)):
            loss = loss + 0.25 * F.cross_entropy(part.flatten(0, 1), place.expand(len(hidden), -1).flatten())
        presence = self.presence(hidden[:, 0].float())
        loss = loss + F.binary_cross_entropy_with_logits(presence, targets.pairs)
        return loss, accuracy


def dense_scenes(
    rng: np.random.Generator, count: int, digit_share: float = 0.75, scenes: SceneKind = "mosaic"
) -> Iterator[Scene]:
    """Crowded scenes, some with a written row: more labelled patches for the price of one image.

    Mostly digits, which take many times longer to learn than shapes.
    """
    for _ in range(count):
        row = int(rng.integers(2, 5)) if rng.random() < 0.3 else 0
        objects = int(rng.integers(4, 15))
        yield make_scene(rng, num_objects=objects, row_length=row, digit_share=digit_share, scenes=scenes)


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
