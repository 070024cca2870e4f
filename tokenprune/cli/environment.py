"""`tokenprune env`: versions and hardware, for bug reports."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

from tokenprune.cli.options import JsonOption
from tokenprune.cli.shell import console, print_json
from tokenprune_kernels.machine import cpu_name

DISTRIBUTIONS = ("torch", "transformers", "triton", "flash-attn", "accelerate", "lmms-eval")


def env(as_json: JsonOption = False) -> None:
    """Versions and hardware, for bug reports."""
    facts = environment()
    if as_json:
        print_json(facts)
        return
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        table.add_row(name, str(shown) if shown else "-")
    console().print(table)


def environment() -> dict[str, Any]:
    """Everything `env` shows; None (or an empty list) for what is absent."""
    import torch

    import tokenprune

    facts: dict[str, Any] = {"tokenprune": tokenprune.__version__, "python": platform.python_version()}
    facts |= {name: _version(name) for name in DISTRIBUTIONS}
    facts |= {
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    return facts


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
