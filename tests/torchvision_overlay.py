"""torchvision for tests that need it, out of the way of all others: processors of videos import nothing without it."""

from __future__ import annotations

import os
import sys
import types


def use_torchvision() -> bool:
    """Make torchvision importable; to be called before transformers is imported.

    PyPI's wheel is built for CUDA. Beside a torch for CPUs its compiled operators do not load, and two of its modules,
    which only say more about these operators, fail: they are left out. Processors resize and normalise without them.
    """
    folder = os.environ.get("TOKENPRUNE_TORCHVISION")
    if folder:
        sys.path.append(folder)
        for part in ("_meta_registrations", "_autograd_registrations"):
            sys.modules[f"torchvision.{part}"] = types.ModuleType(part)
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return True
