"""What each method leaves of a prefill's time: ``python -m tokenprune_eval.studies.method_speed``.

Every method at its default cuts, in turn with the unpruned model (A B C ... A B C ... in one process), medians of
paired ratios; the tower is remembered, so that what stands here is the decoder's prefill and the method's own work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tokenprune import machine, pruned, tables
from tokenprune.bench.geometry import GEOMETRIES, random_subject
from tokenprune.errors import BudgetError
from tokenprune.methods import METHODS
from tokenprune_kernels.timing import Timed, interleave, ratio


def main(argv: Sequence[str] | None = None) -> None:
    """Time all methods, and write a CSV anew."""
    parser = argparse.ArgumentParser(description="The time of a prefill under every method.")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--csv", type=Path, default=Path("eval/results/method_speed.csv"))
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    subject = random_subject(GEOMETRIES[options.geometry], device, looks=True)
    inputs = subject.prompts(options.batch, False)
    model = subject.model

    def inside(arguments: dict[str, Any]) -> AbstractContextManager[Any]:
        entered = ExitStack()
        entered.enter_context(subject.inside())
        entered.enter_context(pruned(model, **arguments))
        return entered

    def prefill(state: object = None) -> Any:
        return model(**inputs, use_cache=True, logits_to_keep=1)

    arms = {"none": Timed(prefill, context=partial(inside, {"method": "none"}))}
    for name in sorted(set(METHODS) - {"none"}):
        arguments = {"method": name, "keep": options.keep}
        try:
            with inside(arguments), torch.inference_mode():
                prefill()
        except BudgetError as error:
            print(f"{name}: {error}")
            continue
        arms[name] = Timed(prefill, context=partial(inside, arguments))
    seconds = interleave(arms, options.rounds, warmup=1, device=device)
    rows = []
    for name in arms:
        found = ratio(seconds[name], seconds["none"])
        print(f"{name:<14}{found}")
        row = {
            "geometry": options.geometry,
            "batch": str(options.batch),
            "keep": str(options.keep),
            "method": name,
        }
        row |= {"ratio": f"{found.median:.4f}", "p20": f"{found.p20:.4f}", "p80": f"{found.p80:.4f}"}
        rows.append({**row, "rounds": str(options.rounds), **machine.describe()})
    tables.write(options.csv, rows)


if __name__ == "__main__":
    main()
