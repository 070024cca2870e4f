"""Where to cut, and how much goes there: a dynamic programme over the drift of single cuts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

#: What is measured: so many layers, and so many shares from a sixth of the budget to six times as much.
LAYERS, SHARES, SPAN = 8, 8, 6.0
_UNITS = 400  # a share of 1 in one layer, as the programme counts it

Drifts = Mapping[tuple[int, float], float]
#: Least drift by (share, cuts made, spent), with the cuts that lead there.
_States = dict[tuple[int, int, int], tuple[float, tuple[tuple[int, float], ...]]]


def cells(num_layers: int, keep: float) -> list[tuple[int, float]]:
    """(layer, share kept behind it) of the single cuts to measure."""
    layers = sorted({i * num_layers // LAYERS for i in range(LAYERS)})
    shares = np.geomspace(keep / SPAN, min(0.9, SPAN * keep), SHARES)
    return [(layer, round(float(share), 4)) for layer in layers for share in shares]


def schedule(drifts: Drifts, num_layers: int, keep: float, most: int) -> list[tuple[int, float]]:
    """Cuts, as (layer, share), whose drifts sum to the least while shares average `keep` or less over the layers.

    What a later cut adds is taken to be the drift of cutting there to its share, less that of cutting there to the
    share before it: as if cuts knew nothing of each other. Drift that rises with the share is noise and is levelled.

    Source: ours. A programme over (layer, share, what is spent), exact for what was measured.

    Args:
        drifts: of `cells`; the first layer is 0.
        num_layers: of the decoder.
        keep: average retention.
        most: cuts at most; the first is before the LLM.
    """
    layers = sorted({layer for layer, _ in drifts})
    shares = [1.0, *sorted({share for _, share in drifts}, reverse=True)]
    table = np.array([[0.0, *(drifts[layer, share] for share in shares[1:])] for layer in layers])
    table = np.maximum.accumulate(table, axis=1)
    budget = int(keep * num_layers * _UNITS)
    states: _States = {(0, 0, 0): (0.0, ())}
    for at, (layer, after) in enumerate(zip(layers, [*layers[1:], num_layers], strict=True)):
        reached: _States = {}
        for (share, cuts, spent), (drift, path) in states.items():
            for to in range(share, len(shares)):
                cut = to != share
                total = spent + round(shares[to] * (after - layer) * _UNITS)
                if total > budget or cuts + cut > most or (layer == 0 and not cut):
                    continue
                own = drift + table[at, to] - table[at, share]
                key = (to, cuts + cut, total)
                if key not in reached or own < reached[key][0]:
                    reached[key] = (own, (*path, (layer, shares[to])) if cut else path)
        states = _undominated(reached)
    return list(min(states.values())[1]) if states else []


def _undominated(
    states: _States,
) -> _States:
    """Of states alike but for what is spent, those that nothing cheaper is as good as."""
    kept: _States = {}
    least: dict[tuple[int, int], float] = {}
    for key in sorted(states):
        if states[key][0] < least.get(key[:2], np.inf):
            kept[key] = states[key]
            least[key[:2]] = states[key][0]
    return kept
