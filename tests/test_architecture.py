"""The house: imports go one way, files and functions stay small, and an argument of `wrap` is written once."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "tokenprune"

# From the ground up: a module imports only from those above it here, or from its own line. Lazy imports and those for
# type checkers count.
FLOORS = (
    ("errors", "releases", "tensors", "hashing", "cache", "machine", "timing"),
    ("files", "tables", "optional", "budget", "named", "tokens", "estimators", "testbeds"),
    ("space",),
    ("images", "tiling", "draw"),
    ("adaptive", "printed"),
    ("models",),
    ("fingerprint",),
    ("methods",),
    ("arguments", "profiles"),
    ("auto",),
    ("config",),
    ("runtime", "settle"),
    ("reporting",),
    ("api",),
    ("analysis",),
    ("tune",),
    ("compare", "bench", "serving", "app"),
    ("cli", "__main__"),
    ("lmms",),
)
# `import tokenprune` names what is further in at its first use; that is its purpose.
ENTRY = "tokenprune"


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ["tokenprune", *path.relative_to(ROOT).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(module: str) -> set[str]:
    """The package's own modules that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(tree(modules()[module])):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in modules() else str(node.module))
    return {name for name in names if name.split(".")[0] == "tokenprune"}


def floor_of(module: str) -> int:
    name = module.split(".")[1]
    return next(i for i, names in enumerate(FLOORS) if name in names)


def test_every_module_has_its_floor() -> None:
    known = {name for names in FLOORS for name in names}
    assert {m.split(".")[1] for m in modules() if m != ENTRY} == known


@pytest.mark.parametrize("module", [m for m in modules() if m != ENTRY])
def test_imports_go_down(module: str) -> None:
    upwards = {other for other in imported(module) if other != ENTRY and floor_of(other) > floor_of(module)}
    assert not upwards
    if floor_of(module) < floor_of("tokenprune.analysis"):
        assert ENTRY not in imported(module)


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {m: {n for n in imported(m) if n in modules() and n != ENTRY} for m in modules() if m != ENTRY}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in graph[module] - {module}:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_what_is_large_says_why() -> None:
    """Size is a smell, not a law: a file of 400 lines, or a function of 80 behind its signature, gives its reason."""
    told = (ROOT.parent / "CONTRIBUTING.md").read_text()
    for module, path in modules().items():
        name = path.relative_to(ROOT).as_posix()
        assert len(path.read_text().splitlines()) <= 400 or f"`{name}`" in told, name
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.body[0].lineno + 1
                assert length <= 80 or f"`{module}.{node.name}`" in told, f"{module}.{node.name}"
