"""What `compact_early` costs in answers and saves in memory: ``python -m tokenprune_eval.early``.

Asked "at once", the question is part of the prompt and sees every token in the layers before the cut; only the answer's
own tokens are without them. Asked "later", the picture is the prompt and the question follows it in a second call on
its cache, so that the question too is without them: the hard case, and that of every later turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tokenprune
from tokenprune import machine
from tokenprune.releases import cache_argument, cache_of
from tokenprune_eval.results import Results
from tokenprune_eval.settings import BATCH, Bench
from tokenprune_testbed import evaluate

COLUMNS = [
    *("key", "model", "keep", "method", "asked", "compact_early", "questions", "accuracy", "low", "high"),
    *("kv_mib", *machine.FIELDS),
]
METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"method": "uniform", "layer": 2},
    "entropyprune": {"method": "entropyprune", "layer": 2},
    "vflowopt": {"method": "vflowopt", "layer": 2},
}


@dataclass
class Asked:
    """A model that is asked through `generate`, in one call or in two.

    Attributes:
        model: wrapped.
        later: whether the question comes in a call of its own, after the pictures.
        kv: bytes of keys and values of each prompt, without the questions that came later.
    """

    model: Any
    later: bool
    kv: list[int]

    @property
    def device(self) -> torch.device:
        return self.model.device

    def generate(self, input_ids: Any, attention_mask: Any, pixel_values: Any, **options: Any) -> Any:
        """Greedy answers behind the prompts, as the model's own `generate` gives them."""
        whole = {"input_ids": input_ids, "attention_mask": attention_mask}
        if not self.later:
            out = self.model.generate(**whole, pixel_values=pixel_values, **options)
            self.kv.append(tokenprune.report(self.model).kv_used)
            return out
        columns = (input_ids == self.model.config.image_token_id).nonzero()[:, 1]
        end = int(columns.max()) + 1
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, :end]
        first = {name: value[:, :end] for name, value in whole.items()}
        out = self.model(**first, pixel_values=pixel_values, position_ids=positions, use_cache=True)
        self.kv.append(tokenprune.report(self.model).kv_used)
        return self.model.generate(**whole, **{cache_argument(self.model): cache_of(out)}, **options)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not in the CSV yet, and print it as Markdown."""
    parser = argparse.ArgumentParser(description="Answers with and without compact_early.")
    parser.add_argument("--models", nargs="+", default=["small", "smol"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25])
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--csv", type=Path, default=Path("eval/results/early.csv"))
    options = parser.parse_args(argv)
    results = Results(options.csv, COLUMNS)
    results.load()
    for model in options.models:
        bench = Bench(model, options.questions)
        cells: list[tuple[str, float | None, dict[str, Any]]] = [("none", None, {"method": "none"})]
        cells += [
            (name, keep, {**own, "keep": keep}) for keep in options.budgets for name, own in METHODS.items()
        ]
        for method, keep, arguments in cells:
            for asked in ("at once", "later"):
                for early in (False, True) if keep else (False,):
                    key = f"{model} {keep or ''} {method} {asked} {early}"
                    if key in results.rows:
                        continue
                    row = measure(bench, {**arguments, "compact_early": early}, asked == "later")
                    results.add(
                        {
                            "key": key,
                            "model": model,
                            "keep": str(keep or ""),
                            "method": method,
                            "asked": asked,
                            "compact_early": str(early),
                            **row,
                        }
                    )
                    print(f"{key}: {float(row['accuracy']):.1%}, {row['kv_mib']} MiB per batch", flush=True)
    print(table(results))


def measure(bench: Bench, arguments: dict[str, Any], later: bool) -> dict[str, str]:
    """Accuracy, and the cache of a batch right after the prompt."""
    with tokenprune.pruned(bench.model, **arguments), bench.memory.features(bench.model):
        asked = Asked(bench.model, later, [])
        overall = evaluate(asked, bench.processor, bench.samples, BATCH).overall
    return {
        "questions": str(overall.total),
        "accuracy": f"{overall.accuracy:.4f}",
        "low": f"{overall.low:.4f}",
        "high": f"{overall.high:.4f}",
        "kv_mib": f"{sum(asked.kv) / len(asked.kv) / 2**20:.2f}",
        **machine.describe(),
    }


def table(results: Results) -> str:
    """Accuracy in % with 95 % Wilson intervals, and MiB of cache after the prompt."""
    lines = [
        "| model, kept | method | asked | whole early layers | `compact_early` |",
        "|---|---|---|---:|---:|",
    ]
    for row in results.rows.values():
        if row["compact_early"] == "True":
            continue
        other = results.rows.get(row["key"].removesuffix("False") + "True")
        kept = f"{float(row['keep']):.0%}" if row["keep"] else "all"
        cells = [_cell(row), "" if other is None else _cell(other)]
        lines.append(
            f"| {row['model']}, {kept} | {row['method']} | {row['asked']} | {cells[0]} | {cells[1]} |"
        )
    return "\n".join(lines)


def _cell(row: dict[str, str]) -> str:
    accuracy, low, high = (100 * float(row[name]) for name in ("accuracy", "low", "high"))
    return f"{accuracy:.1f} [{low:.1f}, {high:.1f}], {row['kv_mib']} MiB"


if __name__ == "__main__":
    main()
