"""What stages read, at equal budgets, on a testbed: ``python -m tokenprune_eval.stages``.

The map of VFlowOpt before the LLM in all of them; behind it the map, the prompt's last token, or all of the question's.
A row is written as soon as it is known; what is in the CSV already is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenprune_eval.results import Results
from tokenprune_eval.settings import ROW, Bench

COLUMNS = ["key", "model", "keep", "stages", *ROW]
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


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not in the CSV yet."""
    parser = argparse.ArgumentParser(description="What later cuts read.")
    parser.add_argument("--model", default="smol")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.11])
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--only", default="", help="arms whose names contain this")
    parser.add_argument("--csv", type=Path, default=Path("eval/results/stages.csv"))
    options = parser.parse_args(argv)
    results = Results(options.csv, COLUMNS)
    results.load()
    bench = Bench(options.model, options.questions, options.prompts)
    layers = bench.model.config.get_text_config().num_hidden_layers
    for keep in options.budgets:
        for name, arguments in arms(layers, keep).items():
            key = f"{options.model} {keep} {name}"
            if key in results.rows or options.only not in name:
                continue
            row = bench.row(arguments)
            results.add({"key": key, "model": options.model, "keep": str(keep), "stages": name, **row})
            print(f"{key}: drift {row['held_out_drift']}, accuracy {float(row['accuracy']):.1%}", flush=True)


if __name__ == "__main__":
    main()
