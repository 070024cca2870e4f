"""The profile of a setting that was found, with how it was made and what was measured."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from tokenprune.api import family_of
from tokenprune.arguments import check_stages
from tokenprune.fingerprint import fingerprint
from tokenprune.models import stock_model
from tokenprune.profiles.profile import STAGES, Made, Measured, Profile, ProfileCut, ProfileStage


def make_profile(
    model: Any,
    arguments: Mapping[str, Any],
    drift: NDArray[np.float64],
    *,
    metric: str,
    controls: Mapping[str, float],
    made: Mapping[str, Any],
    flops: float | None = None,
    seconds: float | None = None,
) -> Profile:
    """A sealed profile.

    Args:
        model: it is for.
        arguments: of `wrap`, the method and the budget (an average) among them.
        drift: of each sample.
        metric: what drift is.
        controls: mean drift of other methods at the same budget and samples.
        made: fields of `Made`; versions, hardware and date are added.
        flops, seconds: of a prompt's prefill, mean.
    """
    parameters = dict(arguments)
    method, keep = parameters.pop("method"), parameters.pop("keep")
    stages = check_stages(parameters.pop("stages")) if "stages" in parameters else ()
    layer, cuts = parameters.pop("layer", None), parameters.pop("cuts", None)
    cuts = [(layer, None)] if cuts is None and layer is not None else cuts or []
    return Profile(
        method=STAGES if stages else method,
        parameters=parameters,
        stages=tuple(
            ProfileStage(
                layer=own.layer, keep=own.keep, method=str(own.method), parameters=dict(own.parameters)
            )
            for own in stages
        ),
        cuts=tuple(ProfileCut(layer=layer, keep=own) for layer, own in cuts),
        keep=keep,
        model=fingerprint(model),
        family=family_of(model).name,
        name=_name_of(model),
        made=Made(
            versions={"torch": torch.__version__, "transformers": transformers.__version__},
            hardware=platform.machine(),
            date=date.today().isoformat(),
            **made,
        ),
        measured=Measured(
            metric=metric,
            drift=float(drift.mean()),
            quantiles=_quantiles(drift),
            controls=dict(controls),
            flops=flops,
            seconds=seconds,
        ),
    ).sealed()


def _name_of(model: Any) -> str:
    """Of the checkpoint, as the hub or its folder has it; no path of this machine."""
    given = str(getattr(stock_model(model).config, "_name_or_path", "") or "")
    own = Path(given).name if Path(given).exists() else given
    return "".join(c for c in own if " " <= c <= "~")[:400]


def _quantiles(drift: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    return {str(q): float(np.percentile(drift, q)) for q in (5, 50, 95)}
