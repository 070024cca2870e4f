"""The machine a number was measured on: every CSV of measurements carries it."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata

import torch

from tokenprune_kernels.machine import cpu_name

FIELDS = ("date", "cpu", "threads", "ram_gib", "gpu", "python", "torch", "transformers", "triton")


def describe() -> dict[str, str]:
    """CPU, threads torch may use, memory, GPU and versions, as text; "" for what is absent."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "threads": str(torch.get_num_threads()),
        "ram_gib": ram_gib(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
    }


def ram_gib() -> str:
    try:
        return str(round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30))
    except (ValueError, OSError, AttributeError):  # not a POSIX system
        return ""


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
