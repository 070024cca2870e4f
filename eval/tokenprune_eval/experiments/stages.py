"""What stages read, at equal budgets, on a testbed: ``python -m tokenprune_eval.experiments stages``.

The map of VFlowOpt before the LLM in all of them; behind it the map, the prompt's last token, or all of the question's.
"""

from __future__ import annotations

from typing import Any

from tokenprune_eval.experiments.base import Experiment

#: How the budget is spent: cut layers by thirds of the decoder, and shares in multiples of the budget.
SCHEDULES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "0 1/3 2/3": ((0, 1 / 3, 2 / 3), (1.2, 1.08)),
    "0 1/3 2/3, steeper": ((0, 1 / 3, 2 / 3), (1.9, 0.85)),
    "0 2/3": ((0, 2 / 3), (1.1,)),
}
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    "map": ("vflowopt", {}),
    "last token": ("fastv", {}),
    "question": ("question", {}),
    "question, median of heads": ("question", {"pooling": "median"}),
    "question, a third on the grid": ("question", {"even": 0.33}),
}
#: Methods whose one cut is before the LLM.
BEFORE = ("visionzip", "divprune", "cdpruner")


def arms(layers: int, keep: float) -> dict[str, dict[str, Any]]:
    """Arguments of `wrap` by name."""
    found: dict[str, dict[str, Any]] = {
        "auto": {"keep": keep},
        **{name: {"method": name, "keep": keep} for name in ("vflowopt", *BEFORE)},
    }
    for when, (places, shares) in SCHEDULES.items():
        for what, (method, parameters) in READERS.items():
            layer, *later = (round(place * layers) for place in places)
            first, *second = (min(1.0, share * keep) for share in shares)
            stages: list[tuple[Any, ...]] = [(layer, "vflowopt", first)]
            stages += [
                (at, method, share, parameters) for at, share in zip(later, (*second, None), strict=True)
            ]
            found[f"{what}, {when}"] = {"keep": keep, "stages": stages}
    two_thirds = round(2 / 3 * layers)
    for name in BEFORE:
        found[f"{name}, last token, 0 2/3"] = {
            "keep": keep,
            "stages": [(0, name, 1.1 * keep), (two_thirds, "fastv", None)],
        }
    return found


EXPERIMENT = Experiment(
    "stages",
    "What later cuts read, at equal budgets.",
    lambda bench, keep: (
        {} if keep is None else arms(bench.model.config.get_text_config().num_hidden_layers, keep)
    ),
    models=("smol",),
    budgets=(0.11,),
    questions=400,
)
