"""Train what joins the small model's vision tower to the pretrained decoder: a projector and a low-rank adapter.

    python -m tokenprune_testbed.train_smol --out RUN_DIR                        # from nothing
    python -m tokenprune_testbed.train_smol --out RUN_DIR --start smol.safetensors  # go on from an adapter

Stage 1 is the projector alone, in word space (`dense.py`); stage 2 the projector and the adapter, on packed questions.
A run goes on where it was killed when started again with the same ``--out``, and takes a GPU when there is one.
``RUN_DIR/smol.safetensors`` is the latest export, ``RUN_DIR/curve.csv`` the curve.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenprune_testbed import smol
from tokenprune_testbed.dense import dense_scenes, dense_targets, pixel_values, word_loss
from tokenprune_testbed.packing import answer_loss, make_batch
from tokenprune_testbed.questions import families_of
from tokenprune_testbed.scenes import SCENE_KINDS, SceneKind
from tokenprune_testbed.train import DEVICE, Curve, autocast, cosine, save_state

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Options:
    """Settings of a run; minutes are spent computing, evaluations not counted."""

    projector_minutes: float = 4.0
    minutes: float = 90.0
    batch_size: int = 8
    rank: int = 16
    peak: float = 1e-3
    projector_peak: float = 5e-4
    two_image_share: float = 0.12
    focus: tuple[str, ...] = ("counting", "reading", "position")
    focus_share: float = 0.3
    dense_weight: float = 0.1  # of stage 1's loss beside the answers'
    max_questions: int = 12
    text_tokens: int = 200
    scenes: SceneKind = "mosaic"
    plain_share: float = 0.1  # of batches on plain scenes, where these are not
    eval_samples: int = 100
    eval_minutes: float = 15.0
    seed: int = 0


def train(out: Path, start: Path | None, tower: Path, options: Options) -> None:
    """Both stages; stage 1 is run on an adapter's projector too, for the tower may be another."""
    from peft import LoraConfig, get_peft_model

    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    decoder, tokenizer = smol.load_decoder()
    model = smol.assemble(decoder, tokenizer, smol.read_tower(tower)).to(DEVICE)
    language, processor = smol.language(tokenizer), smol.build_processor(tokenizer)
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    if start is not None:
        _read_projector(projector, start)
    if DEVICE.type == "cpu":
        # The backward pass of the fused CPU attention is several times slower than plain matrix products.
        model.model.language_model.set_attn_implementation("eager")
        model.model.vision_tower.set_attn_implementation("eager")
    words = language.word_space(model.get_input_embeddings().weight)
    if not (out / "answers.pt").exists():
        _train_projector(model, words, out, options, fresh=start is None)

    config = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules=rf".*language_model.*\.({'|'.join(LINEAR)})",
    )
    get_peft_model(model, config)  # puts its layers into the model itself
    projector.requires_grad_(True)
    if start is not None:
        _read_adapter(model, start)
    adapter = [p for n, p in model.named_parameters() if "lora_" in n]
    groups = [
        {"params": adapter, "peak": options.peak},
        {"params": list(projector.parameters()), "peak": options.projector_peak},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    state: dict[str, Any] = {"step": 0, "spent": 0.0, "images": 0, "train": 0.0}
    path = out / "answers.pt"
    if path.exists():
        saved = torch.load(path, map_location=DEVICE)
        state = saved["state"]
        model.load_state_dict(saved["learned"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
    curve = Curve(out / "curve.csv", processor, options.scenes, ("minutes", "step", "images", "train"))
    last_eval = last_save = state["spent"]
    while state["spent"] < 60 * options.minutes:
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = (
                group["peak"] * cosine(state["spent"] / (60 * options.minutes), state["step"], 30) + 1e-6
            )
        right, loss = _answer_step(model, words, language, optimizer, state["step"], options)
        state["train"] = 0.95 * state["train"] + 0.05 * right
        state["step"] += 1
        state["images"] += options.batch_size
        state["spent"] += time.monotonic() - started
        if state["step"] % 10 == 0:
            shown = f"train {state['train']:.3f} loss {loss:.3f}"
            print(f"answers {state['step']} {state['spent'] / 60:.1f}min {shown}", flush=True)
        finished = state["spent"] >= 60 * options.minutes
        if finished or state["spent"] - last_eval > 60 * options.eval_minutes:
            last_eval = state["spent"]
            export(model, out / "smol.safetensors", options)
            place = (f"{state['spent'] / 60:.1f}", state["step"], state["images"], f"{state['train']:.4f}")
            curve.add(model, options.eval_samples, *place)
        if finished or state["spent"] - last_save > 180:
            last_save = state["spent"]
            learned = {n: p for n, p in model.state_dict().items() if "lora_" in n or "projector" in n}
            save_state(path, {"state": state, "learned": learned, "optimizer": optimizer.state_dict()})


def _train_projector(
    model: Any, words: dict[str, Tensor], out: Path, options: Options, *, fresh: bool
) -> None:
    """Stage 1, in one go: it takes minutes."""
    projector, tower = model.model.multi_modal_projector, model.model.vision_tower
    optimizer = torch.optim.AdamW(projector.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    spent, step = 0.0, 0
    features = None
    while spent < 60 * options.projector_minutes:
        started = time.monotonic()
        for group in optimizer.param_groups:
            progress = spent / (60 * options.projector_minutes)
            group["lr"] = (2e-3 if fresh else 1e-3) * cosine(progress, step, 50) + 1e-6
        rng = np.random.default_rng([options.seed, 3, step])
        drawn = list(dense_scenes(rng, 32, digit_share=0.6, scenes=options.scenes))
        with torch.no_grad():
            features = tower(pixel_values([s.image for s in drawn]).to(DEVICE)).last_hidden_state[:, 1:]
        loss, accuracy = word_loss(words, projector(features), dense_targets(drawn).to(DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        spent += time.monotonic() - started
        if step % 50 == 0:
            shown = " ".join(f"{k} {v:.3f}" for k, v in accuracy.items())
            print(f"projector {step} {spent:.0f}s loss {loss.item():.3f} {shown}", flush=True)
    if features is not None and fresh:  # to the scale that the decoder's first layers bear
        with torch.no_grad():
            gain = 0.4 / projector(features).pow(2).mean().sqrt()
            projector.linear_2.weight.mul_(gain)
            projector.linear_2.bias.mul_(gain)


def _answer_step(
    model: Any, words: dict[str, Tensor], language: Any, optimizer: Any, step: int, options: Options
) -> tuple[float, float]:
    """One optimizer step; returns the share of right answer words (end tokens not counted) and the loss."""
    kind = np.random.default_rng([options.seed, 1, step])
    two_images = kind.random() < options.two_image_share
    focused = not two_images and kind.random() < options.focus_share
    plain = not focused and kind.random() < options.plain_share
    batch = make_batch(
        np.random.default_rng([options.seed, 2, step]),
        options.batch_size // 2 if two_images else options.batch_size,
        language,
        scenes="plain" if plain else options.scenes,
        text_tokens=options.text_tokens,
        max_questions=options.max_questions,
        max_objects=int(kind.integers(3, 8)),
        two_images=two_images,
        families=options.focus if focused else None,
    ).to(DEVICE)
    model.train()
    with autocast():
        with torch.no_grad():
            features = model.model.vision_tower(batch.pixels).last_hidden_state[:, 1:]
        loss, right, labels = answer_loss(model, batch, features)
        if batch.targets is not None and not two_images and options.dense_weight:
            projected = model.model.multi_modal_projector(features)
            loss = loss + options.dense_weight * word_loss(words, projected, batch.targets)[0]
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()
    return right[labels != language.end].float().mean().item(), loss.item()


def _read_projector(projector: nn.Module, adapter: Path) -> None:
    with safe_open(adapter, "pt") as file:
        names = [n for n in file.keys() if n.startswith("projector.")]  # noqa: SIM118
        projector.load_state_dict({n.removeprefix("projector."): file.get_tensor(n).float() for n in names})


_OURS, _PEFT = "lora.model.", "model.language_model."


def _read_adapter(model: Any, adapter: Path) -> None:
    """Into peft's layers, whose names have "default" in them."""
    with safe_open(adapter, "pt") as file:
        tensors = {n: file.get_tensor(n).float() for n in file.keys() if n.startswith(_OURS)}  # noqa: SIM118
    state = {
        _PEFT + n.removeprefix(_OURS).replace(".weight", ".default.weight"): tensor
        for n, tensor in tensors.items()
    }
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{adapter} does not fit: {unexpected[0]}")


def export(model: Any, path: Path, options: Options) -> None:
    """Projector and adapter, bfloat16."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "lora_" in name:
            tensors[_OURS + name.split(_PEFT)[1].replace(".default.", ".")] = tensor
        elif "multi_modal_projector." in name:
            tensors["projector." + name.split("multi_modal_projector.")[1]] = tensor
    about = {
        "r": str(options.rank),
        "alpha": str(2 * options.rank),
        "tower": smol.tower_digest(model.model.vision_tower.state_dict()),
        "decoder": f"{smol.WHEEL}=={smol.WHEEL_VERSION}",
        "seed": str(options.seed),
    }
    save_file({n: t.detach().cpu().bfloat16().contiguous() for n, t in tensors.items()}, path, metadata=about)


def main(argv: Sequence[str] | None = None) -> None:
    """Run both stages, or go on with them."""
    parser = argparse.ArgumentParser(description="Train the projector and the adapter of the testbed 'smol'.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run, resumed when it exists")
    parser.add_argument("--start", type=Path, default=None, help="an adapter to go on from")
    parser.add_argument(
        "--tower", type=Path, default=smol.SMALL_MODEL, help="folder of the small model with the tower"
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--scenes", choices=SCENE_KINDS, default=Options.scenes)
    choices = families_of("mosaic", single_image=True)
    parser.add_argument("--focus", nargs="+", choices=choices, default=Options.focus)
    numbers = ("projector_minutes", "minutes", "batch_size", "rank", "peak", "focus_share", "two_image_share")
    for name in (*numbers, "eval_samples", "eval_minutes", "seed"):
        default = getattr(Options, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given = vars(parser.parse_args(argv))
    out, start, tower, threads = (given.pop(name) for name in ("out", "start", "tower", "threads"))
    if threads:
        torch.set_num_threads(threads)
    train(out, start, tower, Options(**given | {"focus": tuple(given["focus"])}))


if __name__ == "__main__":
    main()
