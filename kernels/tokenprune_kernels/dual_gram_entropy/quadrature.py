"""-x log x on [0, 1] as a sum of resolvents: what lets a kernel do without eigenvalues.

    -x log x  ~  b1 x + b2 x^2 + sum_j c_j x / (x + t_j)

Every term is a function of a matrix whose trace is cheap once the matrix is tridiagonal. `coefficients` fits b and c to
given nodes t; the ones in use are printed by ``python -m tokenprune_kernels.dual_gram_entropy.quadrature``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: 16 nodes are one half of a warp. None below 3e-6: rounding moves float32's zero eigenvalues by some 1e-7, to either
#: side, and a node that near to them would be a pole. None above 2: c_j grows with t_j, and with it the rounding.
NODES: NDArray[np.float64] = np.geomspace(3e-6, 2.0, 16)


def coefficients(nodes: NDArray[np.float64] = NODES) -> tuple[NDArray[np.float64], float, float, float]:
    """(c, b1, b2, the largest error on [0, 1]) of a minimax fit, by reweighted least squares (Lawson)."""
    x = np.geomspace(1e-9, 1.0, 4000)
    f = -x * np.log(x)
    basis = np.stack([*(x / (x + t) for t in nodes), x, x * x], axis=1)
    weights: NDArray[Any] = np.ones_like(x)
    best: NDArray[Any] = np.zeros(basis.shape[1])
    error = np.inf
    for _ in range(60):
        found = np.linalg.lstsq(basis * weights[:, None], f * weights, rcond=1e-12)[0]
        miss = np.abs(basis @ found - f)
        if miss.max() < error:
            best, error = found, float(miss.max())
        weights = weights * np.sqrt(miss / miss.max() + 1e-3)
        weights = weights / weights.mean()
    return best[:-2], float(best[-2]), float(best[-1]), error


if __name__ == "__main__":
    c, b1, b2, error = coefficients()
    print("t", [float(f"{t:.9g}") for t in NODES])
    print("c", [float(f"{value:.9g}") for value in c])
    print("b1, b2", f"{b1:.9g}, {b2:.9g}", "error", f"{error:.1e}")
