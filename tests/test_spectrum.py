"""The probe of what EntropyPrune's score sees, on numbers known beforehand."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from tokenprune_eval.studies.spectrum import describe_spectrum, record, spearman

ROWS = (["text:5", "image", "text:3", "image", "text:4"],)


def test_spearman() -> None:
    a = torch.tensor([3.0, 1.0, 2.0, 10.0])
    assert spearman(a, a**3) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)
    # ranks 2 0 1 3 against 0 1 2 3: 1 - 6 * (4 + 1 + 1 + 0) / (4 * 15) = 0.4
    assert spearman(a, torch.arange(4.0)) == pytest.approx(0.4)


def test_two_opposite_heads() -> None:
    """Heads (a, 0) and (-a, 0): eigenvalues a^2 and 0; above 1/e the untraced entropy only falls with the norm."""
    a = torch.tensor([1.0, 2.0, 3.0])
    x = torch.stack([torch.stack([a, 0 * a], -1), torch.stack([-a, 0 * a], -1)], dim=1)
    found = describe_spectrum([x])
    assert found["lambda_max_q100"] == pytest.approx(9.0)
    assert found["lambda_max_q50"] == pytest.approx(4.0)
    assert found["share_above_1_over_e"] == pytest.approx(0.5)
    assert found["spearman_none_norm"] == pytest.approx(-1.0)
    assert math.isfinite(found["spearman_trace_norm"])


@pytest.mark.parametrize("source", ["query", "key", "value", "hidden"])
def test_record_returns_each_images_states(source: str) -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, ROWS)
    states = record(model, [inputs, inputs], source, 2)  # type: ignore[arg-type]
    heads = 2 if source in ("key", "value") else 4
    assert [tuple(x.shape) for x in states] == [(25, heads, 16)] * 4
    torch.testing.assert_close(states[0], states[2])
    assert not torch.equal(states[0], states[1])
