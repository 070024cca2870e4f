"""Train the testbed model: dense labels first (stage 1), then question answering (stage 2).

    python -m tokenprune_testbed.train --out RUN_DIR
    python -m tokenprune_testbed.train --out RUN_DIR --resume-from MODEL_DIR   # stage 2 on saved weights
    python -m tokenprune_testbed.train --out RUN_DIR --resume-from MODEL_DIR --dense-minutes 15   # both stages on them
    torchrun --nproc-per-node 2 -m tokenprune_testbed.train --out RUN_DIR      # a process per core or GPU

A run goes on where it was killed when started again with the same ``--out``, and takes a GPU when there is one.
Under torchrun every process draws batches of its own, and gradients are averaged.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from transformers import LlavaForConditionalGeneration

from tokenprune_testbed.dense import (
    DenseHead,
    dense_scenes,
    dense_targets,
    pixel_values,
    rescale_to_decoder,
    word_loss,
)
from tokenprune_testbed.evaluate import evaluate
from tokenprune_testbed.modeling import EOS, NUM_VISUAL_TOKENS, SMALL, WORDS, build_model, build_processor
from tokenprune_testbed.packing import answer_loss, make_batch
from tokenprune_testbed.questions import evaluation_set, families_of
from tokenprune_testbed.scenes import SCENE_KINDS, SceneKind

RANK = int(os.environ.get("RANK", 0))
DEVICE = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Phase:
    """A stretch of stage 2: decoder depth, visual tokens per image (all or a sample), minutes."""

    layers: int
    visual_tokens: int
    minutes: float

    @classmethod
    def parse(cls, text: str) -> Phase:
        """From "layers x visual tokens : minutes", e.g. "16x144:45"."""
        sizes, minutes = text.split(":")
        layers, visual_tokens = sizes.split("x")
        return cls(int(layers), int(visual_tokens), float(minutes))


def autocast() -> Any:
    """bfloat16 matrix products where they are fast: CPUs without AVX-512 emulate them, sixty times slower."""
    fast = DEVICE.type == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=fast)


# Cheap sequences until retrieval works, then depth, then every visual token.
DEFAULT_PHASES = ("8x40:14", "16x56:24", "16x144:80")


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write atomically: a run killed half-way through a save resumes from the previous one."""
    if RANK != 0:
        return
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def cosine(progress: float, step: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up in steps, then a half cosine over ``progress`` (0 to 1) of the time."""
    return min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients over torchrun's processes, if there are several."""
    if not distributed.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, averaged in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(averaged.view_as(gradient))


def step_seconds(started: float) -> float:
    """Seconds since ``started`` by the first process's clock, so that all processes end a phase together."""
    seconds = torch.tensor(time.monotonic() - started, device=DEVICE)
    if distributed.is_initialized():
        distributed.broadcast(seconds, src=0)
    return seconds.item()


def train_dense(
    out: Path,
    minutes: float,
    model: LlavaForConditionalGeneration | None = None,
    *,
    scenes: SceneKind = "mosaic",
    digit_share: float = 0.75,
    batch_size: int = 32,
    seed: int = 0,
) -> LlavaForConditionalGeneration:
    """Stage 1 on a fresh model with one decoder layer, or at half the rate on ``model``; its decoder does not learn.

    The run's state is ``out/dense.pt``.
    """
    torch.manual_seed(seed)
    fresh = model is None
    if model is None:
        model = build_model(num_layers=1).to(DEVICE)
        with torch.no_grad():
            words = model.get_input_embeddings().weight
            words.mul_(0.15 / words.std())  # the usual 0.02 would keep word-space logits tiny for long
    head = DenseHead().to(DEVICE)
    if DEVICE.type == "cpu":
        model.model.vision_tower.set_attn_implementation("eager")  # see train_answers
    words = model.get_input_embeddings().weight
    tower = dict(model.model.vision_tower.named_parameters())
    positions = [p for n, p in tower.items() if "position_embedding" in n]
    others = [p for n, p in tower.items() if "position_embedding" not in n]
    rest = [*model.model.multi_modal_projector.parameters(), words, *head.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": others, "peak": 1.5e-3},
            {"params": positions, "peak": 1e-2},
            {"params": rest, "peak": 3e-3},
        ],
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    path = out / "dense.pt"
    step, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=DEVICE)
        model.load_state_dict(state["model"])
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    parameters = others + positions + rest
    last_save = spent
    while spent < 60 * minutes:
        started = time.monotonic()
        for group in optimizer.param_groups:
            peak = group["peak"] * (1.0 if fresh else 0.5)
            group["lr"] = peak * cosine(spent / (60 * minutes), step, 100) + 1e-6
        rng = np.random.default_rng([seed, step, RANK])
        drawn = list(dense_scenes(rng, batch_size, digit_share, scenes))
        targets = dense_targets(drawn).to(DEVICE)
        pixels = pixel_values([s.image for s in drawn]).to(DEVICE)
        with autocast():
            loss, accuracy = head(model, pixels, targets)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        spent += step_seconds(started)
        if step % 50 == 0 and RANK == 0:
            shown = " ".join(f"{k} {v:.3f}" for k, v in accuracy.items())
            print(f"dense {step} {spent:.0f}s loss {loss.item():.3f} {shown}", flush=True)
        if spent >= 60 * minutes or spent - last_save > 60:
            last_save = spent
            state = {
                "model": model.state_dict(),
                "head": head.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            save_state(path, {**state, "step": step, "spent": spent})
    return model


def with_fresh_decoder(
    dense: LlavaForConditionalGeneration, layers: int, seed: int
) -> LlavaForConditionalGeneration:
    """A model with stage 1's tower, projector and word embeddings, rescaled, under an untrained decoder."""
    torch.manual_seed(seed)
    model = build_model(layers).to(DEVICE)
    kept = {k: v for k, v in dense.state_dict().items() if ".language_model.layers." not in k}
    model.load_state_dict(kept, strict=False)
    scenes = dense_scenes(np.random.default_rng([seed, 10**9]), 32)
    rescale_to_decoder(model, pixel_values([s.image for s in scenes]).to(DEVICE))
    return model


def with_vocabulary(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """The model with a random embedding for every word that came after it was trained."""
    words = model.get_input_embeddings().weight
    grown = build_model(len(model.model.language_model.layers)).to(DEVICE)
    state = model.state_dict()
    table = grown.get_input_embeddings().weight.detach().clone()
    table *= words.std() / table.std()
    table[: len(words)] = words
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        state[name] = table
    grown.load_state_dict(state)
    return grown


def grow_depth(model: LlavaForConditionalGeneration, layers: int) -> LlavaForConditionalGeneration:
    """The same function with more decoder layers.

    Every new layer starts as a copy of the one before it with its two output projections zeroed, so that it
    passes its input on unchanged until training gives it work.
    """
    old = model.model.language_model.layers
    if len(old) == layers:
        return model
    grown = build_model(layers).to(DEVICE)
    grown.load_state_dict(
        {k: v for k, v in model.state_dict().items() if ".language_model.layers." not in k}, strict=False
    )
    # Old layer i goes to slot i * layers // len(old): new layers are spread evenly between the old ones.
    slots = [i * layers // len(old) for i in range(len(old))]
    for slot, layer in enumerate(grown.model.language_model.layers):
        source = max(i for i, s in enumerate(slots) if s <= slot)
        layer.load_state_dict(copy.deepcopy(old[source].state_dict()))
        if slots[source] != slot:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
    return grown


def export(model: LlavaForConditionalGeneration, folder: Path, words: Sequence[str] = WORDS) -> None:
    """Save model (bfloat16) and processor so that ``from_pretrained`` loads them."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.generation_config.eos_token_id = EOS
    half.save_pretrained(folder)
    build_processor(words).save_pretrained(folder)


class Curve:
    """Appends one row per evaluation to a CSV: where the training stands, overall and per-family accuracy.

    Args:
        path: of the CSV.
        processor: of the model.
        scenes: the kind of scenes to ask about.
        position: names of what `add` is given to say where the training stands.
    """

    def __init__(self, path: Path, processor: Any, scenes: SceneKind, position: Sequence[str]) -> None:
        self.path, self.processor, self.scenes = path, processor, scenes
        if not path.exists():
            self._write([*position, "overall", *families_of(scenes)])

    def _write(self, row: Sequence[object]) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(row)

    def add(self, model: LlavaForConditionalGeneration, num_samples: int, *position: object) -> float:
        """Evaluate on the first held-out questions of a seed of its own; returns the overall accuracy."""
        model.eval()
        samples = evaluation_set(num_samples, seed=1, scenes=self.scenes)
        result = evaluate(model, self.processor, samples, batch_size=50)
        model.train()
        scores = [result.overall, *result.families.values()]
        self._write([*position, *(f"{s.accuracy:.4f}" for s in scores)])
        print(f"held out: {result}", flush=True)
        return result.overall.accuracy


@dataclass(frozen=True)
class AnswerOptions:
    """Settings of stage 2; ``tower_rate`` is the tower's share of the learning rate once it is unfrozen."""

    phases: tuple[Phase, ...]
    batch_size: int = 32
    peak: float = 1.5e-3
    tower_rate: float = 0.0
    seed: int = 0
    scenes: SceneKind = "mosaic"
    plain_share: float = 0.15  # of batches on plain scenes, where these are not
    eval_samples: int = 210
    eval_minutes: float = 10.0
    save_minutes: float = 3.0
    focus: tuple[str, ...] = ("position", "reading")  # asked alone in some batches: the last learned
    focus_share: float = 0.3
    dense_weight: float = (
        0.0  # of stage 1's loss beside the answers', so that features stay readable as words
    )
    chained_share: float = 0.15
    two_image_share: float = 0.1
    first_two_images: int = 300  # step from which two-image prompts are in the mix
    warmup: int = 60  # steps, at the start and after every growth
    objects_every: int = 150  # steps after which scenes get another object, up to between 3 and 7


def _optimizer(model: LlavaForConditionalGeneration, tower_rate: float) -> torch.optim.AdamW:
    tower = list(model.model.vision_tower.parameters())
    rest = [p for n, p in model.named_parameters() if "vision_tower" not in n]
    groups = [{"params": rest, "share": 1.0}, {"params": tower, "share": tower_rate}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02)


def train_answers(
    out: Path, model: LlavaForConditionalGeneration, options: AnswerOptions
) -> LlavaForConditionalGeneration:
    """Stage 2. ``out/answers.pt`` is the run's state, ``out/model`` its latest export, ``out/curve.csv`` its curve.

    The tower is frozen, unless ``tower_rate`` lets it go on learning in the last phase.
    """
    path = out / "answers.pt"
    columns = ("minutes", "step", "images", "layers", "visual_tokens", "train")
    curve = Curve(out / "curve.csv", build_processor(), options.scenes, columns)
    total = 60 * sum(p.minutes for p in options.phases)
    state: dict[str, Any] = {
        "phase": 0,
        "phase_spent": 0.0,
        "step": 0,
        "images": 0,
        "since_growth": 0,
        "train": 0.0,
    }
    optimizer: torch.optim.AdamW | None = None
    if path.exists():
        saved = torch.load(path, map_location=DEVICE)
        state = saved["state"]
        model = build_model(saved["layers"]).to(DEVICE)
        model.load_state_dict(saved["model"])
        if saved["layers"] == options.phases[state["phase"]].layers:
            optimizer = _optimizer(model, options.tower_rate)
            optimizer.load_state_dict(saved["optimizer"])
    last_save = last_eval = time.monotonic()
    while state["phase"] < len(options.phases):
        phase = options.phases[state["phase"]]
        learn_tower = options.tower_rate > 0 and state["phase"] == len(options.phases) - 1
        if optimizer is None or len(model.model.language_model.layers) != phase.layers:
            model = grow_depth(model, phase.layers)
            optimizer = _optimizer(model, options.tower_rate)
            state["since_growth"] = 0
        if DEVICE.type == "cpu":
            # The backward pass of the fused CPU attention is several times slower than plain matrix products.
            model.model.language_model.set_attn_implementation("eager")
            model.model.vision_tower.set_attn_implementation("eager")
        model.train()
        model.model.vision_tower.requires_grad_(learn_tower)
        while state["phase_spent"] < 60 * phase.minutes:
            started = time.monotonic()
            before = 60 * sum(p.minutes for p in options.phases[: state["phase"]])
            rate = (
                options.peak
                * cosine((before + state["phase_spent"]) / total, state["since_growth"], options.warmup)
                + 1e-6
            )
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
            right = _answer_step(model, optimizer, phase, state["step"], learn_tower, options)
            state["train"] = 0.98 * state["train"] + 0.02 * right
            state["step"] += 1
            state["since_growth"] += 1
            state["images"] += options.batch_size * int(os.environ.get("WORLD_SIZE", 1))
            state["phase_spent"] += step_seconds(started)
            if state["step"] % 25 == 0 and RANK == 0:
                clock = f"{(before + state['phase_spent']) / 60:.1f}min"
                print(f"answers {state['step']} {clock} lr {rate:.2e} train {state['train']:.3f}", flush=True)
            now = time.monotonic()
            finished = state["phase_spent"] >= 60 * phase.minutes
            if RANK == 0 and (finished or now - last_eval > 60 * options.eval_minutes):
                minutes = (before + state["phase_spent"]) / 60
                place = (f"{minutes:.1f}", state["step"], state["images"], phase.layers, phase.visual_tokens)
                curve.add(model, options.eval_samples, *place, f"{state['train']:.4f}")
                export(model, out / "model")
                last_eval = time.monotonic()
            if finished:
                state["phase"] += 1
                state["phase_spent"] = 0.0
            if finished or now - last_save > 60 * options.save_minutes:
                weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                save_state(path, {**weights, "state": state, "layers": phase.layers})
                last_save = time.monotonic()
            if finished:
                break
    export(model, out / "model")
    return model


def _answer_step(
    model: LlavaForConditionalGeneration,
    optimizer: torch.optim.AdamW,
    phase: Phase,
    step: int,
    learn_tower: bool,
    options: AnswerOptions,
) -> float:
    """One optimizer step; returns the share of right answer words (end tokens not counted)."""
    kind = np.random.default_rng([options.seed, 1, step])  # of batch: the same in every process
    two_images = step >= options.first_two_images and kind.random() < options.two_image_share
    focused = not two_images and kind.random() < options.focus_share
    chained = kind.random() < options.chained_share
    plain = not focused and kind.random() < options.plain_share
    batch = make_batch(
        np.random.default_rng([options.seed, 2, step, RANK]),
        options.batch_size,
        SMALL,
        scenes="plain" if plain else options.scenes,
        visual_tokens=phase.visual_tokens,
        families=options.focus if focused else None,
        max_objects=int(kind.integers(3, min(7, 3 + step // options.objects_every) + 1)),
        two_images=two_images,
        chained=chained,
    ).to(DEVICE)
    with autocast():
        with torch.set_grad_enabled(learn_tower):
            hidden = model.model.vision_tower(batch.pixels).last_hidden_state
        extra: Tensor | float = 0.0
        if batch.targets is not None and not two_images and options.dense_weight:
            projected = model.model.multi_modal_projector(hidden[:, 1:])
            words = SMALL.word_space(model.get_input_embeddings().weight)
            extra = options.dense_weight * word_loss(words, projected, batch.targets)[0]
        loss, right, labels = answer_loss(model, batch, hidden[:, 1:])
    optimizer.zero_grad()
    (loss + extra).backward()
    average_gradients(model.parameters())
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return right[labels != EOS].float().mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    """Run both stages, or stage 2 alone on the weights of ``--resume-from``."""
    parser = argparse.ArgumentParser(description="Train the testbed model.")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the run's state, resumed when it exists"
    )
    parser.add_argument(
        "--resume-from",
        type=Path,
        default=None,
        help="a saved model; skips stage 1 unless --dense-minutes is given",
    )
    parser.add_argument("--dense-minutes", type=float, default=None, help="of stage 1 (default: 24)")
    parser.add_argument("--digit-share", type=float, default=0.75, help="of the objects in stage 1")
    parser.add_argument("--scenes", choices=SCENE_KINDS, default=AnswerOptions.scenes)
    parser.add_argument("--phases", nargs="+", default=None, help="LAYERSxVISUAL_TOKENS:MINUTES ...")
    parser.add_argument("--batch-size", type=int, default=AnswerOptions.batch_size)
    parser.add_argument(
        "--peak", type=float, default=AnswerOptions.peak, help="peak learning rate of stage 2"
    )
    parser.add_argument(
        "--tower-rate",
        type=float,
        default=AnswerOptions.tower_rate,
        help="the tower's share of the rate in the last phase",
    )
    parser.add_argument(
        "--focus", nargs="+", choices=families_of("mosaic", single_image=True), default=AnswerOptions.focus
    )
    parser.add_argument("--focus-share", type=float, default=AnswerOptions.focus_share)
    parser.add_argument("--dense-weight", type=float, default=AnswerOptions.dense_weight)
    parser.add_argument("--eval-samples", type=int, default=AnswerOptions.eval_samples)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group(timeout=timedelta(hours=1))
    given.out.mkdir(parents=True, exist_ok=True)
    dense_options = {"scenes": given.scenes, "digit_share": given.digit_share, "seed": given.seed}
    if given.resume_from is not None:
        model = LlavaForConditionalGeneration.from_pretrained(given.resume_from, dtype=torch.float32).to(
            DEVICE
        )
        model = with_vocabulary(model)
        if given.dense_minutes:
            model = train_dense(given.out, given.dense_minutes, model, **dense_options)
        layers = len(model.model.language_model.layers)
        phases = given.phases or [f"{layers}x{NUM_VISUAL_TOKENS}:45"]
        # A trained decoder has seen every kind of scene: no curriculum.
        extra: dict[str, int] = {"first_two_images": 0, "objects_every": 1}
    else:
        phases, extra = given.phases or list(DEFAULT_PHASES), {}
        minutes = 24 if given.dense_minutes is None else given.dense_minutes
        dense = train_dense(given.out, minutes, **dense_options)
        model = with_fresh_decoder(dense, Phase.parse(phases[0]).layers, given.seed)
    options = AnswerOptions(
        tuple(map(Phase.parse, phases)),
        batch_size=given.batch_size,
        peak=given.peak,
        tower_rate=given.tower_rate,
        focus=tuple(given.focus),
        focus_share=given.focus_share,
        dense_weight=given.dense_weight,
        scenes=given.scenes,
        eval_samples=given.eval_samples,
        seed=given.seed,
        **extra,
    )
    train_answers(given.out, model, options)
    if distributed.is_initialized():
        # Left to the interpreter's exit, gloo's threads can abort a process that has finished its work.
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
