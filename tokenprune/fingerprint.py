"""Which model this is, by what it holds: for results that must not be used on another one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from tokenprune.errors import UnsupportedModelError
from tokenprune.models import stock_model

_VALUES = 64  # taken from each parameter, evenly spread
# Of a config: where it was loaded from and how it is run, not what it is.
_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}


def fingerprint(model: Any) -> str:
    """32 hex digits that identify a model: its class, its config, and some values of every parameter.

    The same checkpoint has one fingerprint wherever it was loaded from and on whatever device; float32 and bfloat16
    copies of bfloat16 weights share it. Adapters and training of whole layers change it; an edit of a few rows of one
    matrix may not, and a release of transformers that adds settings to the config may change it.

    Raises:
        UnsupportedModelError: no stock model, or parameters whose values are not in memory (offloaded to disk).
    """
    inner = stock_model(model)
    config: Any = inner.config
    digest = hashlib.sha256(type(inner).__name__.encode())
    digest.update(json.dumps(_settled(config.to_dict()), sort_keys=True, default=str).encode())
    parts = []
    for name, parameter in sorted(inner.named_parameters()):
        if parameter.is_meta:
            raise UnsupportedModelError(f"{name} is not in memory; load the model without offloading")
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        index = torch.linspace(0, len(flat) - 1, min(_VALUES, len(flat)), dtype=torch.float64)
        # Exact in both dtypes the same weights are commonly held in.
        parts.append(flat[index.long().to(flat.device)].to("cpu", torch.bfloat16))
    digest.update(torch.cat(parts).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def _settled(config: Any) -> Any:
    if isinstance(config, dict):
        return {
            str(k): _settled(v)
            for k, v in config.items()
            if str(k) not in _VOLATILE and "_implementation" not in str(k)
        }
    return [_settled(v) for v in config] if isinstance(config, list | tuple) else config
