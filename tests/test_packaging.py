"""The wheels hold what they must and nothing else, every way of importing works, and no import is heavier than needed.

Each import is made by a fresh interpreter: this one has long imported everything.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata, util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (ROOT, ROOT / "kernels", ROOT / "eval")
HOMES = (*SOURCES, ROOT / "eval")  # of PACKAGES
PACKAGES = ("tokenprune", "tokenprune_kernels", "tokenprune_eval", "tokenprune_testbed")
DISTRIBUTION = "tokenprune-vlm"
# Absent on many machines that can prune: `import tokenprune` must neither need them nor pay for them.
LAZY = (
    *("pydantic", "typer", "rich", "optuna", "matplotlib", "triton", "flash_attn", "lmms_eval"),
    *("sklearn", "skimage", "peft", "datasets"),
)


def run_python(code: str, *, cwd: Path, path: list[Path | str] | None = None, site: bool = True) -> str:
    """Run code in a fresh interpreter, with nothing on PYTHONPATH but `path`, and return what it prints."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path:
        env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    command = [sys.executable, *([] if site else ["-S"]), "-c", code]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{' '.join(command)} in {cwd}:\n{done.stderr}"
    return done.stdout.strip()


def third_party() -> list[str]:
    """The folders that installed packages lie in. On PYTHONPATH their .pth files, editable installs, have no effect."""
    ours = {*map(str, SOURCES), str(ROOT / "tests")}
    return [entry for entry in sys.path if entry and entry not in ours]


def installed_editable() -> bool:
    """Whether this environment has an editable install. The .egg-info that one leaves in the root says nothing."""
    urls = [found.read_text("direct_url.json") for found in metadata.distributions(name=DISTRIBUTION)]
    return any(json.loads(url).get("dir_info", {}).get("editable") for url in urls if url)


WHERE = (
    f"import json, {', '.join(PACKAGES)}; print(json.dumps([m.__file__ for m in ({', '.join(PACKAGES)})]))"
)
EXPECTED = [str(source / package / "__init__.py") for source, package in zip(HOMES, PACKAGES, strict=True)]


# -- the wheels

HELD = {"library": {"tokenprune", "tokenprune_kernels"}, "testbed": {"tokenprune_testbed", "tokenprune_eval"}}
DATA = {".npz", ".safetensors", ".json", ".jinja", ".csv", ".html", ".yaml"}
LARGEST = 1_500_000  # bytes of the library's wheel


def build(project: Path, out: Path) -> Path:
    """A project's wheel, from a copy: setuptools leaves build/ behind, and takes stale files from it."""
    copy = out / "source"
    ignored = shutil.ignore_patterns(
        "__pycache__", "*.egg-info", "results", ".*", "build", "docs", "tokenprune-demo"
    )
    shutil.copytree(project, copy, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    words = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), "."]
    done = subprocess.run(words, cwd=copy, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, zipfile.ZipFile]:
    if util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools")
    projects = {"library": ROOT, "testbed": ROOT / "eval"}
    return {name: zipfile.ZipFile(build(p, tmp_path_factory.mktemp(name))) for name, p in projects.items()}


@pytest.fixture(scope="module")
def wheel(wheels: dict[str, zipfile.ZipFile]) -> zipfile.ZipFile:
    return wheels["library"]


@pytest.mark.slow
@pytest.mark.xdist_group("packaging")
@pytest.mark.parametrize("name", HELD)
def test_a_wheel_holds_its_packages_and_nothing_else(wheels: dict[str, zipfile.ZipFile], name: str) -> None:
    names = set(wheels[name].namelist())
    top = {own.split("/")[0] for own in names}
    assert {own for own in top if not own.endswith(".dist-info")} == HELD[name]
    for package in HELD[name]:
        (folder,) = [s / package for s in SOURCES if (s / package).is_dir()]
        assert f"{package}/py.typed" in names
        files = [path for path in folder.rglob("*") if path.suffix in DATA | {".py"}]
        missing = {path.relative_to(folder.parent).as_posix() for path in files} - names
        assert not missing, f"no __init__.py beside it, or not in package-data: {sorted(missing)}"


@pytest.mark.slow
@pytest.mark.xdist_group("packaging")
def test_the_librarys_wheel_is_small(wheel: zipfile.ZipFile) -> None:
    assert Path(str(wheel.filename)).stat().st_size <= LARGEST


@pytest.mark.slow
@pytest.mark.xdist_group("packaging")
def test_the_library_alone(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Where nothing of ours but the wheel is: it prunes, answers on the command line, and is found by others."""
    site = tmp_path / "site"
    wheel.extractall(site)
    for folder in map(Path, third_party()):
        for found in folder.iterdir() if folder.name == "site-packages" else ():
            if "tokenprune" not in found.name and not (site / found.name).exists():
                (site / found.name).symlink_to(found)
    path = [site, *(folder for folder in third_party() if Path(folder).name != "site-packages")]
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
from importlib.metadata import entry_points
import torch, tiny, tokenprune
assert tokenprune.__file__.startswith({str(tmp_path)!r})
model = tiny.llava()
with tokenprune.pruned(model, "uniform", keep=0.5), torch.no_grad():
    model(**tiny.inputs(model, [["text:2", "image", "text:3"]]))
    assert tokenprune.report(model).kept
for group in ("lmms_eval.models", "vllm.general_plugins"):
    (own,) = [e for e in entry_points(group=group) if e.name == "tokenprune"]
    own.load()
from tokenprune import testbeds
assert testbeds.names() == ()
from typer.testing import CliRunner
from tokenprune.cli import app
run = CliRunner().invoke
assert run(app, ["methods"]).exit_code == 0
for words in (["demo", "--quick"], ["bench", "small"], ["drift", "x", "--keep", "25%", "--data", "testbed"]):
    print(run(app, words).output.strip().splitlines()[-1])
"""
    said = run_python(code, cwd=tmp_path, path=path, site=False).splitlines()
    assert len(said) == 3 and all("not installed: pip install './eval'" in line for line in said)


@pytest.mark.slow
@pytest.mark.xdist_group("packaging")
def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    import tokenprune

    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    lines = wheel.read(name).decode().split("\n\n")[0].splitlines()
    for line in (
        f"Name: {DISTRIBUTION}",
        f"Version: {tokenprune.__version__}",
        "License-Expression: Apache-2.0",
        "Requires-Python: >=3.10",
    ):
        assert line in lines
    (entry_points,) = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    assert "tokenprune = tokenprune.cli:main" in wheel.read(entry_points).decode().splitlines()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


# -- ways to import


@pytest.mark.slow
@pytest.mark.parametrize("cwd", [Path("/"), ROOT], ids=["from-slash", "from-root"])
def test_editable_import(cwd: Path) -> None:
    if not installed_editable():
        pytest.skip(f"{DISTRIBUTION} is not installed editable here")
    assert json.loads(run_python(WHERE, cwd=cwd)) == EXPECTED


@pytest.mark.slow
def test_uninstalled_import(tmp_path: Path) -> None:
    """PYTHONPATH=.:kernels:eval is enough; -S leaves out every editable install, ours included."""
    code = "import sys; assert not any('editable' in str(finder) for finder in sys.meta_path); " + WHERE
    path = [*SOURCES, *third_party()]
    assert json.loads(run_python(code, cwd=tmp_path, path=path, site=False)) == EXPECTED


# -- the name `kernels` belongs to Hugging Face's package


@pytest.mark.parametrize("folder", ["kernels", "eval", "tests", "tests/kernels", "tests/eval"])
def test_component_folder_is_no_package(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_installed_kernels_package_wins_from_the_root(tmp_path: Path) -> None:
    """A folder without __init__.py loses against a regular package, even one later on sys.path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("stand_in = True\n")
    code = f"import sys; sys.path[:0] = ['', {str(ROOT / 'tests')!r}]; sys.path.append({str(tmp_path)!r}); "
    code += "import kernels; print(kernels.stand_in, kernels.__file__)"
    found = run_python(code, cwd=ROOT, path=[ROOT], site=False)
    assert found == f"True {tmp_path / 'kernels' / '__init__.py'}"


@pytest.mark.slow
def test_transformers_does_not_take_our_folder_for_the_kernels_package() -> None:
    if util.find_spec("kernels") is not None and util.find_spec("kernels").origin is not None:
        pytest.skip("Hugging Face's kernels is installed")
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert run_python(code, cwd=ROOT, path=[ROOT]) == "False"


# -- what an import costs


@pytest.mark.slow
def test_import_needs_no_optional_package(tmp_path: Path) -> None:
    block = f"import sys; sys.modules.update(dict.fromkeys({LAZY!r})); "
    run_python(block + "import tokenprune; tokenprune.wrap", cwd=tmp_path, path=[*SOURCES])


@pytest.mark.slow
def test_import_loads_no_optional_package(tmp_path: Path) -> None:
    code = f"""
import sys
def loaded(): return {{name.split('.')[0] for name in sys.modules}} & set({LAZY!r})
import torch, accelerate
from transformers import LlavaForConditionalGeneration  # whatever these load is theirs
before = loaded()
import tokenprune
print(sorted(loaded() - before))
"""
    assert run_python(code, cwd=tmp_path, path=[*SOURCES]) == "[]"


def test_missing_kernels_say_what_to_install() -> None:
    code = (
        "import sys; sys.modules['tokenprune_kernels'] = None\nimport tokenprune\n"
        "try: tokenprune.wrap\nexcept ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install tokenprune-vlm" in done.stdout and done.stdout.count("\n") == 1
