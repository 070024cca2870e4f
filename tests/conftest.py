"""Environment, seeds, hypothesis profiles and markers, shared by every test.

What other libraries read once, at import, is set here before anything imports them: pytest imports this file
before any test module, in every xdist worker too.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENPRUNE_DEBUG", "1")  # what methods return is checked by value, too

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it
    # What the user has tuned is not to be found; what takes a minute to put together is.
    _home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    _own = Path(os.environ.get("TOKENPRUNE_CACHE") or _home / "tokenprune")
    _cache = Path(tempfile.mkdtemp(prefix="tokenprune-tests-"))
    (_own / "testbed").mkdir(parents=True, exist_ok=True)
    (_cache / "testbed").symlink_to(_own / "testbed")
    os.environ["TOKENPRUNE_CACHE"] = str(_cache)
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)

import hypothesis
import pytest
import torch
from PIL import ImageFile

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # triton decides at its import; compiled kernels need CUDA

torch.set_num_threads(1)  # the workers of xdist share the cores

SEED = 0


class _TorchRandom:
    """Lets hypothesis seed and restore torch's generator, so that a failing example fails again."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


_torch_random = _TorchRandom()  # hypothesis keeps only a weak reference
hypothesis.register_random(_torch_random)

_common = {
    "parent": hypothesis.settings.get_profile("default"),
    "deadline": None,
    "derandomize": False,
    "print_blob": True,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
}
hypothesis.settings.register_profile("dev", max_examples=20, **_common)
hypothesis.settings.register_profile("ci", max_examples=200, **_common)
hypothesis.settings.register_profile("fuzz", max_examples=10_000, **_common)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") == "true" else "dev")
hypothesis.settings.load_profile(PROFILE)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"


def pytest_report_header() -> str:
    versions = ", ".join(
        f"{name} {_version(name)}" for name in ("torch", "transformers", "accelerate", "triton")
    )
    device = torch.cuda.get_device_name() if CUDA else "cpu, triton interpreted"
    return f"tokenprune: {versions}; {device}; hypothesis profile {PROFILE}"


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark every hypothesis test, so that `make fuzz` finds it."""
    if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
        item.add_marker(pytest.mark.property)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed torch before the fixtures, which makes session fixtures independent of the tests' order."""
    if not CUDA and item.get_closest_marker("gpu"):
        pytest.skip("needs CUDA")
    torch.manual_seed(SEED)
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval switches it on for the whole process


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    torch.manual_seed(SEED)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("TOKENPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
