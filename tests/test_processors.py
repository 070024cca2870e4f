"""Everything that draws, on every family's tiny checkpoint with its real processor and chat template."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import checkpoints

TESTS = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.parametrize("family", checkpoints.PROCESSORS)
def test_pictures_are_drawn_and_reports_are_written(family: str, tmp_path: Path) -> None:
    if not os.environ.get("TOKENPRUNE_TORCHVISION"):
        pytest.skip("make test installs the torchvision that processors of videos need")
    paths = [
        os.environ["TOKENPRUNE_TORCHVISION"],
        *(str(TESTS.parent / p) for p in ("tests", ".", "kernels", "eval")),
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", TESTS / "processor_worker.py", family, tmp_path],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "could not be drawn" not in done.stderr
    with Image.open(tmp_path / "run.png") as drawn:
        assert drawn.width > 100
    assert len(list((tmp_path / "drift").glob("*.png"))) == 3
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/jpeg") >= 3 and "could be drawn" not in page
    assert (tmp_path / "report" / "compare.csv").is_file()
