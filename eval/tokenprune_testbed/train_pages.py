"""Train the model that reads pages: its tower on letters first, then all of it on what the lines say.

    python -m tokenprune_testbed.train_pages --out RUN_DIR
    python -m tokenprune_testbed.train_pages --out RUN_DIR --start RUN_DIR/model   # longer

Minutes on a GPU, which it takes when there is one; pages are drawn by worker processes. ``RUN_DIR/model`` is the model,
``RUN_DIR/curve.csv`` held-out accuracy on the way.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaForConditionalGeneration

from tokenprune_testbed.dense import pixel_values
from tokenprune_testbed.evaluate import evaluate
from tokenprune_testbed.loading import MODEL_DIR
from tokenprune_testbed.modeling import (
    GRID,
    NUM_VISUAL_TOKENS,
    PAGE_WORDS,
    PAGES,
    PATCH_SIZE,
    WIDTH,
    WORDS,
    build_model,
    build_processor,
)
from tokenprune_testbed.packing import IGNORE, Batch, answer_loss, fill_texts
from tokenprune_testbed.pages import CHARACTERS, MAX_NEW_TOKENS, Page, ask_page, evaluation_pages, make_page
from tokenprune_testbed.train import DEVICE, autocast, cosine, export


@dataclass(frozen=True)
class Options:
    """Settings of a run; minutes are of the clock, rates are peaks."""

    layers: int = 8
    dense_minutes: float = 0.8
    minutes: float = 3.0
    batch_size: int = 128
    peak: float = 1.5e-3
    letters_weight: float = 0.3
    lines: int = 2
    workers: int = 4
    seed: int = 0
    eval_seconds: float = 60.0
    evaluated: int = 128


@dataclass
class PageBatch:
    """Questions of pages (`Batch`), and per patch which letters have their middle in it (b, 144, 36) and whose line."""

    batch: Batch
    letters: Tensor
    line: Tensor


class Batches(Dataset[PageBatch]):
    """Batch number ``step`` is the same in every process and run."""

    def __init__(self, options: Options, count: int = 10**9) -> None:
        self.options, self.count = options, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> PageBatch:
        torch.set_num_threads(1)
        rng = np.random.default_rng([self.options.seed, step])
        pages = [make_page(rng) for _ in range(self.options.batch_size)]
        return PageBatch(page_questions(pages, rng, self.options.lines), *letter_targets(pages))


def letter_targets(pages: Sequence[Page]) -> tuple[Tensor, Tensor]:
    """See `PageBatch`; a patch without letters has line IGNORE."""
    shown = np.zeros((len(pages), NUM_VISUAL_TOKENS, len(CHARACTERS)), dtype=np.float32)
    line = np.full((len(pages), NUM_VISUAL_TOKENS), IGNORE)
    for i, page in enumerate(pages):
        kind, number, x, y = page.letters.T
        patch = (y // PATCH_SIZE * GRID + x // PATCH_SIZE).astype(int)
        shown[i, patch, kind.astype(int)] = 1
        line[i, patch] = number
    return torch.from_numpy(shown), torch.from_numpy(line)


def page_questions(pages: Sequence[Page], rng: np.random.Generator, lines: int) -> Batch:
    """One sequence per page: what it says, and some of its lines, isolated from each other."""
    rows = []
    for page in pages:
        *single, whole = ask_page(page)
        asked = [whole, *(single[i] for i in rng.permutation(len(single))[:lines])]
        rows.append([PAGES.ids(qa) for qa in asked])
    longest = max(sum(len(q) + len(a) for q, a in row) for row in rows)
    texts = fill_texts(PAGES, rows, images=1, most=longest)
    kept = torch.arange(NUM_VISUAL_TOKENS).expand(len(rows), -1)
    pixels = pixel_values([page.image for page in pages])
    return Batch(PAGES.prefix, pixels, kept, *texts, chained=False, targets=None)


class LetterHead(nn.Module):
    """What patches must show, off the projected features: letters, their line, exact row and column."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.line = nn.Linear(WIDTH, len(CHARACTERS)), nn.Linear(WIDTH, 9)
        self.place = nn.Linear(WIDTH, 2 * GRID)

    def forward(self, projected: Tensor, letters: Tensor, line: Tensor) -> tuple[Tensor, float]:
        """Loss, and the share of patches with letters whose letters are all right."""
        normed = F.rms_norm(projected.float(), (WIDTH,))
        logits = self.letters(normed)
        loss = F.binary_cross_entropy_with_logits(logits, letters, reduction="none").sum(-1).mean()
        loss = loss + 0.3 * F.cross_entropy(
            self.line(normed).flatten(0, 1), line.flatten(), ignore_index=IGNORE
        )
        patches = torch.arange(NUM_VISUAL_TOKENS, device=line.device).expand(len(line), -1).flatten()
        row, column = self.place(normed).flatten(0, 1).split(GRID, -1)
        loss = loss + 0.1 * (F.cross_entropy(row, patches // GRID) + F.cross_entropy(column, patches % GRID))
        right = ((logits > 0) == (letters > 0)).all(-1)[line != IGNORE]
        return loss, right.float().mean().item()


def starting_model(start: Path, options: Options) -> LlavaForConditionalGeneration:
    """With the tower and projector of ``start``, and of its decoder as many layers as fit, evenly."""
    torch.manual_seed(options.seed)
    model = build_model(options.layers, PAGE_WORDS)
    given = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32).state_dict()
    state = model.state_dict()
    prefix = "model.language_model.layers."
    depth = 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in given if name.startswith(prefix))
    for name in state:
        source = name
        if name.startswith(prefix):
            layer, rest = name.removeprefix(prefix).split(".", 1)
            source = f"{prefix}{int(layer) * depth // options.layers}.{rest}"
        tensor = given[source]
        if tensor.shape == state[name].shape:
            state[name] = tensor
        else:  # words: the new ones drawn at the scale of those it knows
            table = state[name] / state[name].std() * tensor.std()
            table[: len(WORDS)] = tensor
            state[name] = table
    model.load_state_dict(state)
    return model.to(DEVICE)


def train(out: Path, start: Path, options: Options) -> LlavaForConditionalGeneration:
    """Both stages; the second goes on with the first's loss beside its own."""
    out.mkdir(parents=True, exist_ok=True)
    model, head = starting_model(start, options), LetterHead().to(DEVICE)
    tower = model.model.vision_tower
    if DEVICE.type == "cpu":
        model.model.language_model.set_attn_implementation("eager")
        tower.set_attn_implementation("eager")
    batches = iter(
        DataLoader(
            Batches(options), batch_size=None, num_workers=options.workers, pin_memory=DEVICE.type == "cuda"
        )
    )
    first = [*tower.parameters(), *model.model.multi_modal_projector.parameters(), *head.parameters()]
    _stage(model, head, first, batches, 60 * options.dense_minutes, options, None, answers=False)
    curve = Curve(out, options.evaluated)
    everything = [*model.parameters(), *head.parameters()]
    _stage(model, head, everything, batches, 60 * options.minutes, options, curve, answers=True)
    curve.add(model, 60 * options.minutes, 0)
    export(model, out / "model", PAGE_WORDS)
    return model


def _stage(
    model: LlavaForConditionalGeneration,
    head: LetterHead,
    parameters: list[nn.Parameter],
    batches: Iterator[PageBatch],
    seconds: float,
    options: Options,
    curve: Curve | None,
    *,
    answers: bool,
) -> None:
    optimizer = torch.optim.AdamW(
        parameters, betas=(0.9, 0.98), weight_decay=0.01, fused=DEVICE.type == "cuda"
    )
    started, step, evaluated, paused = time.monotonic(), 0, 0.0, 0.0
    while (spent := time.monotonic() - started - paused) < seconds:
        rate = options.peak * (1 if answers else 1.5) * cosine(spent / seconds, step, 100) + 1e-6
        for group in optimizer.param_groups:
            group["lr"] = rate
        given = next(batches)
        batch = given.batch.to(DEVICE)
        letters, line = given.letters.to(DEVICE), given.line.to(DEVICE)
        with autocast():
            features = model.model.vision_tower(batch.pixels).last_hidden_state[:, 1:]
            loss, named = head(model.model.multi_modal_projector(features), letters, line)
            right = torch.zeros(1)
            if answers:
                said, right, _ = answer_loss(model, batch, features)
                loss = said + options.letters_weight * loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            shown = f"letters {named:.3f} words {right.float().mean().item():.3f}"
            print(
                f"{'answers' if answers else 'letters'} {step} {spent:.0f}s loss {loss.item():.3f} {shown}",
                flush=True,
            )
        if curve is not None and spent - evaluated > options.eval_seconds:
            evaluated, pause = spent, time.monotonic()
            curve.add(model, spent, step)
            paused += time.monotonic() - pause


class Curve:
    """Held-out accuracy on the way, a row per evaluation."""

    def __init__(self, out: Path, count: int) -> None:
        self.path, self.count = out / "curve.csv", count
        self.processor = build_processor(PAGE_WORDS)
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerow(["seconds", "step", "overall", "line", "page"])

    def add(self, model: LlavaForConditionalGeneration, seconds: float, step: int) -> None:
        model.eval()
        result = evaluate(
            model,
            self.processor,
            evaluation_pages(self.count, seed=1),
            batch_size=128,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        model.train()
        scores = [result.overall, *result.families.values()]
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([f"{seconds:.0f}", step, *(f"{s.accuracy:.4f}" for s in scores)])
        print(f"held out: {result}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run both stages."""
    parser = argparse.ArgumentParser(description="Train the testbed's model that reads pages.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--start", type=Path, default=MODEL_DIR, help="a model to go on from (default: small)"
    )
    for field in fields(Options):
        default = field.default
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(default), default=default)
    given = vars(parser.parse_args(argv))
    train(given.pop("out"), given.pop("start"), Options(**given))


if __name__ == "__main__":
    main()
