"""Prefill, decoding, whole answers and memory, pruned against unpruned and ideal, as rows of a table.

What is compared runs in turn in one process and is judged by per-round ratios:

* unpruned: the stock model, with a cache, logits of the last position.
* ideal: what pruning could cost at best (`ideal.py`), with the keep lists the method chose.
* ours: the wrapped model, free running; also with `uniform` where there is an ideal, with keep=1.0, which prunes
  nothing.

The vision tower is outside all of them: its features are made beforehand. The wrapped and the unpruned model
start from input ids, the ideal from embeddings, so what embedding costs is held against ours.
The score is t_ideal / t_ours. Where t_unpruned / t_ideal < 1.2 the row reads "launch-bound" and is no pass:
the machine's fixed costs hide what pruning saves, and a larger batch has to be measured.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenprune import machine
from tokenprune.api import pruned, report
from tokenprune.arguments import AUTO
from tokenprune.bench.geometry import Subject
from tokenprune.bench.ideal import prepare
from tokenprune.bench.peak import peak_bytes
from tokenprune.budget import Keep
from tokenprune.errors import TokenPruneError, UntestedWarning
from tokenprune.releases import cache_argument, cache_of
from tokenprune.reporting import Report
from tokenprune_kernels.timing import Ratio, Timed, interleave, milliseconds, ratio

LAUNCH_BOUND = 1.2
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.05}


@dataclass(frozen=True)
class Plan:
    """What to prune and how long to measure.

    Attributes:
        method, parameters, keep, layer: as `wrap` takes them; layer None is the method's own.
        rounds: of prefill; decoding has a third (at least three), whole answers a fifth of them (at least two).
        steps: decoded tokens per round.
        totals: new tokens of whole answers.
        clock: "wall", or "cpu": processor time, on a machine that others use.
    """

    method: str = AUTO
    parameters: Mapping[str, Any] = field(default_factory=dict)
    keep: Keep = 0.25
    layer: int | None = None
    rounds: int = 15
    steps: int = 8
    totals: tuple[int, ...] = (32, 256)
    clock: str = "wall"


def bar(device: str, visual: int, ragged: bool) -> float:
    """The t_ideal / t_ours to reach: 0.97, 0.95 if ragged; 0.92 for short prompts on a GPU, where launches show."""
    if device == "cuda" and visual < 2000:
        return 0.92
    return 0.95 if ragged else 0.97


def verdict(unpruned_over_ideal: float, score: float, wanted: float) -> str:
    """ "launch-bound" where pruning has nothing to save, else "pass" or "fail" of t_ideal / t_ours."""
    if unpruned_over_ideal < LAUNCH_BOUND:
        return "launch-bound"
    return "pass" if score >= wanted else "fail"


class Bench:
    """One subject at one batch size.

    Args:
        subject: what is timed.
        batch: rows.
        ragged: rows of different length, left-padded.
        plan: what is asked.
    """

    def __init__(self, subject: Subject, batch: int, ragged: bool, plan: Plan) -> None:
        self.subject, self.model, self.batch, self.ragged, self.plan = (
            subject,
            subject.model,
            batch,
            ragged,
            plan,
        )
        self.device = self.model.device.type
        self.inputs = subject.prompts(batch, ragged)
        self.features = subject.features(batch)
        self.report: Any = None
        with self.wrapped(), torch.inference_mode():
            ours = self.prefill()
            self.report = report(self.model)
        self.ideal = None
        self.error = self.effect = 0.0
        if self.features is not None and len(self.report.layers_cut) == 1 and not any(self.report.merges):
            (layer,), (lists,) = self.report.layers_cut, self.report.keep_lists
            self.ideal = prepare(self.model, self.inputs, self.features, layer, lists)
            with torch.inference_mode(), subject.inside():
                self.error = float((self.ideal()[0] - ours.logits[:, -1]).abs().max())
                self.effect = float((self.prefill().logits[:, -1] - ours.logits[:, -1]).abs().max())

    @property
    def name(self) -> str:
        return f"{self.batch}{' ragged' if self.ragged else ''}"

    def check(self) -> None:
        """The benchmark of a wrong thing is worthless: ideal and ours must compute the same.

        Raises:
            TokenPruneError: they do not.
        """
        if self.ideal is None:
            return
        dtype = self.model.dtype
        if not self.error <= TOLERANCE[dtype]:
            raise TokenPruneError(
                f"batch {self.name}: ideal and pruned logits differ by {self.error:.1e}; nothing was timed"
            )
        if dtype == torch.float32 and self.effect < 10 * TOLERANCE[torch.float32]:
            raise TokenPruneError(
                f"batch {self.name}: pruning changes the logits by only {self.effect:.1e}; the check is blind"
            )

    @contextmanager
    def wrapped(self, method: str | None = None, **arguments: Any) -> Iterator[None]:
        """The model pruned as the plan says, or otherwise."""
        plan = self.plan
        options: dict[str, Any] = {"keep": plan.keep, "layer": plan.layer}
        if method is None:
            options |= plan.parameters
        with ExitStack() as entered:
            entered.enter_context(self.subject.inside())
            with warnings.catch_warnings():
                if self.report is not None:  # it was said when the first prompt was pruned
                    warnings.simplefilter("ignore", UntestedWarning)
                wrapped = pruned(self.model, **{"method": method or plan.method, **options, **arguments})
                entered.enter_context(wrapped)
            yield

    def prefill(self, state: object = None) -> Any:
        return self.model(**self.inputs, use_cache=True, logits_to_keep=1)

    @staticmethod
    def _arms(
        run: Callable[[Any], object],
        setup: Callable[[], Any] | None = None,
        **named: Callable[[], AbstractContextManager[Any]],
    ) -> dict[str, Timed]:
        return {name: Timed(run, setup or (lambda: None), context) for name, context in named.items()}

    def time_prefill(self) -> tuple[dict[str, list[float]], list[Report]]:
        """Seconds of each arm by round, and the reports of ours."""
        reports: list[Report] = []
        inside = self.subject.inside
        arms = self._arms(self.prefill, unpruned=inside)
        if self.ideal is not None:
            ideal = self.ideal
            arms["ideal"] = Timed(lambda _: ideal(), context=inside)
            same = partial(self.wrapped, "uniform", layer=self.report.layers_cut[0])
            arms["uniform"] = Timed(self.prefill, context=same)
        arms |= {
            "ours": Timed(self.prefill, context=partial(self._observed, reports)),
            "keep=1.0": Timed(self.prefill, context=partial(self.wrapped, keep=1.0)),
            "unpruned again": Timed(self.prefill, context=inside),
        }
        if self.features is not None:
            arms["embedding"] = Timed(self._embed)
        rounds = self.plan.rounds
        return interleave(arms, rounds, clock=self.plan.clock, device=self.device), reports[-rounds:]

    def _embed(self, state: object = None) -> Tensor:
        """What stands before layer 0 in the stock forward and not in the ideal."""
        ids = self.inputs["input_ids"]
        mask = (ids == self.model.config.image_token_id).unsqueeze(-1)
        assert self.features is not None
        return self.model.get_input_embeddings()(ids).masked_scatter(mask, self.features)

    @contextmanager
    def _observed(self, reports: list[Report]) -> Iterator[None]:
        with self.wrapped():
            yield
            reports.append(report(self.model))

    def time_decode(self) -> dict[str, list[float]]:
        """Seconds per decoded token, after a pruned and an unpruned prompt, through the same stock forward."""
        arms = self._arms(
            partial(self._decode, steps=self.plan.steps),
            self._prompt,
            unpruned=self.subject.inside,
            ours=self.wrapped,
        )
        rounds = max(3, self.plan.rounds // 3)
        seconds = interleave(arms, rounds, warmup=1, clock=self.plan.clock, device=self.device)
        return {name: [s / self.plan.steps for s in values] for name, values in seconds.items()}

    def _prompt(self) -> Any:
        return cache_of(self.prefill())

    def _decode(self, cache: Any, steps: int) -> None:
        mask, token = self.inputs["attention_mask"], self.inputs["input_ids"][:, -1:]
        position = self.inputs["position_ids"][..., -1:] if "position_ids" in self.inputs else None
        for _ in range(steps):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            call: dict[str, Any] = {cache_argument(self.model): cache}
            if position is not None:
                position = call["position_ids"] = position + 1
            output = self.model(input_ids=token, attention_mask=mask, use_cache=True, **call)
            token = output.logits[:, -1:].argmax(-1)

    def time_answers(self, tokens: int) -> dict[str, list[float]]:
        """Seconds of whole answers: the prompt and a greedy loop over the stock forward."""

        def run(state: object) -> None:
            self._decode(self._prompt(), tokens - 1)

        arms = self._arms(
            run,
            unpruned=self.subject.inside,
            ours=self.wrapped,
        )
        rounds = max(2, self.plan.rounds // 5)
        # Everything in it has run before: no round to warm up.
        return interleave(arms, rounds, warmup=0, clock=self.plan.clock, device=self.device)

    def memory(self) -> dict[str, str]:
        """Peak bytes of a prefill beyond the weights, and bytes of the cache, by arm."""
        row: dict[str, str] = {}
        arms: dict[str, Any] = {
            "unpruned": self.subject.inside,
            "ours": self.wrapped,
        }
        with torch.inference_mode():
            for name, context in arms.items():
                with context():
                    cache = cache_of(self.prefill())  # buffers made on first use are not this call's
                    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
                    row[f"kv_used_{name}"] = str(sum(t.nbytes for t in tensors))
                    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
                    row[f"kv_allocated_{name}"] = str(sum(storages.values()))
                    del cache, tensors, storages
                    row[f"peak_{name}"] = str(peak_bytes(self.prefill, self.device))
        return row


def measure(bench: Bench) -> dict[str, str]:
    """Time everything for one row of the table; what an arm is missing for is empty."""
    bench.check()
    plan, found = bench.plan, bench.report
    seconds, reports = bench.time_prefill()
    decode = bench.time_decode()
    answers = {tokens: bench.time_answers(tokens) for tokens in plan.totals}
    scoring, compacting = (
        [getattr(r, f"seconds_{what}") for r in reports] for what in ("scoring", "compacting")
    )
    extra = [a + b for a, b in zip(scoring, compacting, strict=True)]
    text = bench.model.config.get_text_config()
    visual = found.tokens // bench.batch
    wanted = bar(bench.device, visual, bench.ragged)
    score = saved = None
    if "ideal" in seconds:
        score = ratio(seconds["ideal"], seconds["ours"])
        saved = ratio(seconds["unpruned"], seconds["ideal"])
    row = {
        "geometry": bench.subject.name,
        "batch": bench.name,
        "method": found.method if plan.method == found.method else f"{plan.method}: {found.method}",
        "parameters": " ".join(f"{k}={v}" for k, v in found.parameters.items()),
        "layers": str(text.num_hidden_layers),
        "hidden": str(text.hidden_size),
        "dtype": str(bench.model.dtype).removeprefix("torch."),
        "attention": _attention(bench),
        "length": str(found.length),
        "visual": str(visual),
        "keep": str(plan.keep),
        "kept_after_cut": str(found.kept // bench.batch),
        "layer": " ".join(map(str, found.layers_cut)),
        "rounds": str(plan.rounds),
        "clock": plan.clock,
        **{f"t_{arm}_ms": _ms(seconds, arm) for arm in ("unpruned", "ideal", "ours", "uniform")},
        "embedding_ms": _ms(seconds, "embedding"),
        **_spread("ideal/ours", score),
        **_spread("ideal/uniform", _between(seconds, "ideal", "uniform")),
        **_spread("unpruned/ideal", saved),
        **_spread("unpruned/ours", _between(seconds, "unpruned", "ours")),
        "verdict": "" if score is None or saved is None else verdict(saved.median, score.median, wanted),
        "flops_ratio": f"{found.flops / found.flops_unpruned:.4f}",
        "scoring_ms": f"{milliseconds(scoring):.3f}",
        "compacting_ms": f"{milliseconds(compacting):.3f}",
        **_spread("extra/unpruned", ratio(extra, seconds["unpruned"])),
        **_spread("keep=1.0/unpruned", _between(seconds, "keep=1.0", "unpruned")),
        **_spread("unpruned again/unpruned", _between(seconds, "unpruned again", "unpruned")),
        **{f"decode_{arm}_ms": _ms(decode, arm) for arm in ("unpruned", "ours")},
        **_spread("decode ours/unpruned", _between(decode, "ours", "unpruned")),
    }
    for tokens in (32, 256):
        own = answers.get(tokens, {})
        row |= {f"answer{tokens}_{arm}_ms": _ms(own, arm) for arm in ("unpruned", "ours")}
        row |= _spread(f"answer{tokens} unpruned/ours", _between(own, "unpruned", "ours"))
    row |= bench.memory()
    return {**row, "logits_error": f"{bench.error:.1e}", **machine.describe()}


def _attention(bench: Bench) -> str:
    name = str(bench.model.config.get_text_config()._attn_implementation)
    without = bench.device == "cuda" and not torch.backends.cuda.cudnn_sdp_enabled()
    return name + (" without cuDNN" if without else "")


def _ms(seconds: Mapping[str, list[float]], arm: str) -> str:
    return f"{milliseconds(seconds[arm]):.3f}" if arm in seconds else ""


def _between(seconds: Mapping[str, list[float]], a: str, b: str) -> Ratio | None:
    return ratio(seconds[a], seconds[b]) if a in seconds and b in seconds else None


def _spread(name: str, value: Ratio | None) -> dict[str, str]:
    parts = {"": "median", " p20": "p20", " p80": "p80"}
    return {
        f"{name}{end}": "" if value is None else f"{getattr(value, own):.4f}" for end, own in parts.items()
    }
