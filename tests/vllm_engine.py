"""What the tests of vLLM share: its environment, set before vLLM is imported, and engines of one's own.

With VLLM_USE_V2_MODEL_RUNNER=1 they run vLLM's second runner, the default on GPUs; here Triton's interpreter stands in
for a GPU, and vLLM has to be told that there is a Triton at all.
"""

from __future__ import annotations

import os
import types
from pathlib import Path
from typing import Any

import pytest

from tokenprune_eval.server import ENVIRONMENT

V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
os.environ.update(ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0")
if V2:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.backends

    class _Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=_Driver, compiler=None)

pytest.importorskip("vllm")  # only now: it looks for Triton when it is imported


def engine(folder: Path, setting: dict[str, Any] | None, **more: Any) -> Any:
    """An engine in this process, pruned as the setting says; None: stock."""
    from vllm import LLM

    given = {} if setting is None else {"additional_config": {"tokenprune": setting}}
    options = {
        "max_num_batched_tokens": 1024,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "limit_mm_per_prompt": {"image": 4},
        **more,
    }
    llm = LLM(model=str(folder), dtype="float32", enforce_eager=True, **given, **options)
    assert bool(llm.llm_engine.vllm_config.use_v2_model_runner) == V2
    return llm
