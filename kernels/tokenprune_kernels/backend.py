"""Which backend an operation runs on: Triton where the data is on a GPU, plain PyTorch elsewhere."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["plain", "triton"]

#: Names a backend for every operation, whatever the device.
VARIABLE = "TOKENPRUNE_KERNELS"

#: What the kernels take. Anything else (float64) goes to the plain backend.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@cache
def has_triton() -> bool:
    """Whether Triton is installed. It is imported only by the kernels themselves."""
    return importlib.util.find_spec("triton") is not None


def backend_for(x: Tensor) -> Backend:
    """The backend for `x`: the one that the environment names, else by device and dtype.

    Raises:
        ValueError: ``TOKENPRUNE_KERNELS`` names no backend.
        RuntimeError: It names Triton, which is not installed.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced not in ("", *get_args(Backend)):
        raise ValueError(f"{VARIABLE} must be one of {get_args(Backend)} or unset, got {forced!r}")
    if forced == "triton" and not has_triton():
        raise RuntimeError(f"{VARIABLE}=triton, and triton is not installed: pip install triton, or unset it")
    if forced:
        return "triton" if forced == "triton" else "plain"
    return "triton" if x.is_cuda and x.dtype in KERNEL_DTYPES and has_triton() else "plain"
