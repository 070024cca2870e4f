"""Decoding steps of generate(), growing and static caches, pruned and not: ``python -m tokenprune_eval.studies.steps``.

With a static cache generate() compiles its steps on a GPU, CUDA graphs included. A wrapped and a stock model of the
same random weights stand side by side and answer in turn (A B A B); a step is what an answer takes beyond its first
token. The vision tower is small and runs in both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

import tokenprune
from tokenprune import machine, tables
from tokenprune.bench.geometry import GEOMETRIES, build, prompts


def answer(model: Any, inputs: dict[str, Any], new: int, cache: str) -> tuple[float, Any]:
    """Seconds of an answer of so many tokens, and what generate() returns."""
    options: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
    _wait(model)
    began = time.perf_counter()
    out = model.generate(
        **inputs,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        **options,
    )
    _wait(model)
    return time.perf_counter() - began, out


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def held(cache: Any) -> int:
    """Bytes of a cache's tensors."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(
    geometry: Any, batch: int, cache: str, method: str, keep: float, tokens: int, rounds: int, device: str
) -> list[dict[str, str]]:
    """Rows of the stock and of the wrapped model."""
    torch.compiler.reset()
    inputs = prompts(geometry, batch, device=device)
    inputs.pop("position_ids")
    arms = {name: build(geometry, device) for name in ("stock", method)}
    tokenprune.wrap(arms[method], method, keep=keep)
    warm, share, seen = {}, {}, {}
    first: dict[str, list[float]] = {}
    per: dict[str, list[float]] = {}
    for name, model in reversed(arms.items()):
        counters.clear()
        began = time.perf_counter()
        for _ in range(2):
            _, out = answer(model, inputs, tokens + 1, cache)
        warm[name], share[name] = time.perf_counter() - began, held(out.past_key_values)
        seen[name] = (counters["frames"]["total"], sum(counters["graph_break"].values()))
    for _ in range(rounds):
        for name, model in arms.items():
            begun = min(answer(model, inputs, 1, cache)[0] for _ in range(2))
            whole = answer(model, inputs, tokens + 1, cache)[0]
            first.setdefault(name, []).append(1e3 * begun)
            per.setdefault(name, []).append(1e3 * (whole - begun) / tokens)
    rows = []
    for name in arms:
        ratio = statistics.median(a / b for a, b in zip(per[name], per["stock"], strict=True))
        rows.append(
            {
                "geometry": geometry.name,
                "layers": str(geometry.layers),
                "visual": str(geometry.visual),
                "batch": str(batch),
                "cache": cache,
                "method": "none" if name == "stock" else name,
                "keep": "" if name == "stock" else str(keep),
                "tokens": str(tokens),
                "rounds": str(rounds),
                "ms_per_token": f"{statistics.median(per[name]):.4g}",
                "ratio": f"{ratio:.3f}",
                "warm_up_s": f"{warm[name]:.3g}",
                "first_ms": f"{statistics.median(first[name]):.4g}",
                "cache_bytes": str(share[name]),
                "cache_share": f"{share[name] / share['stock']:.3f}",
                "frames": str(seen[name][0]),
                "breaks": str(seen[name][1]),
                **machine.describe(),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the CSV, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description="Decoding steps, growing and static caches.")
    parser.add_argument("--geometry", default="tiny", choices=sorted(GEOMETRIES))
    parser.add_argument("--layers", type=int, help="of the decoder, another number than the geometry's")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--cache", nargs="+", choices=("growing", "static"), default=["growing", "static"])
    parser.add_argument("--method", nargs="+", default=["vflowopt"])
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, required=True)
    options = parser.parse_args(argv)
    geometry = GEOMETRIES[options.geometry]
    if options.layers is not None:
        geometry = replace(geometry, layers=options.layers)
    for cache in options.cache:
        for method in options.method:
            asked = (
                options.batch,
                cache,
                method,
                options.keep,
                options.tokens,
                options.rounds,
                options.device,
            )
            for row in measure(geometry, *asked):
                tables.append(options.csv, row)
                print(" ".join(f"{name}={row[name]}" for name in list(row)[1:17]), flush=True)


if __name__ == "__main__":
    main()
