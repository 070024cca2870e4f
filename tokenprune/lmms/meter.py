"""What is noted beside the answers: tokens, memory, times and drift, as lmms-eval's own metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenprune.reporting import Report


@dataclass
class Meter:
    """Sums over the batches of one call of lmms-eval."""

    prompts: int = 0
    visual: int = 0
    kept: int = 0
    average: float = 0.0
    kv: int = 0
    batches: int = 0
    first: float = 0.0
    later: float = 0.0
    later_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    drift: list[float] = field(default_factory=list)

    def add(
        self, report: Report, rows: int, tokens: int, began: float, first: float, ended: float, longest: int
    ) -> None:
        """A batch: what was reported of it, its rows, new tokens, and when it began, had its first token, and ended."""
        self.prompts, self.batches, self.tokens = self.prompts + rows, self.batches + 1, self.tokens + tokens
        self.visual, self.kept = self.visual + report.tokens, self.kept + report.kept
        self.average += report.retention_average * report.tokens
        self.kv += report.kv_used
        self.first += first - began
        self.later, self.later_tokens = self.later + ended - first, self.later_tokens + longest - 1
        self.seconds += ended - began

    def log(self) -> None:
        """Hand everything to lmms-eval; its results file has it under "throughput", as avg_NAME."""
        from lmms_eval.models.model_utils.gen_metrics import log_metrics

        if not self.prompts:
            return
        extra = {
            "visual_tokens": self.visual / self.prompts,
            "kept_tokens": self.kept / self.prompts,
            "retention_average": self.average / self.visual if self.visual else 1.0,
            "kv_mb": self.kv / self.prompts / 2**20,
            "ttft_ms": 1e3 * self.first / self.batches,
        }
        if self.later_tokens:
            extra["ms_per_output_token"] = 1e3 * self.later / self.later_tokens
        if self.drift:
            extra["drift"] = sum(self.drift) / len(self.drift)
        speed = self.tokens / self.seconds if self.seconds else 0.0
        log_metrics(self.seconds, self.tokens, speed, additional_metrics=extra)
