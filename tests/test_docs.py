"""Every Python block of the documents runs, in order, on a small model in place of what would be downloaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import tiny
import tokenprune
from tokenprune.testbed.modeling import build_model, build_processor

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("*/README.md"),
        *ROOT.glob("*/*/README.md"),
    )
    if "```python" in path.read_text()
)


def blocks(path: Path) -> list[tuple[int, str]]:
    text = path.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    return [(text[: m.start()].count("\n") + 1, m[1]) for m in found]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the blocks take for granted: a loaded model, its processor and inputs, pictures in a folder."""
    monkeypatch.setenv("TOKENPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for i in range(18):
        pixels = np.random.default_rng(i).integers(0, 255, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    torch.manual_seed(0)
    model, processor = build_model().eval(), build_processor()
    # A model whose tokens are thrown to two sides collapses clearly.
    direction = torch.randn(model.config.text_config.hidden_size)
    model.model.language_model.layers[1].register_forward_hook(
        lambda _module, _args, output: output + 50 * torch.tanh(100 * output[..., :1]) * direction
    )
    for auto, made in (
        (transformers.AutoModelForImageTextToText, model),
        (transformers.AutoProcessor, processor),
    ):
        monkeypatch.setattr(auto, "from_pretrained", lambda *_, made=made, **__: made)
    inputs = processor(
        images=[Image.open(tmp_path / "pictures" / "0.png")],
        text=["<image> what is it ?"],
        return_tensors="pt",
    )
    return {
        "model": model,
        "processor": processor,
        "inputs": {**inputs, "max_new_tokens": 2},
        "queries": torch.randn(3, 8, 16),
        "keys_and_values": [torch.randn(2, 3, 9, 4) for _ in range(4)],
        "index": torch.tensor([[0, 3, 8], [1, 2, -1]]),
        "image": Image.open(tmp_path / "pictures" / "0.png"),
        "Norm": None,
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_run(path: Path, names: dict[str, Any]) -> None:
    prelude = (
        "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom torch import Tensor\n"
        "import tokenprune\nfrom tokenprune.methods import ImageTokens, Needs, ScoreMethod\n"
    )
    exec(prelude, names)
    for line, block in blocks(path):
        code = compile("\n" * line + block, str(path), "exec")
        exec(code, names)
        if tokenprune.is_wrapped(names["model"]):
            tokenprune.unwrap(names["model"])
    if path.name == "method.md":
        model = tiny.llava()
        with tokenprune.pruned(model, names["Norm"](), keep=0.5), torch.no_grad():
            model(**tiny.inputs(model, [["text:3", "image", "text:2"]]))
            assert tokenprune.report(model).pruned


def test_every_document_with_code_is_among_them() -> None:
    assert {"README.md", "method.md", "quickstart.md"} <= {path.name for path in DOCUMENTS} and len(
        DOCUMENTS
    ) >= 5


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
