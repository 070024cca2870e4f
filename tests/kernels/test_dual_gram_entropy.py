"""Token-wise matrix entropy: the reference against hand-worked cases, the fast path against the reference."""

import csv
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spectra import DTYPES, FAMILIES, SHAPES, normal, unit_trace
from tokenprune_kernels import bench as runner
from tokenprune_kernels.dual_gram_entropy import bench, dual_gram_entropy
from tokenprune_kernels.dual_gram_entropy.plain import CPU_CHUNK_BYTES, dual_gram_entropy_plain
from tokenprune_kernels.dual_gram_entropy.reference import error_scale, matrix_entropy, spectrum

NORMALIZATIONS = ["none", "trace"]
BOUND = 1e-3  # of error_scale: what every backend promises
FLOOR = 1e-10  # of the released code
FLOOR_TERM = -FLOOR * math.log(FLOOR)  # what a zero eigenvalue adds to H log h

ENTROPIES: list[Callable[..., Tensor]] = [dual_gram_entropy, matrix_entropy]
both = pytest.mark.parametrize("entropy", ENTROPIES, ids=["public", "reference"])


def assert_within_bound(x: Tensor, bound: float = BOUND, **options: Any) -> None:
    got = dual_gram_entropy(x, **options)
    want = matrix_entropy(x, **options)
    scale = error_scale(x, **options).clamp(min=0.01)
    assert got.dtype == torch.float32
    assert got.shape == x.shape[:-2]
    worst = ((got.double() - want).abs() / scale).max().item()
    assert worst <= bound, f"error {worst:.2e} of the scale"


# --- by hand -------------------------------------------------------------------------------------------------------


@both
def test_two_heads_by_hand(entropy: Callable[..., Tensor]) -> None:
    # X = [[3, 0], [1, 4]]; mean row (2, 2); centred [[1, -2], [-1, 2]].
    # A = X X^T / 2 = [[5, -5], [-5, 5]] / 2, eigenvalues 5 and 0, trace 5.
    x = torch.tensor([[3.0, 0.0], [1.0, 4.0]])
    # none: H = (-5 log 5 + floor) / log 2
    assert entropy(x).item() == pytest.approx((-5 * math.log(5) + FLOOR_TERM) / math.log(2), rel=1e-6)
    # trace: eigenvalues 1 and 0, so only the floor is left
    assert entropy(x, normalization="trace").item() == pytest.approx(FLOOR_TERM / math.log(2), rel=1e-6)


@both
def test_three_heads_by_hand(entropy: Callable[..., Tensor]) -> None:
    # Columns (1, -1, 0) a and (1, 1, -2) b are centred and orthogonal, of squared length 2 a^2 and 6 b^2.
    # A = X X^T / 3 has the eigenvalues 2 a^2 / 3, 6 b^2 / 3 and 0. With a^2 = 3, b^2 = 1: 2, 2, 0; trace 4.
    a, b = math.sqrt(3), 1.0
    x = torch.tensor([[a, b], [-a, b], [0.0, -2 * b]]) + 5.0  # any common row is centred away
    want = (-4 * math.log(2) + FLOOR_TERM) / math.log(3)
    assert entropy(x).item() == pytest.approx(want, rel=1e-6)
    # trace: 1/2, 1/2, 0
    want = (math.log(2) + FLOOR_TERM) / math.log(3)
    assert entropy(x, normalization="trace").item() == pytest.approx(want, rel=1e-6)


@both
@pytest.mark.parametrize("h", [2, 4, 7])
def test_identity(entropy: Callable[..., Tensor], h: int) -> None:
    # Centring I gives P = I - 11^T/h, a projection: A = P P^T / h has h - 1 eigenvalues 1/h and one 0; trace (h-1)/h.
    x = torch.eye(h)
    want = ((h - 1) / h * math.log(h) + FLOOR_TERM) / math.log(h)
    assert entropy(x).item() == pytest.approx(want, rel=1e-6)
    # trace: h - 1 eigenvalues 1/(h-1), the largest entropy that a centred matrix can have
    want = (math.log(h - 1) + FLOOR_TERM) / math.log(h)
    assert entropy(x, normalization="trace").item() == pytest.approx(want, rel=1e-6)


@both
def test_rank_one_by_hand(entropy: Callable[..., Tensor]) -> None:
    # u = (1, 1, -1, -1) is centred, v = (0, 3, 4): A = u u^T |v|^2 / 4 has the one eigenvalue |u|^2 |v|^2 / 4 = 25.
    x = torch.outer(torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([0.0, 3.0, 4.0]))
    want = (-25 * math.log(25) + 3 * FLOOR_TERM) / math.log(4)
    assert entropy(x).item() == pytest.approx(want, rel=1e-6)
    assert entropy(x, normalization="trace").item() == pytest.approx(3 * FLOOR_TERM / math.log(4), rel=1e-5)


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", [2, 28, 32, 33])
def test_equal_heads(entropy: Callable[..., Tensor], h: int, dtype: torch.dtype) -> None:
    x = normal(5, 1, 40).to(dtype).expand(5, h, 40)
    # No trace to divide by: 0 by definition.
    assert entropy(x, normalization="trace").tolist() == [0.0] * 5
    # Every eigenvalue on the floor.
    torch.testing.assert_close(
        entropy(x).double(),
        torch.full((5,), h * FLOOR_TERM / math.log(h), dtype=torch.float64),
        rtol=1e-6,
        atol=0.0,
    )


def test_error_scale_by_hand() -> None:
    # Eigenvalues 2, 1/2 and 0 cancel in H: -2 log 2 + (log 2) / 2, but not in the scale. a^2 = 3, b^2 = 1/4 above.
    a, b = math.sqrt(3), 0.5
    x = torch.tensor([[a, b], [-a, b], [0.0, -2 * b]], dtype=torch.float64)
    torch.testing.assert_close(
        spectrum(x), torch.tensor([FLOOR, 0.5, 2.0], dtype=torch.float64), rtol=1e-12, atol=0.0
    )
    assert matrix_entropy(x).item() * math.log(3) == pytest.approx(-1.5 * math.log(2) + FLOOR_TERM, rel=1e-12)
    assert error_scale(x).item() * math.log(3) == pytest.approx(2.5 * math.log(2) + FLOOR_TERM, rel=1e-12)


def test_column_groups_by_hand() -> None:
    # 256 columns: neighbours 2j and 2j + 1 are averaged, so (x + e, x - e) interleaved is x again.
    x, e = normal(3, 4, 128), normal(3, 4, 128)
    wide = torch.stack([x + e, x - e], dim=-1).flatten(-2)
    for normalization in NORMALIZATIONS:
        want = matrix_entropy(x, normalization=normalization)
        for entropy in ENTROPIES:
            got = entropy(wide, normalization=normalization, column_groups=True).double()
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
        assert not torch.allclose(matrix_entropy(wide, normalization=normalization), want, rtol=1e-4)


def test_column_groups_of_one_change_nothing() -> None:
    x = normal(3, 4, 128).float()
    assert torch.equal(dual_gram_entropy(x, column_groups=True), dual_gram_entropy(x))


# --- the error bound -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_error_bound(family: str, dtype: torch.dtype, normalization: str) -> None:
    for n, h, d in SHAPES:
        x = FAMILIES[family](n, h, d).to(dtype)
        assert x.isfinite().all(), "the family must fit the dtype"
        assert_within_bound(x, normalization=normalization)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_float64_path_is_far_inside_the_bound(normalization: str) -> None:
    # This backend computes in float64: only the float32 of its result may be missing.
    assert_within_bound(normal(7, 33, 40), bound=2e-7, normalization=normalization)


@pytest.mark.parametrize("shape", [(3, 4, 256), (2, 33, 384)], ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_error_bound_with_column_groups(shape: tuple[int, ...], normalization: str) -> None:
    assert_within_bound(normal(*shape).half(), normalization=normalization, column_groups=True)


# --- identities ----------------------------------------------------------------------------------------------------


@given(
    h=st.integers(2, 24),
    d=st.integers(1, 24),
    family=st.sampled_from(sorted(FAMILIES)),
    normalization=st.sampled_from(NORMALIZATIONS),
)
def test_dual_equals_primal(h: int, d: int, family: str, normalization: Any) -> None:
    x = FAMILIES[family](3, h, d)
    dual = matrix_entropy(x, normalization=normalization, gram="dual")
    primal = matrix_entropy(x, normalization=normalization, gram="primal")
    # The absolute part: lambda_1 = 1 has no entropy of its own but still a rounding.
    tolerance = 1e-11 * error_scale(x, normalization=normalization) + 1e-13
    assert ((dual - primal).abs() <= tolerance).all()


@both
def test_trace_normalisation_ignores_scale_and_the_release_does_not(entropy: Callable[..., Tensor]) -> None:
    x = normal(7, 5, 40).float()
    for scale in (0.125, 8.0):  # powers of two: the inputs scale exactly
        torch.testing.assert_close(
            entropy(scale * x, normalization="trace"), entropy(x, normalization="trace"), rtol=1e-6, atol=0.0
        )
    # Eigenvalues around 1/8 have a positive entropy, around 5000 a strongly negative one.
    assert (entropy(0.125 * x / 2) > 0).all()
    assert (entropy(8 * x) < -1000).all()


@both
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_larger_is_more_diverse(entropy: Callable[..., Tensor], normalization: str) -> None:
    # At equal trace, more directions give more entropy.
    few = unit_trace(normal(7, 16, 2) @ normal(7, 2, 64))
    many = unit_trace(normal(7, 16, 64))
    assert (
        entropy(many, normalization=normalization) > entropy(few, normalization=normalization) + 0.2
    ).all()


@given(h=st.integers(2, 12), d=st.integers(1, 24), normalization=st.sampled_from(NORMALIZATIONS))
def test_invariances(h: int, d: int, normalization: Any) -> None:
    x = normal(2, h, d)
    want = matrix_entropy(x, normalization=normalization)
    rotation = torch.linalg.qr(normal(d, d)).Q
    for other in (x[:, torch.randperm(h)], x @ rotation, -x, x + 3.0 * normal(2, 1, d)):
        got = dual_gram_entropy(other, normalization=normalization).double()
        scale = error_scale(x, normalization=normalization)
        # 1e-6: float32 of the result. The rest: an eigenvalue of exactly 1, or of 0, that rounding moves.
        assert ((got - want).abs() <= 1e-6 * scale + 1e-12).all()


def test_trace_entropy_lies_between_0_and_1() -> None:
    for family in FAMILIES.values():
        H = dual_gram_entropy(family(7, 9, 20), normalization="trace")
        assert (H >= 0).all() and (H <= 1).all()


# --- shapes, memory, values that are no numbers --------------------------------------------------------------------


@both
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0,), (2, 0), (2, 1, 3)], ids=str)
def test_leading_shape(entropy: Callable[..., Tensor], lead: tuple[int, ...]) -> None:
    x = normal(*lead, 5, 17).float()
    H = entropy(x)
    assert H.shape == lead
    for index in itertools.product(*(range(n) for n in lead)):
        torch.testing.assert_close(H[index], entropy(x[index]))


def test_views_are_read_in_place() -> None:
    # Query states are (batch, heads, tokens, d); a token's matrix is a strided view of them.
    states = normal(2, 5, 9, 16).float()
    x = states.transpose(1, 2)
    before = states.clone()
    assert torch.equal(dual_gram_entropy(x), dual_gram_entropy(x.contiguous()))
    assert torch.equal(dual_gram_entropy(x[:, ::2, 1:]), dual_gram_entropy(x[:, ::2, 1:].contiguous()))
    assert torch.equal(states, before)


@both
def test_input_is_left_alone(entropy: Callable[..., Tensor]) -> None:
    x = normal(7, 5, 9)  # float64: a conversion would not copy it
    before = x.clone()
    assert torch.equal(entropy(x), entropy(before.clone()))
    assert torch.equal(x, before)


class Watch(TorchDispatchMode):
    """Fails on anything that waits for a device, and remembers the largest tensor that an operation made."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.")

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes = 0
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if name.startswith(self.WAITS):
            raise AssertionError(f"{name} waits for the device")
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        known = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:  # neither a view nor in place
                self.largest_bytes = max(self.largest_bytes, storage.nbytes())
        return out


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("column_groups", [False, True])
def test_never_waits_for_the_device(normalization: Any, column_groups: bool) -> None:
    x = normal(2, 9, 4, 256).bfloat16()
    with Watch() as watch:
        dual_gram_entropy(x, normalization=normalization, column_groups=column_groups)
    assert watch.calls
    with Watch(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        bool(x.sum() > 0)  # the watch does see


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("shape", [(50, 5, 17), (50, 17, 5)], ids=str)
def test_chunks_do_not_change_the_result(shape: tuple[int, ...], normalization: Any) -> None:
    x = normal(*shape).bfloat16()
    whole = dual_gram_entropy_plain(x, normalization=normalization, chunk_bytes=2**40)
    for chunk_bytes in (1, 5_000, 20_000):
        assert torch.equal(
            whole, dual_gram_entropy_plain(x, normalization=normalization, chunk_bytes=chunk_bytes)
        )


@pytest.mark.parametrize("batched", [False, True])
def test_memory_does_not_grow_with_the_tokens(batched: bool) -> None:
    h, d = 4, 32
    # 32k tokens would take 32 MiB in float64 alone.
    x = torch.randn(2, h, 16384, d).transpose(1, 2) if batched else torch.randn(32768, h, d)
    with Watch() as watch:
        dual_gram_entropy(x)
    assert 0 < watch.largest_bytes <= CPU_CHUNK_BYTES


@both
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_token_is_nan_and_its_neighbours_are_not(
    entropy: Callable[..., Tensor], normalization: str, bad: float
) -> None:
    x = normal(5, 6, 9).float()
    clean = entropy(x, normalization=normalization)
    x[2, 3, 4] = bad
    H = entropy(x, normalization=normalization)
    assert H[2].isnan()
    keep = [0, 1, 3, 4]
    assert torch.equal(H[keep], clean[keep])


def test_no_gradient_and_no_autocast() -> None:
    x = normal(3, 5, 9).float().requires_grad_()
    H = dual_gram_entropy(x)
    assert not H.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dual_gram_entropy(x), H)
    with torch.inference_mode():
        assert torch.equal(dual_gram_entropy(x), H)


# --- refusals ------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "torch.Tensor, got list"),
        (torch.ones(3, 4, dtype=torch.long), {}, TypeError, "torch.int64"),
        (torch.ones(3, 4, dtype=torch.complex64), {}, TypeError, "torch.complex64"),
        (torch.ones(4), {}, ValueError, r"\(\.\.\., h, d\), got \(4,\)"),
        (torch.ones(5, 1, 4), {}, ValueError, "h must be at least 2 heads, got 1"),
        (torch.ones(5, 4, 0), {}, ValueError, "d must be at least 1 column"),
        (torch.ones(5, 4, 64), {"column_groups": True}, ValueError, "multiple of 128, got d = 64"),
        (torch.ones(5, 4, 192), {"column_groups": True}, ValueError, "multiple of 128, got d = 192"),
        (torch.ones(5, 4, 8), {"normalization": "frobenius"}, ValueError, "'none', 'trace'.*'frobenius'"),
    ],
    ids=["list", "integers", "complex", "vector", "one-head", "no-column", "d64", "d192", "unknown-name"],
)
def test_refusals(
    entropy: Callable[..., Tensor], x: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        entropy(x, **options)


def test_unknown_gram_is_refused() -> None:
    with pytest.raises(ValueError, match="'dual' or 'primal', got 'both'"):
        matrix_entropy(torch.ones(2, 2), gram="both")  # type: ignore[arg-type]


# --- the benchmark -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--growth"]], ids=["table", "growth"])
def test_bench_writes_its_table(
    more: list[str], tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "GROWTH", ["5x3x17", "9x3x17"])
    path = tmp_path / "new" / "numbers.csv"
    runner.main(
        [
            "--op",
            "dual_gram_entropy",
            "--csv",
            str(path),
            "--repeats",
            "1",
            "--shapes",
            "7x3x17",
            "--device",
            "cpu",
            *more,
        ]
    )
    assert "x3x17" in capsys.readouterr().out
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (2 if more else 4)  # two normalisations, two orders
    assert all(row["machine"] and row["torch"] for row in rows)
    assert all(not row["error"] if more else float(row["error"]) <= BOUND for row in rows)
