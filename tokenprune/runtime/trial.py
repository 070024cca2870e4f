"""The first prompt of a model of unknown kind: pruned, and once more with what was dropped masked instead.

A token that is gone and a token that nobody may look at give the same states everywhere else. Where they do not, this
model does something with its tokens that the runtime does not know of.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.models.decoders import attention_backend
from tokenprune.runtime.call import Call
from tokenprune.runtime.wrapped import Changed, Wrapped

# Of the logits' own spread: what rounding makes of it in each dtype.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}
_LEFT_OUT = (
    "labels",
    "use_cache",
    "cache",
    "past_key_values",
    "cache_position",
    "return_dict",
    "logits_to_keep",
)


def try_prompt(runtime: Wrapped, call: Call, inputs: dict[str, Any], output: Any) -> None:
    """Compare a pruned prompt's last logits with those of the masked forward.

    Args:
        runtime: whose model it is; its hooks look away meanwhile.
        call: at its end.
        inputs: of the call, as given.
        output: of the call.

    Raises:
        UnsupportedModelError: they differ.
    """
    stages = call.stages
    assert stages is not None
    logits = (output[0] if isinstance(output, tuple) else output.logits)[:, -1].float()
    kept = [_kept(call, own.index) for own in stages.done]
    hooks = [
        layer.register_forward_pre_hook(partial(_mask, runtime, kept[made - 1]), with_kwargs=True)
        for layer, made in zip(runtime.layers, call.config.cuts_by(len(runtime.layers)), strict=True)
        if made
    ]
    given = {name: value for name, value in inputs.items() if name not in _LEFT_OUT}
    if call.attention is None:
        given.pop("attention_mask", None)  # made for a static cache
    runtime.calls.trying = True
    try:
        with torch.no_grad():
            made = runtime.model(**given, use_cache=False, return_dict=True).logits[:, -1].float()
    finally:
        runtime.calls.trying = False
        for hook in hooks:
            hook.remove()
    off = float((made - logits).abs().max() / made.std().clamp(min=1e-6))
    if not off <= _TOLERANCE.get(output[0].dtype, 1e-3):
        raise UnsupportedModelError(
            f"a {type(runtime.model).__name__} is of no known family and was tried on its first prompt: it answers "
            f"otherwise ({off:.1e} of the logits' spread) where dropped tokens are masked, so it cannot be pruned as "
            f"other models are; unwrap it, or write a Family (docs/family.md)"
        )


def _kept(call: Call, index: Tensor) -> Tensor:
    """(B, L) bool, True at the columns that are left."""
    left = torch.zeros(call.batch, call.length + 1, dtype=torch.bool, device=index.device)
    return left.scatter_(1, index.masked_fill(index < 0, call.length), True)[:, :-1]


def _mask(
    runtime: Wrapped, kept: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Changed:
    """The layer's mask, what is not kept hidden from everybody but itself."""
    if not runtime.calls.trying:  # another thread's call
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    length, device = hidden.shape[1], hidden.device
    stock, kept = kwargs.get("attention_mask"), kept.to(device)
    if "flash" in attention_backend(runtime.text_config):
        seen = kept if stock is None else kept & stock.bool()
        return args, {**kwargs, "attention_mask": seen}
    sees = torch.ones(length, length, dtype=torch.bool, device=device)
    if stock is None:
        sees = sees.tril() if runtime.masks.is_causal else sees
        sees = sees[None, None]
    else:
        sees = (stock if stock.dtype == torch.bool else stock == 0)[..., :length]
    sees = (sees & kept[:, None, None, :]) | torch.eye(length, dtype=torch.bool, device=device)
    mask = torch.zeros(sees.shape, dtype=hidden.dtype, device=device)
    return args, {**kwargs, "attention_mask": mask.masked_fill(~sees, torch.finfo(hidden.dtype).min)}
