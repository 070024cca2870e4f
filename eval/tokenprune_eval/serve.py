"""vLLM with and without pruned images, the same requests, in turn: ``python -m tokenprune_eval.serve``.

Runs in the environment of `make test-vllm`. Servers stand side by side; blocks of requests go to one and the other (A B
A B), every block with pictures no server has seen. Prefix caching is off, so that the KV blocks in use are those of the
requests under way.

``--model smol`` has small pictures and answers that are right or wrong. ``--model qwen`` is a Qwen2.5-VL of random
weights, its decoder wide enough to matter, for pictures of hundreds to thousands of tokens; it knows a third arm: the
picture made smaller (`max_pixels`), to as many tokens as are kept.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import re
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokenprune import machine, tables
from tokenprune_eval.checkpoints import write_old_layout
from tokenprune_eval.qwen_checkpoint import write_qwen
from tokenprune_eval.server import NAME, serving
from tokenprune_testbed import Sample, evaluation_set
from tokenprune_testbed.evaluate import MAX_NEW_TOKENS, wilson_interval
from tokenprune_testbed.loading import model_folder

FIELDS = (
    "model",
    "arm",
    "setting",
    "concurrency",
    "requests",
    "rounds",
    "requests_per_s",
    "slowest",
    "fastest",
    "speedup",
    "image_tokens",
)
MEASURED = (
    "ttft_ms",
    "ms_per_output_token",
    "prompt_tokens",
    "kv_tokens_per_request",
    "accuracy",
    "low",
    "high",
)
COLUMNS = (*FIELDS, *MEASURED, "vllm", *machine.FIELDS)
ARMS = ("stock", "pruned", "unplugged", "smaller")
QWEN = "qwen"
_BLOCK = 32  # tokens of a KV block; CPUs take multiples of it
_TOKENS = 144  # of a testbed picture
_CONTEXT = 8192  # of the model with larger pictures
_WARM = 8  # requests that are not measured


@dataclass
class Block:
    """What one block of requests to one server came to."""

    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    kv_tokens: float = 0.0

    @property
    def rate(self) -> float:
        return len(self.right) / self.seconds


def server(
    folder: Path, setting: dict[str, Any] | None, plugged: bool, dtype: str, blocks: int, length: int
) -> AbstractContextManager[str]:
    """A vLLM server, with the plug-in or without any; its address once it answers."""
    words = ["--dtype", dtype, "--max-model-len", str(length), "--max-num-seqs", "32"]
    words += ["--limit-mm-per-prompt", '{"image": 1, "video": 0}', "--no-enable-prefix-caching"]
    words += ["--trust-request-mm-kwargs"]
    words += ["--block-size", str(_BLOCK), "--num-gpu-blocks-override", str(blocks)]
    words += ["--mm-processor-cache-gb", "0"]
    if setting is not None:
        words += ["--additional-config", json.dumps({"tokenprune": setting})]
    return serving(folder, *words, **({} if plugged else {"VLLM_PLUGINS": ""}))


def run_block(
    url: str, samples: Sequence[Sample], concurrency: int, blocks: int, shrink: float | None = None
) -> Block:
    """Send the requests, so many at a time, their pictures' areas shrunk to that share."""
    block, busy = Block(), threading.Event()
    usage: list[float] = []

    def watch() -> None:
        while not busy.wait(0.2):
            usage.append(_kv_usage(url))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        for first, later, prompt, right in pool.map(lambda s: _ask(url, s, shrink), samples):
            block.first.append(first)
            block.later += later
            block.prompt.append(prompt)
            block.right.append(right)
    block.seconds = time.perf_counter() - began
    busy.set()
    watcher.join()
    block.kv_tokens = max(usage, default=0.0) * blocks * _BLOCK / concurrency
    return block


def _kv_usage(url: str) -> float:
    """Share of the KV blocks that are in use."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        found = re.search(r"^vllm:kv_cache_usage_perc\{[^}]*\} (\S+)$", answer.read().decode(), re.M)
    return float(found[1]) if found else 0.0


def _ask(url: str, sample: Sample, shrink: float | None) -> tuple[float, list[float], int, bool]:
    """Seconds to the first token, between later ones, the prompt's tokens, and whether the answer is right."""
    held = io.BytesIO()
    height, width, _ = sample.images[0].shape
    Image.fromarray(sample.images[0]).save(held, "PNG")
    data = "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": sample.question}]
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": MAX_NEW_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if shrink is not None:
        pixels = int(height * width * shrink)
        body["mm_processor_kwargs"] = {"size": {"shortest_edge": 56 * 56, "longest_edge": pixels}}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    began, times, text, prompt = time.perf_counter(), [], "", 0
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                prompt = event["usage"]["prompt_tokens"]
            for choice in event["choices"]:
                if choice["delta"].get("content"):
                    times.append(time.perf_counter())
                    text += choice["delta"]["content"]
    later = [b - a for a, b in pairwise(times)]
    first = (times[0] if times else time.perf_counter()) - began
    return first, later, prompt, " ".join(text.split()) == sample.answer


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the CSV."""
    parser = argparse.ArgumentParser(description="vLLM, stock and pruned.")
    parser.add_argument(
        "--model", default="smol", help="small, smol, or qwen: random weights, larger pictures"
    )
    parser.add_argument("--method", default="vflowopt")
    parser.add_argument("--recycling", help="of the method, another one than its default")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=48, help="in a block")
    parser.add_argument("--rounds", type=int, default=2, help="blocks per server and concurrency")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[576], help="of a picture; with --model qwen"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        default=["stock", "pruned"],
        help="unplugged: stock without any plug-in; smaller: stock, the picture made as many tokens as are kept "
        "(--model qwen); speed-ups are over the first",
    )
    parser.add_argument("--csv", type=Path, default=Path("eval/results/serve.csv"))
    options = parser.parse_args(argv)
    if "smaller" in options.arms and options.model != QWEN:
        parser.error("only --model qwen takes pictures of any size")
    import vllm

    sizes = options.tokens if options.model == QWEN else [_TOKENS]
    rows: list[dict[str, str]] = []
    options.csv.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = _folder(options.model, Path(scratch) / "model")
        for keep in options.keep:
            for tokens in sizes:
                for row in _measure(options, folder, keep, tokens, vllm.__version__):
                    tables.append(options.csv, row)
                    rows.append(row)
    shown = ("arm", "concurrency", "image_tokens", "requests_per_s", "speedup", *MEASURED)
    for row in rows:
        print(" ".join(f"{name}={row[name]}" for name in shown))


def _folder(model: str, folder: Path) -> Path:
    if model == QWEN:
        return write_qwen("qwen2_5_vl", folder, layers=8, width=768, context=_CONTEXT)
    return write_old_layout(Path(model_folder(model)), folder)


def _samples(options: argparse.Namespace, tokens: int) -> list[Sample]:
    """Questions about one picture each, no picture twice in a block and at a server."""
    needed = options.requests * options.rounds * len(options.concurrency) + _WARM
    if options.model != QWEN:
        samples = [s for s in evaluation_set(2 * needed, seed=5) if len(s.images) == 1]
        random.Random(0).shuffle(samples)  # every block of all kinds of questions
        return samples[:needed]
    side = 28 * round(tokens**0.5)
    rng = np.random.default_rng(tokens)
    coarse = rng.integers(0, 255, (needed, 24, 24, 3), dtype=np.uint8)
    images = [np.asarray(Image.fromarray(own).resize((side, side))) for own in coarse]
    return [Sample([image], "What is it?", "", "none") for image in images]


def _measure(
    options: argparse.Namespace, folder: Path, keep: float, tokens: int, version: str
) -> list[dict[str, str]]:
    """Rows of the table, of one budget and size of pictures."""
    setting = {"method": options.method, "keep": keep}
    if options.recycling is not None:
        setting["recycling"] = options.recycling
    samples = _samples(options, tokens)
    found: dict[tuple[str, int], list[Block]] = {}
    longest = max(options.concurrency) * (tokens + 4 * _BLOCK)
    blocks = max(1024, 2 * longest // _BLOCK)
    length = 512 if options.model != QWEN else _CONTEXT
    with ExitStack() as stack:
        urls = {
            name: stack.enter_context(
                server(
                    folder,
                    setting if name == "pruned" else None,
                    name != "unplugged",
                    options.dtype,
                    blocks,
                    length,
                )
            )
            for name in options.arms
        }
        shrink = {name: keep if name == "smaller" else None for name in urls}
        for name, url in urls.items():
            run_block(url, samples[:_WARM], 4, blocks, shrink[name])
        start = _WARM
        for concurrency in options.concurrency:
            for number in range(options.rounds):
                asked = samples[start : start + options.requests]
                start += options.requests
                for name in list(urls) if number % 2 == 0 else reversed(list(urls)):
                    block = run_block(urls[name], asked, concurrency, blocks, shrink[name])
                    found.setdefault((name, concurrency), []).append(block)
                    print(
                        f"{keep:<6}{tokens:>6} {name:<8}{concurrency:>4}{block.rate:>8.2f} requests/s",
                        flush=True,
                    )
    return [_row(options, setting, tokens, name, concurrency, found, version) for name, concurrency in found]


def _row(
    options: argparse.Namespace,
    setting: dict[str, Any],
    tokens: int,
    name: str,
    concurrency: int,
    found: dict[tuple[str, int], list[Block]],
    version: str,
) -> dict[str, str]:
    own, stock = found[name, concurrency], found[options.arms[0], concurrency]
    rates = sorted(block.rate for block in own)
    right = [r for block in own for r in block.right]
    known = options.model != QWEN  # whose weights are random
    low, high = wilson_interval(sum(right), len(right))
    speedup = statistics.median(a.rate / b.rate for a, b in zip(own, stock, strict=True))

    def median(values: Sequence[float]) -> str:
        return f"{statistics.median(values):.4g}" if values else ""

    return {
        "model": options.model,
        "arm": name,
        "setting": json.dumps(setting) if name == "pruned" else "",
        "concurrency": str(concurrency),
        "requests": str(options.requests),
        "rounds": str(options.rounds),
        "requests_per_s": median(rates),
        "slowest": f"{rates[0]:.4g}",
        "fastest": f"{rates[-1]:.4g}",
        "speedup": f"{speedup:.3f}",
        "image_tokens": str(tokens),
        "ttft_ms": median([1e3 * s for block in own for s in block.first]),
        "ms_per_output_token": median([1e3 * s for block in own for s in block.later]),
        "prompt_tokens": median([p for block in own for p in block.prompt]),
        "kv_tokens_per_request": median([block.kv_tokens for block in own]),
        "accuracy": f"{sum(right) / len(right):.4f}" if known else "",
        "low": f"{low:.4f}" if known else "",
        "high": f"{high:.4f}" if known else "",
        "vllm": version,
        **machine.describe(),
    }


if __name__ == "__main__":
    main()
