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
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("processors")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per family with what the commands left there; one process makes all, for its imports take longest."""
    if not os.environ.get("TOKENPRUNE_TORCHVISION"):
        pytest.skip("make test installs the torchvision that processors of videos need")
    folder = tmp_path_factory.mktemp("families")
    paths = [
        os.environ["TOKENPRUNE_TORCHVISION"],
        *(str(TESTS.parent / p) for p in ("tests", ".", "kernels", "eval")),
        os.environ.get("PYTHONPATH", ""),
    ]
    subprocess.run(
        [sys.executable, "-W", "ignore", TESTS / "processor_worker.py", folder, *checkpoints.PROCESSORS],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        check=True,
        timeout=850,
    )
    return folder


@pytest.mark.parametrize("family", checkpoints.PROCESSORS)
def test_pictures_are_drawn_and_reports_are_written(family: str, made: Path) -> None:
    said = (made / family / "stderr.txt").read_text()
    assert said.endswith("done\n"), said[-3000:]
    assert "could not be drawn" not in said
    with Image.open(made / family / "run.png") as drawn:
        assert drawn.width > 100
    assert len(list((made / family / "drift").glob("*.png"))) == 3
    page = (made / family / "report" / "report.html").read_text()
    assert page.count("data:image/jpeg") >= 3 and "could be drawn" not in page
    assert (made / family / "report" / "compare.csv").is_file()
