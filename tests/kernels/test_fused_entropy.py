"""The Triton kernel of matrix entropy against the float64 reference: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from spectra import DTYPES, FAMILIES, SHAPES, normal
from tokenprune_kernels.backend import VARIABLE, backend_for
from tokenprune_kernels.dual_gram_entropy import dual_gram_entropy
from tokenprune_kernels.dual_gram_entropy.plain import dual_gram_entropy_plain
from tokenprune_kernels.dual_gram_entropy.quadrature import NODES, coefficients
from tokenprune_kernels.dual_gram_entropy.reference import error_scale, matrix_entropy, renyi2_entropy

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORMALIZATIONS: list[Any] = ["none", "trace"]
# The interpreter takes some 40 ms per token: one token of each shape there.
TOKENS = 7 if DEVICE == "cuda" else 1


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "triton")


def poisoned(x: Tensor, **options: Any) -> Tensor:
    """The kernel's result where the memory it writes to held NaN before."""
    empty = x.new_empty

    def full_of_nan(*size: Any, **more: Any) -> Tensor:
        return empty(*size, **more).fill_(torch.nan)

    x.new_empty = full_of_nan  # type: ignore[method-assign]
    try:
        return dual_gram_entropy(x, **options)
    finally:
        del x.new_empty


def errors(x: Tensor, **options: Any) -> Tensor:
    """|H - H64| in units of what is promised."""
    host = x.cpu()
    want = matrix_entropy(host, **options)
    got = poisoned(x, **options)
    assert got.shape == x.shape[:-2] and got.dtype == torch.float32 and got.device == x.device
    return (got.cpu().double() - want).abs() / (1e-3 * error_scale(host, **options).clamp(min=0.01))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_error_bound(family: str, dtype: torch.dtype, normalization: str) -> None:
    shapes = SHAPES if DEVICE == "cuda" else SHAPES[:: 1 if family == "one_and_dust" else 4]
    for _, h, d in shapes:
        x = FAMILIES[family](TOKENS, h, d).to(DEVICE, dtype)
        assert (errors(x, normalization=normalization) <= 1).all(), (h, d)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("h", [2, 3, 17, 33, 64])
def test_renyi_2(h: int, normalization: str) -> None:
    for family in ("gaussian", "nearly_rank_one", "at_the_floor"):
        x = FAMILIES[family](TOKENS, h, 40).to(DEVICE, torch.float32)
        want = renyi2_entropy(x.cpu(), normalization=normalization)
        got = poisoned(x, normalization=normalization, order=2).cpu().double()
        assert ((got - want).abs() <= 1e-5 * (1 + want.abs())).all()


def test_renyi_2_by_hand() -> None:
    # Eigenvalues 2, 2, 0 (test_dual_gram_entropy.py: three heads by hand): sum of squares 8; as fractions 1/2, 1/2.
    x = torch.tensor([[math.sqrt(3), 1.0], [-math.sqrt(3), 1.0], [0.0, -2.0]], device=DEVICE)
    assert dual_gram_entropy(x, order=2).item() == pytest.approx(-math.log(8) / math.log(3), rel=1e-5)
    got = dual_gram_entropy(x, order=2, normalization="trace").item()
    assert got == pytest.approx(math.log(2) / math.log(3), rel=1e-5)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("h", [2, 28, 33])
def test_equal_heads(h: int, normalization: str, order: Any) -> None:
    x = normal(2, 1, 40).float().expand(2, h, 40).to(DEVICE)
    want = matrix_entropy if order == 1 else renyi2_entropy
    got = poisoned(x, normalization=normalization, order=order).cpu().double()
    torch.testing.assert_close(got, want(x.cpu(), normalization=normalization), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("d", [256, 384])
def test_column_groups(d: int) -> None:
    assert (errors(normal(TOKENS, 5, d).to(DEVICE, torch.float16), column_groups=True) <= 1).all()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_a_number_stays_with_its_token(bad: float, order: Any) -> None:
    x = normal(3, 5, 9).float()
    want = dual_gram_entropy_plain(x, order=order)
    x[1, 2, 3] = bad
    got = poisoned(x.to(DEVICE), order=order).cpu()
    assert got.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]], rtol=1e-4, atol=1e-5)


def test_views_are_read_in_place() -> None:
    # (batch, heads, tokens, d) seen as (batch, tokens, heads, d), and with gaps.
    states = normal(2, 5, 4, 16).float().to(DEVICE)
    x = states.transpose(1, 2)
    torch.testing.assert_close(dual_gram_entropy(x), dual_gram_entropy(x.contiguous()), rtol=1e-5, atol=0)
    gaps = x[:, ::2, 1:, ::2]
    # Compiled for other strides, sums may be taken in another order.
    torch.testing.assert_close(
        dual_gram_entropy(gaps), dual_gram_entropy(gaps.contiguous()), rtol=1e-5, atol=0
    )
    assert dual_gram_entropy(x[None, :, :, None]).shape == (1, 2, 4, 1)
    assert dual_gram_entropy(x[:0]).shape == (0, 4)


def test_fit_of_the_kernel() -> None:
    c, b1, b2, promised = coefficients()
    x = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    t, c_ = torch.from_numpy(NODES), torch.from_numpy(c)
    fit = (c_ * x[:, None] / (x[:, None] + t)).sum(1) + b1 * x + b2 * x * x
    error = (fit + torch.special.xlogy(x, x)).abs().max().item()
    assert error <= 1.01 * promised < 5e-7
    assert abs(c.sum()) < 10  # the rounding of float32 is multiplied by it


def test_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 4, 4)
    assert backend_for(x) == "triton"
    monkeypatch.setenv(VARIABLE, "plain")
    assert backend_for(x) == "plain"
    monkeypatch.delenv(VARIABLE)
    assert backend_for(x) == "plain"
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(ValueError, match=r"TOKENPRUNE_KERNELS must be one of .*got 'cuda'"):
        dual_gram_entropy(x)


def test_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match=r"order must be one of \(1, 2\), got 3"):
        dual_gram_entropy(torch.ones(2, 4, 4), order=3)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_compiled_without_synchronising(normalization: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    x = torch.randn(2, 32, 576, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = dual_gram_entropy(x, normalization=normalization)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = matrix_entropy(x, normalization=normalization)
    # The same top quarter, but for tokens within the bound of the threshold.
    for row, exact in zip(got.double(), want, strict=True):
        threshold = exact.topk(144).values[-1]
        clear = (exact - threshold).abs() > 2e-3 * error_scale(x[0], normalization=normalization).max()
        kept = torch.zeros_like(clear).index_fill_(0, row.topk(144).indices, True)
        assert torch.equal(kept & clear, (exact >= threshold) & clear)
