"""Estimators of diversity: against singular values and loops in float64, known closed forms, and invariances."""

import math
import subprocess
import sys

import pytest
import torch

import estimator_reference as reference
from tokenprune.errors import ConfigError
from tokenprune.estimators import (
    ESTIMATORS,
    DiffusionSpectralEntropy,
    EffectiveRank,
    Renyi,
    VonNeumann,
    base,
    estimate,
    make_estimator,
    prepare,
)

NAMES = list(ESTIMATORS)
SPECTRAL = [name for name, cls in ESTIMATORS.items() if cls.spectral]
SHAPES = [(2, 3), (7, 7), (40, 12), (12, 40), (33, 1), (144, 128)]


def tokens(n: int, d: int, seed: int = 0, decay: float = 1.0) -> torch.Tensor:
    """Gaussian tokens whose directions get smaller and smaller, prepared, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return prepare(x * torch.linspace(1, 0.05, d, dtype=torch.float64) ** decay + 0.3)


def rotation(d: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_float64_equals_the_reference(name, shape):
    z = tokens(*shape)
    assert float(make_estimator(name)(z)) == pytest.approx(getattr(reference, name)(z), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_fast_path(name, shape, dtype):
    """Of the numbers given: what rounding to 16 bits did to them before is not the estimator's."""
    z = tokens(*shape).to(dtype)
    value = make_estimator(name)(z)
    assert value.dtype == torch.float32
    truth = getattr(reference, name)(z.double())
    scale = 1.0 if name in ("von_neumann", "renyi", "diffusion") else 0.0  # these live in [0, 1]
    assert abs(float(value) - truth) <= 1e-3 * max(abs(truth), 1e-2 * scale)


@pytest.mark.parametrize(
    ("made", "truth"),
    [
        (Renyi(alpha=0.5), lambda z: reference.renyi(z, 0.5)),
        (Renyi(alpha=3), lambda z: reference.renyi(z, 3)),
        (Renyi(alpha=1), reference.von_neumann),
        (DiffusionSpectralEntropy(t=1), lambda z: reference.diffusion(z, t=1)),
        (DiffusionSpectralEntropy(sigma=2), lambda z: reference.diffusion(z, sigma=2)),
    ],
)
def test_parameters(made, truth):
    z = tokens(20, 11)
    assert float(made(z)) == pytest.approx(truth(z), rel=1e-6)


def test_renyi_tends_to_von_neumann():
    z = tokens(20, 11)
    assert float(Renyi(alpha=1 + 1e-6)(z)) == pytest.approx(float(VonNeumann()(z)), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_batches_and_chunks(name, monkeypatch):
    made = make_estimator(name)
    z = torch.stack([tokens(30, 17, seed) for seed in range(6)]).reshape(2, 3, 30, 17)
    one_by_one = torch.stack([made(one) for one in z.reshape(6, 30, 17)]).reshape(2, 3)
    assert torch.allclose(made(z), one_by_one, rtol=1e-9)
    monkeypatch.setattr(base, "_CHUNK", 100)  # a few columns of one set at a time
    assert torch.allclose(made(z), one_by_one, rtol=1e-9)
    assert torch.allclose(made(z.mT.contiguous().mT), one_by_one, rtol=1e-9)


# -- closed forms ---------------------------------------------------------------------------------------------------

IDENTITY = {  # 8 orthonormal tokens: eigenvalues 1/8
    "von_neumann": 1.0,
    "renyi": 1.0,
    "effective_rank": 8.0,
    "nuclear_norm": math.sqrt(8),
    "condition_number": 0.0,
}
RANK_ONE = {  # +-v: one eigenvalue, 1
    "von_neumann": 0.0,
    "renyi": 0.0,
    "effective_rank": 1.0,
    "nuclear_norm": 1.0,
    "condition_number": 0.0,
}
TWO_CLUSTERS = {  # six tokens on one axis, two on another: eigenvalues 3/4 and 1/4 of 8 or of 5
    "von_neumann": (0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(5),
    "renyi": -math.log(0.75**2 + 0.25**2) / math.log(5),
    "effective_rank": math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
    "nuclear_norm": math.sqrt(0.75) + 0.5,
    "condition_number": -math.log(3),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SPECTRAL)
def test_closed_forms(name, dtype):
    made = make_estimator(name)
    identity = torch.eye(8, dtype=dtype)
    direction = torch.tensor([[0.6, 0.8, 0.0]], dtype=dtype)
    rank_one = torch.cat([direction, -direction] * 3)
    clusters = torch.zeros(8, 5, dtype=dtype)
    clusters[:6, 1], clusters[6:, 3] = 1, -1
    for z, expected in ((identity, IDENTITY), (rank_one, RANK_ONE), (clusters, TWO_CLUSTERS)):
        assert float(made(z)) == pytest.approx(expected[name], abs=2e-7 if dtype == torch.float32 else 1e-12)


def test_diffusion_closed_forms():
    """Tokens far apart never meet, equal ones always do; c far clusters of equal size are c states."""
    far = 100 * torch.eye(8, dtype=torch.float64)
    assert float(DiffusionSpectralEntropy()(far)) == pytest.approx(1.0)
    assert float(DiffusionSpectralEntropy()(torch.ones(8, 3, dtype=torch.float64))) == pytest.approx(
        0, abs=1e-9
    )
    for clusters in (2, 4):
        z = far[torch.arange(8) % clusters]
        assert float(DiffusionSpectralEntropy()(z)) == pytest.approx(math.log(clusters) / math.log(8))


# -- invariances ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
@pytest.mark.parametrize("name", NAMES)
def test_rotation_and_permutation(name, shape):
    made, z = make_estimator(name), tokens(*shape)
    value = float(made(z))
    assert float(made(z @ rotation(shape[1]))) == pytest.approx(value, rel=1e-7)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(1))
    assert float(made(z[order])) == pytest.approx(value, rel=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_scale_and_shift_of_raw_tokens(name):
    """Through `estimate`, which prepares: a common scale and a common shift change nothing."""
    x = torch.randn(30, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    value = float(estimate(x, name))
    assert float(estimate(7 * x, name)) == pytest.approx(value, rel=1e-9)
    assert float(estimate(x + 3, name)) == pytest.approx(value, rel=1e-9)
    if name not in ("nuclear_norm", "diffusion"):  # the others need no preparing for the scale
        made = make_estimator(name)
        assert float(made(7 * x)) == pytest.approx(float(made(x)), rel=1e-9)


@pytest.mark.parametrize("made", [VonNeumann(), Renyi(), Renyi(alpha=1), Renyi(alpha=3)])
def test_entropies_of_raw_tokens_lie_in_the_unit_interval(made):
    x = 30 * torch.randn(60, 40, generator=torch.Generator().manual_seed(2)) + 2
    assert 0 < float(made(x)) < 1
    assert torch.isnan(made(torch.zeros(3, 4)))


@pytest.mark.parametrize("name", SPECTRAL)
def test_duplicated_tokens(name):
    """Every token three times: the same spectrum (with n >= D, so that log m is the same too)."""
    z = tokens(30, 12)
    made = make_estimator(name)
    assert float(made(z.repeat(3, 1))) == pytest.approx(float(made(z)), rel=1e-9)


def test_duplicated_tokens_diffusion():
    """The walk's states are the same ones, out of three times as many: only log n differs."""
    z = tokens(30, 12)
    made = DiffusionSpectralEntropy()
    before, after = float(made(z)) * math.log(30), float(made(z.repeat(3, 1))) * math.log(90)
    assert after == pytest.approx(before, rel=1e-9)


def test_larger_is_more_diverse():
    """Shrinking all directions but one orders every estimator, condition number's line aside."""
    for name in NAMES:
        values = [float(make_estimator(name)(tokens(60, 12, decay=decay))) for decay in (0.0, 1.0, 2.0)]
        assert values[0] > values[1] > values[2], name


def test_diffusion_resists_noise():
    """Three clusters and growing noise: DSE keeps naming three states where the spectrum's entropy drifts."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.linalg.qr(torch.randn(64, 3, generator=generator, dtype=torch.float64)).Q.T

    def drift(made):
        values = []
        for noise in (0.0, 0.02, 0.04):
            x = centres.repeat(40, 1) + noise * torch.randn(120, 64, generator=generator, dtype=torch.float64)
            values.append(float(made(prepare(x))))
        return abs(values[-1] / values[0] - 1)

    assert drift(DiffusionSpectralEntropy()) < 0.1 * drift(VonNeumann())


# -- preparation and refusals ---------------------------------------------------------------------------------------


def test_prepare_has_unit_trace_and_drops_the_mean():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([x, x.mean(0, keepdim=True)])  # the mean stays the mean
    z = prepare(x)
    assert z.shape == (9, 4)
    assert float((z @ z.T / 9).trace()) == pytest.approx(1)
    assert torch.isnan(estimate(torch.ones(5, 3)))
    assert torch.isnan(estimate(torch.full((5, 3), 0.1)))  # whose mean is not exactly 0.1


def test_not_a_number_stays_with_its_set():
    z = torch.stack([tokens(6, 4), tokens(6, 4, 1)])
    z[0, 2, 1] = torch.nan
    for name in NAMES:
        value = make_estimator(name)(z)
        assert value.isnan().tolist() == [True, False], name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_estimator("entropy"), "unknown estimator 'entropy'; choose one of von_neumann"),
        (lambda: make_estimator("renyi", order=2), "has no parameter 'order'; it has alpha"),
        (lambda: make_estimator("renyi", alpha="2"), "alpha must be a number above 0"),
        (lambda: make_estimator("renyi", alpha=0), "alpha must be a number above 0"),
        (lambda: make_estimator("diffusion", sigma=float("nan")), "sigma must be a number above 0"),
        (lambda: make_estimator(VonNeumann(), alpha=1), "set on the estimator you pass"),
        (lambda: EffectiveRank()(torch.ones(1, 4)), "at least two tokens"),
        (lambda: EffectiveRank()(torch.ones(3, 4, dtype=torch.long)), "floating tensor"),
        (lambda: estimate(torch.ones(2, 3, 4)), "one set of tokens"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name):
    z = tokens(30, 17).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = make_estimator(name)(z)
    assert torch.equal(inside, make_estimator(name)(z))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tokens", "gib"),
    [("von_neumann", 8192, 0.35), ("condition_number", 8192, 0.65), ("diffusion", 4096, 0.2)],
)
def test_large_sets_fit(name, tokens, gib):
    """Tokens of width 4,096 through whole estimators: one of a float32 Gram, one of a float64, one of n x n."""
    code = f"""
import resource, torch
from tokenprune.estimators import make_estimator
z = torch.randn({tokens}, 4096)
torch.linalg.eigvalsh(torch.eye(8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
value = make_estimator("{name}")(z)
assert value.isfinite()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600
    )
    assert int(done.stdout) < gib * 2**20  # KiB beyond the input
