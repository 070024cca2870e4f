"""Cache compaction against its row-by-row reference, both backends, exact to the bit."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenprune_kernels import bench as runner
from tokenprune_kernels.backend import VARIABLE
from tokenprune_kernels.kv_compact import bench, kv_compact
from tokenprune_kernels.kv_compact.arguments import groups
from tokenprune_kernels.kv_compact.reference import kv_compact_reference

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(autouse=True, params=["plain", "triton"])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, request.param)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is allocated without a value holds NaN."""
    empty = Tensor.new_empty

    def full_of_nan(self: Tensor, *size: Any, **more: Any) -> Tensor:
        made = empty(self, *size, **more)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", full_of_nan)


def chosen(batch: int, entries: int, kept: int, ragged: bool = False) -> Tensor:
    """(B, M) ascending rows; ragged: one fewer per batch row, and none at all in the last."""
    rows = []
    for b in range(batch):
        count = kept if not ragged else 0 if b and b == batch - 1 else max(0, kept - b)
        own = torch.randperm(entries)[:count].sort().values
        rows.append(torch.cat([own, torch.full((kept - count,), -1)]))
    return torch.stack(rows).to(DEVICE)


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = BITS[a.element_size()]
    return a.shape == b.shape and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


LAYOUTS: dict[str, Callable[[int, int, int, int], Tensor]] = {
    "heads first": lambda B, H, N, D: torch.randn(B, H, N, D),
    "entries first": lambda B, H, N, D: torch.randn(B, N, H, D).transpose(1, 2),
    "part of a static cache": lambda B, H, N, D: torch.randn(B, H, N + 5, D)[:, :, 2 : N + 2],
    "columns apart": lambda B, H, N, D: torch.randn(B, H, N, 2 * D)[..., ::2],
    "odd start": lambda B, H, N, D: torch.randn(B * H * N * D + 1)[1:].view(B, H, N, D),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_equal_to_the_bit(dtype: torch.dtype, layout: str, ragged: bool, inplace: bool) -> None:
    for B, H, N, D, M in ((1, 1, 3, 5, 2), (2, 3, 20, 16, 7), (3, 1, 6, 12, 6)):
        tensors = [LAYOUTS[layout](B, H, N, D).to(DEVICE, dtype) for _ in range(4)]
        tensors[0][0, 0, 0, 0] = torch.nan  # moved like any other bits
        index = chosen(B, N, M, ragged)
        want = kv_compact_reference(tensors, index)
        got = kv_compact(tensors, index, inplace=inplace)
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
        if inplace:
            assert all(a.data_ptr() == b.data_ptr() for a, b in zip(got, tensors, strict=True))


def test_in_place_through_several_tiles() -> None:
    # Wide rows make small tiles: every tile of the first row moves rows that a later one must still find unmoved.
    N, D = 80, 1024 if DEVICE == "cpu" else 4096
    tensors = [torch.randn(1, 2, N, D, device=DEVICE) for _ in range(2)]
    index = torch.cat([torch.arange(0, 20), torch.arange(21, N)])[None].to(DEVICE)
    want = kv_compact_reference(tensors, index)
    got = kv_compact(tensors, index, inplace=True)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


def test_layers_of_different_shapes_and_dtypes() -> None:
    tensors = [
        torch.randn(2, 4, 9, 8, device=DEVICE),
        torch.randn(2, 1, 9, 16, device=DEVICE),
        torch.randn(2, 4, 9, 8, device=DEVICE).bfloat16(),
        torch.randn(2, 4, 9, 8, device=DEVICE),
    ]
    assert groups(tensors) == [[0, 3], [1], [2]]
    index = chosen(2, 9, 4)
    for a, b in zip(kv_compact(tensors, index), kv_compact_reference(tensors, index), strict=True):
        assert same_bits(a, b)


def test_nothing_kept_and_everything_kept() -> None:
    tensors = [torch.randn(2, 3, 6, 4, device=DEVICE)]
    assert kv_compact(tensors, torch.empty(2, 0, dtype=torch.int64, device=DEVICE))[0].shape == (2, 3, 0, 4)
    whole = torch.arange(6, device=DEVICE).expand(2, -1)
    assert same_bits(kv_compact(tensors, whole)[0], tensors[0])
    assert kv_compact([], whole) == []


def test_out_of_place_leaves_its_input_alone() -> None:
    tensors = [torch.randn(2, 3, 6, 4, device=DEVICE)]
    before = tensors[0].clone()
    kv_compact(tensors, chosen(2, 6, 3))
    assert same_bits(tensors[0], before)


@pytest.mark.parametrize(
    ("tensors", "index", "options", "error", "message"),
    [
        ([torch.ones(1, 1, 4, 2)], torch.zeros(1, 2), {}, TypeError, "int64"),
        ([torch.ones(1, 1, 4, 2)], torch.zeros(2, dtype=torch.int64), {}, ValueError, r"\(B, M\)"),
        ([torch.ones(1, 4, 2)], torch.zeros(1, 2, dtype=torch.int64), {}, ValueError, r"\(B, H, N, D\)"),
        ([torch.ones(1, 1, 4, 2).int()], torch.zeros(1, 2, dtype=torch.int64), {}, TypeError, "floating"),
        ([torch.ones(2, 1, 4, 2)], torch.zeros(1, 2, dtype=torch.int64), {}, ValueError, "does not fit"),
        (
            [torch.ones(1, 1, 4, 2), torch.ones(1, 1, 5, 2)],
            torch.zeros(1, 2, dtype=torch.int64),
            {},
            ValueError,
            r"tensors\[1\].*does not fit",
        ),
        ([torch.ones(1, 1, 4, 2)], torch.zeros(1, 5, dtype=torch.int64), {}, ValueError, "keeps 5 of 4"),
        (
            [torch.ones(1, 1, 4, 2).expand(1, 3, 4, 2)],
            torch.zeros(1, 2, dtype=torch.int64),
            {"inplace": True},
            ValueError,
            "expanded",
        ),
    ],
)
def test_refusals(tensors: Any, index: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kv_compact(tensors, index, **options)


@pytest.mark.gpu
def test_compiled_without_synchronising() -> None:
    tensors = [torch.randn(8, 8, 600, 128, device="cuda", dtype=torch.bfloat16) for _ in range(64)]
    index = chosen(8, 600, 150, ragged=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = kv_compact(tensors, index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(got, kv_compact_reference(tensors, index), strict=True):
        assert same_bits(a, b)


def test_bench_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "plain")
    monkeypatch.setitem(bench.SHAPES, "cpu", (2, 2, 3, 16, 8))
    path = tmp_path / "new" / "numbers.csv"
    runner.main(["--op", "kv_compact", "--csv", str(path), "--device", "cpu"])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["in_place"] for row in rows] == ["False", "True"] * 2
    assert all(float(row["share_of_copy"]) > 0 for row in rows)
