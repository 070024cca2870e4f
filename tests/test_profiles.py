"""Pruning profiles: what is written is what is read, what is read is checked, and nothing in it runs."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import tiny
import tokenprune
from tokenprune import ConfigError, Profile
from tokenprune.budget import Cut, average_kept, plan_counts
from tokenprune.fingerprint import fingerprint
from tokenprune.profiles.profile import Made, Measured, ProfileCut, ProfileStage

ROWS = [["text:4", "image", "text:5"]]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llava(layers=6)


@pytest.fixture
def profile(model: Any) -> Profile:
    return Profile(
        method="vflowopt",
        parameters={"t": 1.25, "a": 3.0, "size_term": True, "voters": "attended", "r1": None},
        cuts=(ProfileCut(layer=0, keep=0.6), ProfileCut(layer=2, keep=0.4), ProfileCut(layer=4)),
        keep=0.4,
        model=fingerprint(model),
        family="llava",
        made=Made(how="by hand", samples=16, seed=3, versions={"torch": torch.__version__}),
        measured=Measured(drift=0.01, quantiles={"50": 0.009, "95": 0.03}, controls={"random": 0.05}),
    )


def kept(model: Any, **arguments: Any) -> Any:
    with tokenprune.pruned(model, **arguments), torch.no_grad():
        model(**tiny.inputs(model, ROWS))
        return tokenprune.report(model)


def test_what_is_written_is_read_and_used(model: Any, profile: Profile, tmp_path: Path) -> None:
    path = profile.save(tmp_path / "profile.json")
    read = Profile.load(path)
    assert read == profile.sealed() and len(read.hash) == 64
    assert Profile.model_validate_json(read.model_dump_json()) == read
    direct = kept(
        model, method="vflowopt", cuts=[(0, 0.6), (2, 0.4), (4, None)], keep=0.4, **profile.parameters
    )
    for given in (path, str(path), read):
        report = kept(model, profile=given)
        assert report.keep_lists == direct.keep_lists and report.layers_cut == (0, 2, 4)
        assert report.profile == read.hash and report.to_dict()["profile"] == read.hash
    assert direct.profile is None


def test_what_is_given_beside_it_wins(model: Any, profile: Profile, tmp_path: Path) -> None:
    path = profile.save(tmp_path / "profile.json")
    assert kept(model, profile=path, keep=0.45).images[0].average == pytest.approx(0.45 * 25, abs=1)
    assert kept(model, profile=path, layer=0, keep=0.3).layers_cut == (0,)
    assert kept(model, profile=path, a=2.0).parameters["a"] == 2.0
    with pytest.raises(ConfigError, match="for method 'vflowopt', not 'random'"):
        tokenprune.wrap(model, "random", profile=path)
    with tokenprune.pruned(model, "random", keep=0.5, layer=1), torch.no_grad():
        with tokenprune.override(model, profile=path):
            model(**tiny.inputs(model, ROWS))
            assert tokenprune.report(model).method == "vflowopt"
        model(**tiny.inputs(model, ROWS))
        assert tokenprune.report(model).method == "random"


def test_a_profile_of_another_model_is_refused(model: Any, profile: Profile, tmp_path: Path) -> None:
    path = profile.save(tmp_path / "profile.json")
    other = tiny.llava(layers=6, seed=1)
    with pytest.raises(
        ConfigError, match=r"was made for the model [0-9a-f]{32}, and this one is .*allow_mismatch"
    ):
        tokenprune.wrap(other, profile=path)
    assert not tokenprune.is_wrapped(other)
    with tokenprune.pruned(other, "random", keep=0.5, layer=1):
        with (
            pytest.raises(ConfigError, match="was made for the model"),
            tokenprune.override(other, profile=path),
        ):
            pass
    assert kept(other, profile=path, allow_mismatch=True).method == "vflowopt"
    nobodys = profile.model_copy(update={"model": ""}).sealed()
    with pytest.raises(ConfigError, match="no model in particular"):
        tokenprune.wrap(model, profile=nobodys)


class _Runs:
    def __reduce__(self) -> Any:
        return os._exit, (7,)


Change = Callable[[dict[str, Any]], Any]
STRUCTURES: dict[str, Change] = {
    "list": lambda d: [d],
    "null": lambda d: None,
    "text": lambda d: "profile",
    "number": lambda d: 1,
    "empty": lambda d: {},
    "no hash": lambda d: {k: v for k, v in d.items() if k != "hash"},
    "wrong hash": lambda d: {**d, "hash": "0" * 64},
    "short hash": lambda d: {**d, "hash": "0" * 8},
    "changed": lambda d: {**d, "keep": 0.9},
    "deep": lambda d: {**d, "parameters": {"a": {"b": 1}}},
    "many parameters": lambda d: {**d, "parameters": {f"p{i}": i for i in range(100)}},
    "many cuts": lambda d: {**d, "cuts": [{"layer": i} for i in range(100)]},
    "long text": lambda d: {**d, "made": {"how": "x" * 10_000}},
    "code": lambda d: {**d, "method": "__import__('os').system('true')"},
    "module": lambda d: {**d, "method": "os.system"},
    "escape": lambda d: {**d, "made": {"how": "\x1b]0;owned\x07"}},
    "path": lambda d: {**d, "model": "../../../etc/passwd"},
    "dunder": lambda d: {**d, "parameters": {"__class__": 1}},
    "pickled": lambda d: {**d, "py/object": "os.system"},
}
WRONG: list[Any] = [None, True, "x", "2", -1, 1e400, float("nan"), [], {}, [1, 2], {"a": 1}, "../x", 10**30]
FIELDS = ("version", "method", "parameters", "cuts", "keep", "budget", "model", "made", "measured")


def hostile(good: dict[str, Any]) -> list[tuple[str, bytes]]:
    """More than a hundred documents, each of which is no profile (or not the one its hash is of)."""
    made = [(name, json.dumps(change(dict(good))).encode()) for name, change in STRUCTURES.items()]
    for name in FIELDS:
        for i, value in enumerate(WRONG):
            if value != good[name] and not (name == "measured" and value is None):
                made.append((f"{name} {i}", json.dumps({**good, name: value}).encode()))
    for name in ("layer", "keep", "more"):
        for i, value in enumerate(WRONG):
            made.append(
                (f"cut {name} {i}", json.dumps({**good, "cuts": [{"layer": 1, name: value}]}).encode())
            )
    whole = json.dumps(good).encode()
    rng = np.random.default_rng(0)
    for i in range(20):  # cut short, and bytes overwritten
        made.append((f"short {i}", whole[: int(rng.integers(0, len(whole)))]))
        broken = bytearray(whole)
        broken[int(rng.integers(0, len(whole)))] ^= 1 << int(rng.integers(0, 7))
        made.append((f"bit {i}", bytes(broken)))
    made += [("pickle", pickle.dumps(_Runs())), ("brackets", b"[" * 100_000), ("huge", b" " * (2**20 + 1))]
    made += [
        ("binary", bytes(range(256))),
        ("nothing", b""),
        ("yaml", b"!!python/object/apply:os.system [true]"),
    ]
    return made


def test_hostile_profiles_are_refused_and_nothing_runs(model: Any, profile: Profile, tmp_path: Path) -> None:
    good = json.loads(profile.sealed().model_dump_json())
    documents = hostile(good)
    assert len(documents) >= 100
    path = tmp_path / "hostile.json"
    for name, content in documents:
        path.write_bytes(content)
        if json_of(content) == good:
            continue
        with pytest.raises(ConfigError) as caught:
            tokenprune.wrap(model, profile=path)
        message = str(caught.value)
        assert "hostile.json" in message and len(message) < 700, name
        assert message.isprintable() and not tokenprune.is_wrapped(model), name


def json_of(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


@pytest.mark.parametrize(
    "given", [7, b"x", {"method": "random"}, "no/such/profile.json", "x" * 5000, "~nobody/p.json"]
)
def test_what_is_no_profile_at_all(model: Any, given: Any) -> None:
    with pytest.raises(ConfigError, match=r"profile must be|cannot read|cannot be used"):
        tokenprune.wrap(model, profile=given)


def test_a_method_or_parameter_that_does_not_exist(model: Any, profile: Profile) -> None:
    for update, text in (
        ({"method": "nosuch"}, "unknown method 'nosuch'"),
        ({"parameters": {"nosuch": 1}}, "has no parameter 'nosuch'"),
        ({"parameters": {"a": "x"}}, "side of recycling cells"),
        ({"cuts": (ProfileCut(layer=99),)}, "can cut this model at layers"),
    ):
        with pytest.raises(ConfigError, match=text):
            tokenprune.wrap(model, profile=profile.model_copy(update=update).sealed())


# -- presets, other budgets, the hub -----------------------------------------------------------------------------------


def test_a_papers_presets_are_there_and_say_that_they_are_untested(model: Any) -> None:
    for keep, kept in ((0.5, (5273, 3948, 1923)), (0.25, (1933, 1900, 1667)), (0.1, (850, 850, 511))):
        profile = Profile.published(f"llava-onevision-qwen2-7b-{keep:.2f}")
        assert "published, untested here" in profile.made.how and profile.measured is None
        cuts = [Cut(cut.layer, cut.keep) for cut in profile.cuts]
        assert tuple(plan_counts(7290, 28, cuts, None)) == kept
        assert average_kept(7290, 28, cuts, list(kept)) / 7290 == pytest.approx(keep, abs=1e-3)
        with pytest.raises(ConfigError, match="no model in particular"):
            tokenprune.wrap(model, profile=profile)
    with pytest.raises(ConfigError, match=r"choose one of llava-onevision-qwen2-7b-0\.10"):
        Profile.published("../bundled/x")


def test_another_budget_scales_the_cuts() -> None:
    profile = Profile(
        method="vflowopt",
        cuts=(ProfileCut(layer=0, keep=0.5), ProfileCut(layer=3, keep=0.4), ProfileCut(layer=6, keep=0.1)),
        keep=0.4,
    )
    assert profile.arguments()["keep"] is None
    said = profile.arguments(0.2)
    assert said["keep"] == 0.2 and said["cuts"] == [(0, 0.25), (3, 0.2), (6, None)]
    more = profile.arguments(0.8)["cuts"]  # a third of what was dropped is
    assert [layer for layer, _ in more] == [0, 3, 6] and more[2][1] is None
    assert [share for _, share in more[:2]] == pytest.approx([5 / 6, 0.8])
    assert profile.arguments(1.0)["cuts"] == [(0, 1.0), (3, 1.0), (6, None)]
    assert profile.arguments(64)["cuts"] is None and profile.arguments(64)["keep"] == 64
    counts = Profile(method="random", cuts=(ProfileCut(layer=0, keep=100), ProfileCut(layer=3)), keep=80)
    assert counts.arguments(40)["cuts"] == [(0, 50), (3, None)]
    with pytest.raises(ValueError, match="only the last cut"):
        Profile(method="random", cuts=(ProfileCut(layer=0), ProfileCut(layer=3)), keep=80)


@pytest.mark.parametrize("keep", [0.01, 0.2, 0.33, 0.6, 0.99, 1.0, 5])
def test_stages_meet_every_budget(keep: Any) -> None:
    """A profile of stages is what "auto" takes, whatever is asked."""
    model = tiny.llava(layers=8, side=8)
    steep = (0.6, 0.2, None)
    profile = Profile(
        method="stages",
        stages=tuple(
            ProfileStage(layer=layer, keep=share, method="merge", parameters={"of": "divprune"})
            for layer, share in zip((0, 3, 5), steep, strict=True)
        ),
        keep=0.33,
        model=fingerprint(model),
    )
    report = kept(model, profile=profile, keep=keep)
    wanted = keep if isinstance(keep, int) else keep * 64
    assert report.images[0].average == pytest.approx(wanted, abs=1.0)
    assert report.layers_cut == ((0, 3, 5) if isinstance(keep, float) else (0,))


class FakeHub:
    """A hub in a folder."""

    files: ClassVar[dict[tuple[str, str], bytes]] = {}

    def __init__(self, **options: Any) -> None:
        assert set(options) <= {"token", "endpoint"}

    def create_repo(self, repo_id: str, exist_ok: bool) -> None:
        if repo_id == "not/mine":
            raise PermissionError("403 Forbidden\nsee the docs")

    def upload_file(
        self, path_or_fileobj: bytes, path_in_repo: str, repo_id: str, commit_message: str
    ) -> str:
        self.files[repo_id, path_in_repo] = path_or_fileobj
        return f"https://hub/{repo_id}/commit/1"

    def get_paths_info(self, repo_id: str, paths: str, revision: str | None) -> list[Any]:
        content = self.files.get((repo_id, paths))
        return [] if content is None else [SimpleNamespace(size=len(content))]

    def hf_hub_download(self, repo_id: str, filename: str, revision: str | None) -> str:
        if (repo_id, filename) not in self.files:
            raise FileNotFoundError(f"no {filename}")
        path = self.folder / filename
        path.write_bytes(self.files[repo_id, filename])
        return str(path)

    folder: ClassVar[Path]


def test_a_profile_goes_to_the_hub_and_back(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    FakeHub.folder = tmp_path
    FakeHub.files.clear()
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert profile.push_to_hub("me/model", token="x").endswith("commit/1")
    assert Profile.from_hub("me/model", revision="main") == profile.sealed()
    with pytest.raises(
        ConfigError, match="cannot put the profile into 'not/mine': 403 Forbidden see the docs"
    ):
        profile.push_to_hub("not/mine")
    with pytest.raises(ConfigError, match=r"cannot read tokenprune.json from 'no/where': no tokenprune.json"):
        Profile.from_hub("no/where")
    for name in ("../x.json", "a/b.json", "x.pkl", "", ".json", "x" * 200 + ".json"):
        for call in (Profile.from_hub, profile.push_to_hub):
            with pytest.raises(ConfigError, match=r"plain name that ends in \.json"):
                call("me/model", name)
    FakeHub.files["me/model", "big.json"] = b" " * (2**20 + 1)
    with pytest.raises(ConfigError, match="too large for a pruning profile"):
        Profile.from_hub("me/model", "big.json")
    FakeHub.files["me/model", "bad.json"] = b'{"version": 1}'
    with pytest.raises(ConfigError, match="no pruning profile"):
        Profile.from_hub("me/model", "bad.json")


def test_special_files_are_no_profiles(tmp_path: Path) -> None:
    """A pipe would be waited for, a device never ends."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(ConfigError, match="regular file"):
            Profile.load(path)
    (tmp_path / "large").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(ConfigError, match="too large: 1,048,577 bytes"):
        Profile.load(tmp_path / "large")


def test_saving_obeys_the_umask_and_leaves_nothing_behind(profile: Profile, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        assert profile.save(tmp_path / "p.json").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)
    (tmp_path / "folder.json").mkdir()
    for _ in range(2):
        with pytest.raises(ConfigError, match="cannot write"):
            profile.save(tmp_path / "folder.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.json", "p.json"]


@pytest.mark.parametrize(
    "own",
    [
        *({"allow_mismatch": True}, {"keep": 1.0}, {"method": "uniform"}, {"compact_early": True}),
        *(
            {"profile": "/etc/passwd"},
            {"budget": "after_cut"},
            {"family": "llava"},
            {"seed": "x"},
            {"t": 1.0},
        ),
    ],
)
def test_a_profile_holds_parameters_of_its_method_only(own: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.llava(layers=2)
    profile = Profile(method="random", keep=0.5, cuts=(ProfileCut(layer=1),), parameters=own)
    path = profile.save(tmp_path / "p.json")
    for given in (path, profile):
        with pytest.raises(ConfigError, match=r"has no parameter|must be an int"):
            tokenprune.wrap(model, profile=given, allow_mismatch=True)
    assert not tokenprune.is_wrapped(model)


@pytest.mark.parametrize("method", ["auto", "none", "nosuch"])
def test_a_profile_names_a_method(method: str, tmp_path: Path) -> None:
    path = Profile(method=method, keep=0.5).save(tmp_path / "p.json")
    with pytest.raises(ConfigError, match=r"is no pruning profile: (unknown method|a profile for method)"):
        Profile.load(path)


def test_arguments_travel_between_processes() -> None:
    asked = tokenprune.Arguments(method="random", keep=0.5, parameters={"seed": 3})
    assert pickle.loads(pickle.dumps(asked)) == asked
