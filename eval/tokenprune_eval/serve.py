"""vLLM with and without pruned images, the same requests, in turn: ``python -m tokenprune_eval.serve``.

Runs in the environment of `make test-vllm`. Two servers, stock and pruned, stand side by side; blocks of requests go to
one and the other (A B A B), every block with pictures no server has seen. Prefix caching is off, so that the KV blocks
in use are those of the requests under way.
"""

from __future__ import annotations

import argparse
import base64
import csv
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

from PIL import Image

from tokenprune import machine
from tokenprune.testbed import Sample, evaluation_set
from tokenprune.testbed.evaluate import MAX_NEW_TOKENS, wilson_interval
from tokenprune.testbed.loading import model_folder
from tokenprune_eval.checkpoints import write_old_layout
from tokenprune_eval.server import NAME, serving

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
ARMS = ("stock", "pruned", "unplugged")
_BLOCK = 32  # tokens of a KV block; CPUs take multiples of it


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
    folder: Path, setting: dict[str, Any] | None, plugged: bool, dtype: str, blocks: int
) -> AbstractContextManager[str]:
    """A vLLM server, with the plug-in or without any; its address once it answers."""
    words = ["--dtype", dtype, "--max-model-len", "512", "--max-num-seqs", "32"]
    words += ["--limit-mm-per-prompt", '{"image": 1}', "--no-enable-prefix-caching"]
    words += ["--block-size", str(_BLOCK), "--num-gpu-blocks-override", str(blocks)]
    words += ["--mm-processor-cache-gb", "0"]
    if setting is not None:
        words += ["--additional-config", json.dumps({"tokenprune": setting})]
    return serving(folder, *words, **({} if plugged else {"VLLM_PLUGINS": ""}))


def run_block(url: str, samples: Sequence[Sample], concurrency: int, blocks: int) -> Block:
    """Send the requests, so many at a time."""
    block, busy = Block(), threading.Event()
    usage: list[float] = []

    def watch() -> None:
        while not busy.wait(0.2):
            usage.append(_kv_usage(url))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        for first, later, prompt, right in pool.map(lambda s: _ask(url, s), samples):
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


def _ask(url: str, sample: Sample) -> tuple[float, list[float], int, bool]:
    """Seconds to the first token, between later ones, the prompt's tokens, and whether the answer is right."""
    held = io.BytesIO()
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
    parser.add_argument("--model", default="smol")
    parser.add_argument("--method", default="vflowopt")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=48, help="in a block")
    parser.add_argument("--rounds", type=int, default=2, help="blocks per server and concurrency")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        default=["stock", "pruned"],
        help="unplugged: stock without any plug-in; speed-ups are over the first",
    )
    parser.add_argument("--csv", type=Path, default=Path("eval/results/serve.csv"))
    options = parser.parse_args(argv)
    import vllm

    setting = {"method": options.method, "keep": options.keep}
    needed = options.requests * options.rounds * len(options.concurrency) + 32
    samples = [s for s in evaluation_set(2 * needed, seed=5) if len(s.images) == 1]
    random.Random(0).shuffle(samples)  # every block of all kinds of questions
    samples = samples[:needed]
    blocks = 1024
    found: dict[tuple[str, int], list[Block]] = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = write_old_layout(Path(model_folder(options.model)), Path(scratch) / "model")
        urls = {
            name: stack.enter_context(
                server(
                    folder, setting if name == "pruned" else None, name != "unplugged", options.dtype, blocks
                )
            )
            for name in options.arms
        }
        for url in urls.values():
            run_block(url, samples[:8], 4, blocks)
        start = 32
        for concurrency in options.concurrency:
            for number in range(options.rounds):
                asked = samples[start : start + options.requests]
                start += options.requests
                for name in list(urls) if number % 2 == 0 else reversed(list(urls)):
                    block = run_block(urls[name], asked, concurrency, blocks)
                    found.setdefault((name, concurrency), []).append(block)
                    print(f"{name:<8}{concurrency:>4}{block.rate:>8.2f} requests/s", flush=True)
    rows = [_row(options, setting, name, concurrency, found, vllm.__version__) for name, concurrency in found]
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(
            " ".join(
                f"{name}={row[name]}"
                for name in ("arm", "concurrency", "requests_per_s", "speedup", *MEASURED)
            )
        )


def _row(
    options: argparse.Namespace,
    setting: dict[str, Any],
    name: str,
    concurrency: int,
    found: dict[tuple[str, int], list[Block]],
    version: str,
) -> dict[str, str]:
    own, stock = found[name, concurrency], found[options.arms[0], concurrency]
    rates = sorted(block.rate for block in own)
    right = [r for block in own for r in block.right]
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
        "ttft_ms": median([1e3 * s for block in own for s in block.first]),
        "ms_per_output_token": median([1e3 * s for block in own for s in block.later]),
        "prompt_tokens": median([p for block in own for p in block.prompt]),
        "kv_tokens_per_request": median([block.kv_tokens for block in own]),
        "accuracy": f"{sum(right) / len(right):.4f}",
        "low": f"{low:.4f}",
        "high": f"{high:.4f}",
        "vllm": version,
        **machine.describe(),
    }


if __name__ == "__main__":
    main()
