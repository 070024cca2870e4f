"""Pastes every block of the documents into fresh processes, page by page, and adds nothing: `python tests/pasting.py`.

The surroundings are those of somebody who reads: pictures in the folder, and a hub cache in which the checkpoints that
the pages name lie already (tiny ones, of random weights). `python` blocks of a page go into one interpreter, in order;
each command of a `console` block is a process of its own. `bash` blocks need a network, a GPU or hours, and are not
run.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("*/README.md"),
        *ROOT.glob("*/*/README.md"),
    )
    if re.search(r"^```(python|console)$", path.read_text(), re.M)
)
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
LLAVA, QWEN = "llava-hf/llava-1.5-7b-hf", "Qwen/Qwen2.5-VL-3B-Instruct"
LIMIT = 280  # seconds, of a block

# An interpreter as at a prompt: it runs the files that are named to it, one after the other, in one namespace.
PROMPT = """
import sys, traceback
names = {"__name__": "__main__"}
for line in sys.stdin:
    try:
        exec(compile(open(line.strip()).read(), line.strip(), "exec"), names)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    print("pasted", flush=True)
"""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        where = self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page
        return f"{where}:{self.line} ({self.language})"


class PastingError(AssertionError):
    """A block does not run as it stands."""


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S):
        yield Block(page, text[: found.start()].count("\n") + 2, found[1], found[2])


def commands(text: str) -> list[str]:
    """Of a console block; comments end at the line, a backslash continues it."""
    return [
        line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")
    ]


def make_hub(folder: Path) -> Path:
    """A hub cache with tiny checkpoints under the names that the pages use; made where torchvision can be imported."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--hub", str(folder)],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    if done.returncode:
        raise PastingError(f"the checkpoints could not be made:\n{done.stderr[-3000:]}")
    return folder


def _write_hub(folder: Path) -> None:
    from tokenprune_eval.checkpoints import write_llava
    from tokenprune_eval.qwen_checkpoint import write_qwen

    for name, write in ((LLAVA, write_llava), (QWEN, partial(write_qwen, "qwen2_5_vl"))):
        own = folder / f"models--{name.replace('/', '--')}"
        write(own / "snapshots" / "0")
        (own / "refs").mkdir()
        (own / "refs" / "main").write_text("0")


def write_pictures(folder: Path) -> None:
    """`photo.jpg`, and a folder `pictures` of eighteen with a file of questions about them."""
    photo = Image.fromarray(data.astronaut())
    photo.save(folder / "photo.jpg")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(18):
        left, top = rng.integers(0, 256, 2).tolist()
        photo.crop((left, top, left + 200, top + 150)).save(folder / "pictures" / f"{i:02d}.jpg")
        lines.append(f'{{"image": "pictures/{i:02d}.jpg", "question": "Is it a person?", "answer": "yes"}}\n')
    (folder / "questions.jsonl").write_text("".join(lines))


def _environment(**more: str) -> dict[str, str]:
    paths = [
        os.environ.get("TOKENPRUNE_TORCHVISION", ""),
        *(str(ROOT / part) for part in (".", "kernels", "eval")),
    ]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in (*paths, os.environ.get("PYTHONPATH")) if path),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def surroundings(folder: Path, hub: Path) -> dict[str, str]:
    """The environment of a reader who works in the folder."""
    write_pictures(folder)
    return _environment(HF_HUB_CACHE=str(hub), TOKENPRUNE_CACHE=str(folder / ".cache"))


def paste(page: Path, folder: Path, hub: Path, told: bool = False) -> int:
    """Run a page's blocks in a folder; how many there were.

    Raises:
        PastingError: says which block failed, and what it printed.
    """
    environment = surroundings(folder, hub)
    count = 0
    with (
        open(folder / "printed.txt", "w+") as printed,
        subprocess.Popen(
            [sys.executable, "-u", "-c", PROMPT],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
            text=True,
        ) as python,
    ):
        try:
            for block in blocks(page):
                if block.language not in ("python", "console"):
                    continue
                if told:
                    print(block, flush=True)
                count += 1
                if block.language == "console":
                    for command in commands(block.text):
                        _run(command, block, folder, environment)
                    continue
                assert python.stdin is not None and python.stdout is not None
                source = folder / f"{page.stem}_{block.line}.py"
                source.write_text("\n" * (block.line - 1) + block.text)
                python.stdin.write(f"{source}\n")
                python.stdin.flush()
                for line in python.stdout:
                    if line == "pasted\n":
                        break
                else:
                    printed.seek(0)
                    raise PastingError(f"{block} fails as pasted:\n{printed.read()[-3000:]}")
        finally:
            assert python.stdin is not None
            python.stdin.close()
            python.terminate()
    return count


def run_example(path: Path, folder: Path, hub: Path) -> None:
    """A script of `examples/`, as it stands.

    Raises:
        PastingError: it fails.
    """
    block = Block(path, 1, "example", path.read_text())
    _run(shlex.join([sys.executable, str(path)]), block, folder, surroundings(folder, hub))


def _run(command: str, block: Block, folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    if done.returncode:
        raise PastingError(f"{block}: {command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")


def main() -> None:
    import tempfile
    import time

    parser = argparse.ArgumentParser(description="Paste the documents' blocks into fresh processes.")
    parser.add_argument("pages", nargs="*", type=Path, help="some of them, from the repository's root")
    parser.add_argument("--hub", type=Path, help="only make the checkpoints, there")
    options = parser.parse_args()
    if options.hub is not None:
        _write_hub(options.hub)
        return
    chosen = [path.resolve() for path in options.pages] or [*PAGES, *EXAMPLES]
    with tempfile.TemporaryDirectory() as made:
        hub = make_hub(Path(made) / "hub")
        for number, page in enumerate(chosen):
            folder = Path(made) / str(number)
            folder.mkdir()
            start = time.perf_counter()
            if page.suffix == ".py":
                write_pictures(folder) if False else None
                _run(
                    shlex.join([sys.executable, str(page)]),
                    Block(page, 1, "example", ""),
                    folder,
                    surroundings(folder, hub),
                )
                count = 1
            else:
                count = paste(page, folder, hub, told=True)
            print(
                f"{page.relative_to(ROOT)}: {count} blocks, {time.perf_counter() - start:.0f} s", flush=True
            )


if __name__ == "__main__":
    main()
