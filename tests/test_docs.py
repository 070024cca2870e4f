"""The documents hold: every block runs as pasted, every example as it stands, numbers of the contract are real."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

import pasting
from pasting import EXAMPLES, PAGES, ROOT


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not os.environ.get("TOKENPRUNE_TORCHVISION"):
        pytest.skip("make test installs the torchvision that Qwen-VL's processors need")
    return pasting.make_hub(tmp_path_factory.mktemp("hub"))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_block_runs_as_pasted(page: Path, hub: Path, tmp_path: Path) -> None:
    assert pasting.paste(page, tmp_path, hub) > 0


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_example_runs(path: Path, hub: Path, tmp_path: Path) -> None:
    pasting.run_example(path, tmp_path, hub)


def test_a_block_that_fails_is_found(tmp_path: Path) -> None:
    """In the second of two, whose first defines a name; and in a command."""
    page = tmp_path / "page.md"
    for text, failing in (
        ("```python\na = 1\n```\n\n```python\nprint(a, b)\n```\n", "page.md:6 (python)"),
        ("```python\na = 1\n```\n\n```console\necho fine\ntokenprune nosuch\n```\n", "page.md:6 (console)"),
    ):
        page.write_text(text)
        folder = tmp_path / f"run{failing[-3]}"
        folder.mkdir()
        with pytest.raises(pasting.PastingError, match=re.escape(failing)):
            pasting.paste(page, folder, tmp_path)


def test_every_document_with_code_is_among_them() -> None:
    assert {"README.md", "method.md", "quickstart.md", "train.md", "app.md"} <= {path.name for path in PAGES}
    assert len(PAGES) >= 9 and len(EXAMPLES) == 5


def test_contract_numbers_that_tests_name_exist() -> None:
    numbers = {int(n) for n in re.findall(r"^(\d+)\. ", (ROOT / "docs/contract.md").read_text(), re.M)}
    assert numbers == set(range(1, 24))
    for path in (ROOT / "tests").rglob("*.py"):
        for listed in re.findall(r"[Cc]ontract ((?:\d+(?:, | and )?)+)", path.read_text()):
            assert {int(n) for n in re.findall(r"\d+", listed)} <= numbers, path


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands in git, with pictures and the answers it prints."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("TOKENPRUNE_CACHE", str(tmp_path))
    path = ROOT / "docs" / "tour.ipynb"
    held, notebook = (nbformat.read(path, as_version=4) for _ in range(2))
    nbclient.NotebookClient(notebook, timeout=250, kernel_name="python3").execute()

    def said(cells: Any) -> list[str]:
        texts = [
            o.text  # not stderr: what loads weights shows a bar there
            for c in cells
            if c.cell_type == "code"
            for o in c.outputs
            if o.output_type == "stream" and o.name == "stdout"
        ]
        return [line for line in "".join(texts).splitlines() if "->" in line or "norm" in line]

    assert said(notebook.cells) == said(held.cells) and len(said(held.cells)) == 4
    pictures = [
        o
        for c in notebook.cells
        if c.cell_type == "code"
        for o in c.outputs
        if "image/png" in o.get("data", {})
    ]
    assert len(pictures) == 3
