"""Which model this is, by what it holds: for results that must not be used on another one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.models import stock_model
from tokenprune.tensors import plain_tensors

_BYTES = 4096  # of each parameter
# Of a config: where it was loaded from and how it is run, not what it is.
_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}


def fingerprint(model: Any) -> str:
    """32 hex digits that identify a model: its class, its config, and every parameter's name, shape, dtype and first
    4 KiB.

    The same checkpoint in the same dtype has one fingerprint wherever it was loaded from and on whatever device.
    Adapters and training change it; an edit behind the first 4 KiB of one matrix may not. Of the config, what differs
    from the defaults counts, so that releases of transformers that add settings change nothing.

    Raises:
        UnsupportedModelError: no stock model, or parameters whose values are not in memory (offloaded to disk).
    """
    return stamp(stock_model(model))


def stamp(module: nn.Module) -> str:
    """The same of any module that may have a config: of a vision tower, for example.

    Raises:
        UnsupportedModelError: parameters whose values are not in memory.
    """
    digest = hashlib.sha256(type(module).__name__.encode())
    config: Any = getattr(module, "config", None)
    if config is not None:
        digest.update(json.dumps(_settled(config.to_diff_dict()), sort_keys=True, default=str).encode())
    for name, parameter in sorted(module.named_parameters()):
        for i, tensor in enumerate(plain_tensors(parameter)):
            if tensor.is_meta:
                raise UnsupportedModelError(f"{name} is not in memory; load the model without offloading")
            digest.update(f"{name}.{i} {tuple(tensor.shape)} {tensor.dtype}".encode())
            first = tensor.detach().flatten()[: _BYTES // tensor.element_size()]
            digest.update(first.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _settled(config: Any) -> Any:
    if isinstance(config, dict):
        return {
            str(k): _settled(v)
            for k, v in config.items()
            if str(k) not in _VOLATILE and "_implementation" not in str(k)
        }
    return [_settled(v) for v in config] if isinstance(config, list | tuple) else config
