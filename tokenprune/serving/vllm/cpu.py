"""vLLM's CPU runner (0.32) loads models by a way of its own, on which it forgets to ask whether they prune.

Its GPU runner sets `is_multimodal_pruning_enabled` when a model is loaded. Here the attribute tells the same
from the model itself, in processes that have loaded a pruned one.
"""

from __future__ import annotations

from typing import Any


def mend_runner() -> None:
    """Let the CPU runner ask a model that prunes for its positions. On other machines nothing is changed."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.models.interfaces import supports_multimodal_pruning
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def is_enabled(runner: Any) -> bool:
        multimodal = runner.model_config.multimodal_config
        return (
            supports_multimodal_pruning(getattr(runner, "model", None))
            and multimodal is not None
            and multimodal.is_multimodal_pruning_enabled()
        )

    CPUModelRunner.is_multimodal_pruning_enabled = property(is_enabled, lambda runner, value: None)
