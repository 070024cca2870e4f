"""A prompt whose first token is unsure is prefilled again with a larger budget, row by row.

The signal is that of ARES, "Multimodal Adaptive Reasoning via Difficulty-Aware Token-Level Entropy Shaping", and of
"When Does Multi-Agent Collaboration Help? An Entropy Perspective".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tokenprune.errors import UnsupportedModeError
from tokenprune.runtime.call import Call
from tokenprune.runtime.current import Override, begin_override, end_override
from tokenprune.runtime.outcome import make_outcome
from tokenprune.runtime.record import attach
from tokenprune.runtime.wrapped import Wrapped
from tokenprune.tensors import entropy_of


def may_escalate(call: Call, inputs: dict[str, Any]) -> bool:
    """Whether a call that begins may have to be done again.

    Raises:
        UnsupportedModeError: it may, and its cache is none that can be emptied.
    """
    asked = call.config.arguments.escalate
    if asked is None or call.stages is None or call.past or call.record is not None:
        return False
    if torch.is_grad_enabled() and inputs.get("labels") is not None:
        return False
    if call.cache is not None and type(call.cache) is not DynamicCache:
        raise UnsupportedModeError(
            f"escalate prefills an unsure prompt again, for which a {type(call.cache).__name__} cannot be emptied; use "
            f"a growing cache, or leave escalate out"
        )
    return True


def escalated(runtime: Wrapped, call: Call, output: Any) -> Any:
    """The output of the prompt done again, where any row's next token is unsure; else None.

    Args:
        runtime: whose model it is.
        call: at its end; nothing of it has been noted yet.
        output: of the call.
    """
    asked, given = call.config.arguments.escalate, call.again
    assert asked is not None and given is not None and call.rows is not None
    logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
    found = entropy_of(logits[:, -1]).tolist()  # one copy from the device
    unsure = [r for r, entropy in enumerate(found) if entropy > asked.entropy and call.rows[r]]
    if not unsure:
        return None
    runtime.outcome = make_outcome(runtime.costs, call)  # it took its time, too
    if call.cache is not None:
        # Made without a config it grows by the same layer again and again, and with one it has all of them.
        grows = getattr(call.cache, "layer_class_to_replicate", None) is not None
        fresh = DynamicCache() if grows else DynamicCache(config=runtime.text_config)
        call.cache.layers = fresh.layers
        attach(call.cache, None)
    config = replace(
        call.config,
        arguments=replace(call.config.arguments, escalate=None),
        rows_at=dict.fromkeys(unsure, asked.keep),
    )
    override = Override(runtime, config)
    begin_override(override)
    try:
        return runtime.model(**given)
    finally:
        end_override(override)
