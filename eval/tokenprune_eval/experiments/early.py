"""What `compact_early` costs in answers and saves in memory: ``python -m tokenprune_eval.experiments early``.

Asked "at once", the question is part of the prompt and sees every token in the layers before the cut; only the answer's
own tokens are without them. Asked "later", the picture is the prompt and the question follows it in a second call on
its cache, so that the question too is without them: the hard case, and that of every later turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import tokenprune
from tokenprune import machine
from tokenprune.releases import cache_argument, cache_of
from tokenprune_eval.experiments.base import Experiment, Measured
from tokenprune_eval.experiments.bench import ACCURACY, Bench
from tokenprune_eval.experiments.rows import Rows
from tokenprune_testbed import evaluate

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


def arms(bench: Bench, keep: float | None) -> dict[str, dict[str, Any]]:
    """Arguments of `wrap`, and `later`: whether the question comes in a call of its own."""
    methods = {"none": {"method": "none"}} if keep is None else METHODS
    found = {}
    for name, own in methods.items():
        for asked in ("at once", "later"):
            for early in (False, True) if keep else (False,):
                arm = f"{name}, {asked}" + (", compact_early" if early else "")
                budget = {} if keep is None else {"keep": keep}
                found[arm] = {**own, **budget, "compact_early": early, "later": asked == "later"}
    return found


def measure(bench: Bench, arm: str, setting: Mapping[str, Any]) -> Measured:
    """Accuracy, and the cache of a batch right after the prompt."""
    arguments = {name: value for name, value in setting.items() if name != "later"}
    with tokenprune.pruned(bench.model, **arguments), bench.memory.features(bench.model):
        asked = Asked(bench.model, setting["later"], [])
        result = evaluate(asked, bench.processor, bench.samples, bench.batch_size)
    row = {**bench.accuracy(result), "kv_mib": f"{sum(asked.kv) / len(asked.kv) / 2**20:.2f}"}
    return {**row, **machine.describe()}, result.correct


def table(rows: Rows) -> str:
    """Accuracy in % with 95 % Wilson intervals, and MiB of cache after the prompt."""
    lines = ["| model, kept | | whole early layers | `compact_early` |", "|---|---|---:|---:|"]
    for row in rows.rows.values():
        if not row["arm"].endswith("compact_early"):
            other = rows.rows.get(row["key"] + ", compact_early")
            kept = f"{float(row['keep']):.0%}" if row["keep"] else "all"
            cells = [_cell(row), "" if other is None else _cell(other)]
            lines.append(f"| {row['model']}, {kept} | {row['arm']} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _cell(row: dict[str, str]) -> str:
    accuracy, low, high = (100 * float(row[name]) for name in ("accuracy", "low", "high"))
    return f"{accuracy:.1f} [{low:.1f}, {high:.1f}], {row['kv_mib']} MiB"


EXPERIMENT = Experiment(
    "early",
    "What compact_early costs in answers and saves in memory.",
    arms,
    budgets=(0.25,),
    columns=(*ACCURACY, "kv_mib", *machine.FIELDS),
    measure=measure,
    show=table,
)
