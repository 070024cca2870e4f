"""Prefill and decode, pruned against unpruned and ideal: ``python -m tokenprune_eval.bench``.

One model with random weights; what is compared runs in turn in one process and is judged by per-round ratios:

* unpruned: the stock model, with a cache, logits of the last position.
* ideal: what pruning could cost at best (`ideal.py`), with the keep lists the method chose.
* ours: the wrapped model, free running; also with `uniform`, and with keep=1.0, which prunes nothing.

The vision tower is outside all of them: its features are made beforehand. The wrapped and the unpruned model
start from input ids, the ideal from embeddings, so what embedding costs is held against ours.
The score is t_ideal / t_ours. Where t_unpruned / t_ideal < 1.2 the row reads "launch-bound" and is no pass:
the machine's fixed costs hide what pruning saves, and a larger batch has to be measured.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tokenprune
from tokenprune import machine
from tokenprune.timing import CLOCKS, Arm, Ratio, interleave, milliseconds, ratio
from tokenprune_eval.geometry import GEOMETRIES, Geometry, build, fix_features, prompts, with_budget
from tokenprune_eval.ideal import prepare
from tokenprune_eval.memory import peak_bytes

LAUNCH_BOUND = 1.2
PASS = 0.95
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.05}


def verdict(unpruned_over_ideal: float, score: float) -> str:
    """ "launch-bound" where pruning has nothing to save, else "pass" or "fail" of t_ideal / t_ours >= 0.95."""
    if unpruned_over_ideal < LAUNCH_BOUND:
        return "launch-bound"
    return "pass" if score >= PASS else "fail"


class Bench:
    """One geometry and batch.

    Args:
        model: from `geometry.build`.
        geometry: its sizes and budget.
        batch: rows.
        ragged: rows of different length, left-padded.
        method, parameters: the method of "ours".
    """

    def __init__(
        self,
        model: Any,
        geometry: Geometry,
        batch: int,
        ragged: bool,
        method: str,
        parameters: dict[str, str],
    ) -> None:
        self.model, self.geometry, self.batch, self.ragged = model, geometry, batch, ragged
        self.method, self.parameters = method, parameters
        self.device = model.device.type
        self.inputs = prompts(geometry, batch, ragged, self.device)
        self.features = fix_features(model, batch, geometry)
        with self.wrapped(), torch.inference_mode():
            ours = self.prefill()
            self.report = tokenprune.report(model)
        self.ideal = prepare(model, self.inputs, self.features, geometry.layer, self.report.keep_lists[0])
        with torch.inference_mode():
            self.error = float((self.ideal()[0] - ours.logits[:, -1]).abs().max())
            self.effect = float((self.prefill().logits[:, -1] - ours.logits[:, -1]).abs().max())

    @property
    def name(self) -> str:
        return f"{self.batch}{' ragged' if self.ragged else ''}"

    def check(self) -> None:
        """The benchmark of a wrong thing is worthless: ideal and ours must compute the same.

        Raises:
            SystemExit: they do not.
        """
        if not self.error <= TOLERANCE[self.geometry.dtype]:
            raise SystemExit(
                f"batch {self.name}: ideal and pruned logits differ by {self.error:.1e}; nothing was timed"
            )
        if self.geometry.dtype == torch.float32 and self.effect < 10 * TOLERANCE[torch.float32]:
            raise SystemExit(
                f"batch {self.name}: pruning changes the logits by only {self.effect:.1e}; the check is blind"
            )

    def wrapped(self, method: str | None = None, **arguments: Any) -> AbstractContextManager[Any]:
        """The model pruned as the geometry says, or otherwise."""
        options = {"keep": self.geometry.keep, "layer": self.geometry.layer, "budget": "after_cut"}
        if method is None:
            options |= self.parameters
        return tokenprune.pruned(self.model, method or self.method, **{**options, **arguments})

    def prefill(self, state: object = None) -> Any:
        return self.model(**self.inputs, use_cache=True, logits_to_keep=1)

    def time_prefill(self, rounds: int, clock: str) -> tuple[dict[str, list[float]], list[tokenprune.Report]]:
        """Seconds of each arm by round, and the reports of ours."""
        reports: list[tokenprune.Report] = []
        arms = {
            "unpruned": Arm(self.prefill),
            "ideal": Arm(lambda _: self.ideal()),
            "ours": Arm(self.prefill, context=partial(self._observed, reports)),
            "uniform": Arm(self.prefill, context=partial(self.wrapped, "uniform")),
            "keep=1.0": Arm(self.prefill, context=partial(self.wrapped, keep=1.0)),
            "unpruned again": Arm(self.prefill),
            "embedding": Arm(self._embed),
        }
        return interleave(arms, rounds, clock=clock, device=self.device), reports[-rounds:]

    def _embed(self, state: object = None) -> Tensor:
        """What stands before layer 0 in the stock forward and not in the ideal."""
        ids = self.inputs["input_ids"]
        mask = (ids == self.model.config.image_token_id).unsqueeze(-1)
        return self.model.get_input_embeddings()(ids).masked_scatter(mask, self.features)

    @contextmanager
    def _observed(self, reports: list[tokenprune.Report]) -> Iterator[None]:
        with self.wrapped():
            yield
            reports.append(tokenprune.report(self.model))

    def time_decode(self, rounds: int, steps: int, clock: str) -> dict[str, list[float]]:
        """Seconds per decoded token, after a pruned and an unpruned prompt, through the same stock forward."""
        arms = {
            "unpruned": Arm(partial(self._decode, steps), setup=self._prompt),
            "ours": Arm(partial(self._decode, steps), setup=self._prompt, context=self.wrapped),
        }
        seconds = interleave(arms, rounds, warmup=1, clock=clock, device=self.device)
        return {name: [s / steps for s in values] for name, values in seconds.items()}

    def _prompt(self) -> tuple[Any, Tensor, Tensor]:
        return (
            self.prefill().past_key_values,
            self.inputs["attention_mask"],
            self.inputs["position_ids"][:, -1:],
        )

    def _decode(self, steps: int, state: tuple[Any, Tensor, Tensor]) -> None:
        cache, mask, position = state
        token = self.inputs["input_ids"][:, -1:]
        for _ in range(steps):
            mask, position = torch.nn.functional.pad(mask, (0, 1), value=1), position + 1
            output = self.model(
                input_ids=token,
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
            token = output.logits[:, -1:].argmax(-1)

    def peaks(self) -> tuple[int, int]:
        """Peak bytes of a prefill, unpruned and ours, cache included."""
        with torch.inference_mode():
            self.prefill()  # buffers made on first use are not this call's
            unpruned = peak_bytes(self.prefill, self.device)
            with self.wrapped():
                self.prefill()
                ours = peak_bytes(self.prefill, self.device)
        return unpruned, ours


def measure(bench: Bench, rounds: int, steps: int, clock: str) -> dict[str, str]:
    """Time everything for one row of the CSV."""
    bench.check()
    seconds, reports = bench.time_prefill(rounds, clock)
    decode = bench.time_decode(max(3, rounds // 3), steps, clock)
    peak_unpruned, peak_ours = bench.peaks()
    report, geometry = bench.report, bench.geometry
    score, saved = ratio(seconds["ideal"], seconds["ours"]), ratio(seconds["unpruned"], seconds["ideal"])
    scoring, compacting = (
        [getattr(r, f"seconds_{what}") for r in reports] for what in ("scoring", "compacting")
    )
    extra = [a + b for a, b in zip(scoring, compacting, strict=True)]
    row = {
        "geometry": geometry.name,
        "batch": bench.name,
        "method": bench.method,
        "parameters": " ".join(f"{k}={v}" for k, v in report.parameters.items()),
        "layers": str(geometry.layers),
        "hidden": str(geometry.hidden),
        "dtype": str(geometry.dtype).removeprefix("torch."),
        "length": str(report.length),
        "visual": str(geometry.visual),
        "kept": str(geometry.keep),
        "layer": str(geometry.layer),
        "rounds": str(rounds),
        "clock": clock,
        "t_unpruned_ms": f"{milliseconds(seconds['unpruned']):.2f}",
        "t_ideal_ms": f"{milliseconds(seconds['ideal']):.2f}",
        "t_ours_ms": f"{milliseconds(seconds['ours']):.2f}",
        "t_uniform_ms": f"{milliseconds(seconds['uniform']):.2f}",
        "embedding_ms": f"{milliseconds(seconds['embedding']):.3f}",
        **_spread("ideal/ours", score),
        **_spread("ideal/uniform", ratio(seconds["ideal"], seconds["uniform"])),
        **_spread("unpruned/ideal", saved),
        **_spread("unpruned/ours", ratio(seconds["unpruned"], seconds["ours"])),
        "verdict": verdict(saved.median, score.median),
        "flops_ratio": f"{report.flops / report.flops_unpruned:.4f}",
        "scoring_ms": f"{milliseconds(scoring):.3f}",
        "compacting_ms": f"{milliseconds(compacting):.3f}",
        **_spread("extra/unpruned", ratio(extra, seconds["unpruned"])),
        **_spread("keep=1.0/unpruned", ratio(seconds["keep=1.0"], seconds["unpruned"])),
        **_spread("unpruned again/unpruned", ratio(seconds["unpruned again"], seconds["unpruned"])),
        "decode_unpruned_ms": f"{milliseconds(decode['unpruned']):.3f}",
        "decode_ours_ms": f"{milliseconds(decode['ours']):.3f}",
        **_spread("decode ours/unpruned", ratio(decode["ours"], decode["unpruned"])),
        "kv_bytes": str(report.kv_used),
        "kv_bytes_unpruned": str(
            report.kv_used * geometry.layers * report.length // sum(x.length for x in report.layers)
        ),
        "peak_bytes": str(peak_ours),
        "peak_bytes_unpruned": str(peak_unpruned),
        "logits_error": f"{bench.error:.1e}",
    }
    return {**row, **machine.describe()}


def _spread(name: str, value: Ratio) -> dict[str, str]:
    return {name: f"{value.median:.4f}", f"{name} p20": f"{value.p20:.4f}", f"{name} p80": f"{value.p80:.4f}"}


def show(row: dict[str, str], console: Console) -> None:
    """One row as a table of questions and answers."""
    table = Table(
        title=f"{row['geometry']}, batch {row['batch']}: {row['kept']} of {row['visual']} visual tokens from layer "
        f"{row['layer']}, {row['method']}",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("median", justify="right")
    table.add_column("p20 .. p80", justify="right")

    def spread(label: str, name: str) -> None:
        table.add_row(label, row[name], f"{row[f'{name} p20']} .. {row[f'{name} p80']}")

    for arm in ("unpruned", "ideal", "ours", "uniform"):
        table.add_row(f"t_{arm}", f"{row[f't_{arm}_ms']} ms", "")
    spread(f"t_ideal / t_ours: {row['verdict']}", "ideal/ours")
    spread("t_ideal / t_uniform", "ideal/uniform")
    table.add_row("embedding (in ours, not in the ideal)", f"{row['embedding_ms']} ms", "")
    spread("t_unpruned / t_ideal", "unpruned/ideal")
    spread("t_unpruned / t_ours", "unpruned/ours")
    table.add_row("FLOPs, pruned / unpruned", row["flops_ratio"], "")
    table.add_row("scoring, compacting", f"{row['scoring_ms']} ms, {row['compacting_ms']} ms", "")
    spread("  their sum / t_unpruned (at most 0.02)", "extra/unpruned")
    spread("keep=1.0 / unpruned (at most 1.01)", "keep=1.0/unpruned")
    spread("unpruned again / unpruned", "unpruned again/unpruned")
    spread(
        f"decode {row['decode_ours_ms']} / {row['decode_unpruned_ms']} ms per token", "decode ours/unpruned"
    )
    mib = {name: int(row[name]) / 2**20 for name in row if "_bytes" in name or name.startswith("kv")}
    table.add_row("KV cache", f"{mib['kv_bytes']:.1f} of {mib['kv_bytes_unpruned']:.1f} MiB", "")
    table.add_row("peak of a prefill", f"{mib['peak_bytes']:.1f} of {mib['peak_bytes_unpruned']:.1f} MiB", "")
    table.add_row("logits, ideal against ours", row["logits_error"], "")
    console.print(table)


def append(path: Path, row: dict[str, str]) -> None:
    """Add a row to a CSV.

    Raises:
        SystemExit: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    if not fresh:
        with path.open(newline="") as file:
            if next(csv.reader(file), None) != list(row):
                raise SystemExit(f"{path} has other columns; move it away or name another file with --csv")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def parse_batch(text: str) -> tuple[int, bool]:
    """ "8" -> (8, False), "8r" -> (8, True): ragged."""
    size = int(text.removesuffix("r"))
    if size < 1:
        raise ValueError(text)
    return size, text.endswith("r")


def main(argv: Sequence[str] | None = None) -> None:
    """Time one geometry at one or more batch sizes."""
    parser = argparse.ArgumentParser(description="Time pruned prefill and decode against unpruned and ideal.")
    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="cpu")
    parser.add_argument(
        "--batch",
        nargs="+",
        type=parse_batch,
        default=[(1, False), (8, False), (8, True)],
        metavar="N[r]",
        help="rows; with an r rows of different lengths, padded (default: 1 8 8r)",
    )
    parser.add_argument("--keep", type=int, help="visual tokens after the cut (default: the geometry's)")
    parser.add_argument("--layer", type=int, help="decoder layer the cut enters (default: the geometry's)")
    parser.add_argument("--method", default="entropyprune")
    parser.add_argument(
        "--param", nargs="*", default=[], metavar="NAME=VALUE", help="parameters of the method"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--repeats", type=int, default=15, help="measured rounds (default: 15)")
    parser.add_argument("--steps", type=int, default=8, help="decode steps per round (default: 8)")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: leaves out other processes' time"
    )
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    geometry = with_budget(GEOMETRIES[options.geometry], options.keep, options.layer)
    parameters = dict(item.split("=", 1) for item in options.param)
    console = Console()
    console.print(", ".join(f"{name} {value}" for name, value in machine.describe().items() if value))
    model = build(geometry, options.device)
    for size, ragged in options.batch:
        bench = Bench(model, geometry, size, ragged, options.method, parameters)
        row = measure(bench, options.repeats, options.steps, options.clock)
        show(row, console)
        if options.csv is not None:
            append(options.csv, row)


if __name__ == "__main__":
    main()
