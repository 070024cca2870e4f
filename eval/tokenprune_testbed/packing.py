"""Training batches for stage 2: many questions per image in one sequence, isolated from each other.

A row of a batch is the prompt's prefix, the visual tokens, then the text of several questions. In an *isolated*
batch each question sees the images and itself only, and its positions start right after the images, so training
equals asking it alone, while the images' tokens are paid for once. In a *chained* batch questions follow each other
like turns of a chat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from tokenprune_testbed.dense import DenseTargets, dense_targets, patch_objects, pixel_values
from tokenprune_testbed.language import Language
from tokenprune_testbed.modeling import NUM_VISUAL_TOKENS
from tokenprune_testbed.questions import ask, ask_mixed, auxiliary_differences, families_of
from tokenprune_testbed.scenes import Scene, SceneKind, make_scene

IGNORE = -100
PADDING = -1  # question number of padding


@dataclass
class Batch:
    """One training batch of b rows with i images each, v kept visual tokens and t text tokens per row.

    pixels (b * i, 3, 96, 96); kept (b, v) indices into the row's i * 144 visual tokens, ascending; ids,
    positions, questions and labels (b, t), labels already shifted; chained: see the module's docstring.
    ``prefix`` are the tokens in front of the images, the same in every row.
    """

    prefix: tuple[int, ...]
    pixels: Tensor
    kept: Tensor
    ids: Tensor
    positions: Tensor
    questions: Tensor
    labels: Tensor
    chained: bool
    targets: DenseTargets | None

    def to(self, device: torch.device) -> Batch:
        moved = {k: v.to(device) for k, v in vars(self).items() if hasattr(v, "to")}
        return Batch(**vars(self) | moved)

    def attention_mask(self) -> Tensor:
        """(b, 1, s, s) float for attention scores: 0 where a token may look, else very low; s = prefix + v + t."""
        b, prefix = self.ids.shape[0], len(self.prefix) + self.kept.shape[1]
        number = torch.cat([self.questions.new_full((b, prefix), -2), self.questions], 1)
        causal = torch.ones(number.shape[1], number.shape[1], dtype=torch.bool, device=number.device).tril()
        allowed = causal.expand(b, -1, -1)
        if not self.chained:
            same = number[:, :, None] == number[:, None, :]
            same[:, :, :prefix] = True
            allowed = allowed & same
        return torch.zeros(allowed.shape, device=number.device).masked_fill_(~allowed, -1e9)[:, None]


def keep_visual_tokens(scenes: Sequence[Scene], count: int, images: int, rng: np.random.Generator) -> Tensor:
    """(b, count) ascending indices: patches that show objects first, the rest drawn at random.

    Early training skips most background patches to save time; the position of every kept token is unchanged.
    """
    total = images * NUM_VISUAL_TOKENS
    if count >= total:
        return torch.arange(total).expand(len(scenes), -1)
    rows = []
    for scene in scenes:
        priority = rng.random(total)
        priority[np.tile(patch_objects(scene), images) >= 0] += 1
        rows.append(np.sort(np.argpartition(-priority, count)[:count]))
    return torch.from_numpy(np.stack(rows))


def make_batch(
    rng: np.random.Generator,
    batch_size: int,
    language: Language,
    *,
    scenes: SceneKind = "mosaic",
    visual_tokens: int = NUM_VISUAL_TOKENS,
    text_tokens: int = 96,
    max_objects: int = 7,
    two_images: bool = False,
    chained: bool = False,
    max_questions: int = 14,
    families: Sequence[str] | None = None,
) -> Batch:
    """Draw scenes and questions. ``visual_tokens`` is per image; a third of single-image scenes has a written row."""
    families = families or families_of(scenes, single_image=True)
    drawn, texts = [], []
    for _ in range(batch_size):
        if two_images:
            objects = int(rng.integers(2, min(max_objects, 5) + 1))
            scene = make_scene(rng, num_objects=objects, add_digit=True, scenes=scenes)
            asked = ask(scene, rng, "difference") + auxiliary_differences(scene)
        else:
            length = int(rng.integers(2, 5)) if "reading" in families and rng.random() < 0.33 else 0
            extra = max(max_objects - length, 0)
            objects = (
                length + int(rng.integers(0, min(extra, 3) + 1))
                if length
                else int(rng.integers(2, max_objects + 1))
            )
            scene = make_scene(rng, num_objects=objects, row_length=length, scenes=scenes)
            asked = ask_mixed(scene, rng, count=max_questions, families=families)
        drawn.append(scene)
        texts.append([language.ids(asked[i]) for i in rng.permutation(len(asked))])
    images = 2 if two_images else 1
    ids, positions, questions, labels = fill_texts(language, texts, images, text_tokens, chained)
    frames = [f for s in drawn for f in ([s.image] if s.previous is None else [s.previous, s.image])]
    kept = keep_visual_tokens(drawn, images * visual_tokens, images, rng)
    return Batch(
        language.prefix,
        pixel_values(frames),
        kept,
        ids,
        positions,
        questions,
        labels,
        chained,
        targets=dense_targets(drawn),
    )


def fill_texts(
    language: Language,
    texts: Sequence[Sequence[tuple[list[int], list[int]]]],
    images: int,
    most: int,
    chained: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Batch.ids`, positions, questions and labels of each row's questions and answers.

    Args:
        language: of the model.
        texts: by row, as `Language.ids` gives them; what goes beyond `most` tokens is left out.
        images: of a row.
        most: text tokens of a row.
        chained: see the module's docstring.
    """
    start = len(language.prefix) + images * NUM_VISUAL_TOKENS
    ids, positions, questions, labels = (
        torch.full((len(texts), most), fill) for fill in (language.pad, start, PADDING, IGNORE)
    )
    for row, turns in enumerate(texts):
        used = 0
        for number, (question, answer) in enumerate(turns):
            length = len(question) + len(answer)
            if used + length > most:
                continue
            span = slice(used, used + length)
            ids[row, span] = torch.tensor(question + answer)
            positions[row, span] = torch.arange(length) + start + (used if chained else 0)
            questions[row, span] = number
            labels[row, used + len(question) - 1 : used + length - 1] = torch.tensor(answer)
            used += length
    longest = int((questions != PADDING).sum(1).max())
    ids, positions, questions, labels = (t[:, :longest] for t in (ids, positions, questions, labels))
    return ids, positions, questions, labels


def answer_loss(
    model: LlavaForConditionalGeneration, batch: Batch, features: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy over answer tokens; logits are computed at those only.

    Args:
        features: patch features of the tower without CLS, (b * i, 144, width).

    Returns:
        loss (), and for each of the m answer tokens whether it is right and its target, both (m,).
    """
    words = model.get_input_embeddings()
    b = batch.ids.shape[0]
    visual = model.model.multi_modal_projector(features)
    visual = visual.reshape(b, -1, visual.shape[-1])
    visual = visual.gather(1, batch.kept[..., None].expand(-1, -1, visual.shape[-1]))
    prefix = batch.ids.new_tensor(batch.prefix).expand(b, -1)
    start = prefix.shape[1]
    embeds = torch.cat([words(prefix), visual.float(), words(batch.ids)], 1)
    places = torch.arange(start, device=prefix.device).expand(b, -1)
    positions = torch.cat([places, batch.kept + start, batch.positions], 1)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=batch.attention_mask(), position_ids=positions, use_cache=False
    ).last_hidden_state[:, start + batch.kept.shape[1] :]
    wanted = batch.labels != IGNORE
    logits, labels = model.lm_head(hidden[wanted]).float(), batch.labels[wanted]
    return F.cross_entropy(logits, labels), logits.argmax(-1) == labels, labels
