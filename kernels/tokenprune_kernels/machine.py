"""What the machine is called: every CSV of measurements says so."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path


def cpu_name() -> str:
    """The processor's model as Linux names it, else what Python knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe_device(device: str) -> dict[str, str]:
    """The processor or GPU, torch's threads, and the versions that matter, as text."""
    import torch  # only measurements need it

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": "" if device == "cuda" else str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": triton,
    }
