"""What is compared: methods at budgets, and the controls that look at nothing beside every one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenprune.arguments import AUTO, Arguments
from tokenprune.errors import ConfigError
from tokenprune.fingerprint import fingerprint
from tokenprune.methods import find_all, make_method
from tokenprune.profiles.known import known_profile

NONE = "none"
RANDOM, UNIFORM, DEEP, DOWNSAMPLE = "random", "uniform", "random deep", "downsample"
# Before the LLM random tokens and an even grid lose least, on what was measured (docs/results.md).
CONTROLS = (UNIFORM, RANDOM, DEEP, DOWNSAMPLE)
METHODS = (AUTO, "vflowopt", "entropyprune", "fastv")
ALL = "all"  # that there are, but the controls


@dataclass(frozen=True)
class Arm:
    """One way of answering.

    Attributes:
        name: what tables call it.
        keep: average retention; None: whole.
        arguments: of `wrap`.
        shrinks: whether the picture is made smaller instead.
    """

    name: str
    keep: float | None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    shrinks: bool = False

    @property
    def key(self) -> str:
        return self.name if self.keep is None else f"{self.name} @ {self.keep:g}"

    @property
    def is_control(self) -> bool:
        return self.name in CONTROLS or self.name == NONE


def make_arms(
    model: Any,
    methods: Sequence[str],
    budgets: Sequence[float],
    num_layers: int,
    controls: Sequence[str] = CONTROLS,
) -> list[Arm]:
    """The unpruned model, then at each budget the methods and the controls.

    Args:
        model: stock.
        methods: "NAME" or "NAME,parameter=value,...", as on the command line; "all" is all there are. "auto" is left
            out where no profile is known for the model: it would be another method under that name.
        budgets: average retentions, fractions.
        num_layers: of the decoder.
        controls: which of `CONTROLS`.

    Raises:
        ConfigError: see `read_methods` and `check_budgets`.
    """
    read = read_methods(methods)
    check_budgets(budgets)
    arms = [Arm(NONE, None, {"method": NONE})]
    for keep in sorted(budgets, reverse=True):
        for name, arguments in read.items():
            named = arguments["method"] != AUTO or "stages" in arguments
            if named or known_profile(fingerprint(model), keep) is not None:
                arms.append(Arm(name, keep, {**arguments, "keep": keep}))
        arms += [arm for arm in _controls(keep, num_layers) if arm.name in controls]
    return arms


def read_methods(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Arguments of `wrap` for methods written as "NAME,parameter=value,...".

    Raises:
        ConfigError: no such method or parameter, a control, or one given twice.
    """
    named = [own for text in texts for own in (_every() if text == ALL else [text])]
    _check_once("method", named)
    return {text: _read(text) for text in named}


def _every() -> list[str]:
    """Every method by its name, "auto" first."""
    return [AUTO, *sorted(name for name in find_all() if name not in (*CONTROLS, NONE))]


def check_budgets(budgets: Sequence[float]) -> None:
    """Refuse what is no average retention.

    Raises:
        ConfigError: it is no fraction, or given twice.
    """
    for budget in budgets:
        if isinstance(budget, bool) or not isinstance(budget, float) or not 0 < budget < 1:
            raise ConfigError(f"a budget is a fraction between 0 and 1 (0.25 or 25%), not {budget!r}")
    _check_once("budget", budgets)


def _check_once(what: str, given: Sequence[Any]) -> None:
    if len(set(given)) != len(given):
        raise ConfigError(f"a {what} is given twice: {', '.join(map(str, given))}")


def _read(text: str) -> dict[str, Any]:
    name, *pairs = text.split(",")
    if (name in CONTROLS and not pairs) or name in (DEEP, DOWNSAMPLE, NONE):  # another seed is another arm
        raise ConfigError(f"{name!r} is among the controls, which are always there; leave it out")
    texts = dict(pair.partition("=")[::2] for pair in pairs)
    if "keep" in texts:
        raise ConfigError(f"{text!r}: the budgets say how much is kept; leave keep out")
    asked = Arguments.from_text({"method": name, **texts})
    if asked.method != AUTO:
        make_method(asked.method, dict(asked.parameters))
    return {**asked.given(), "method": asked.method}


def _controls(keep: float, num_layers: int) -> list[Arm]:
    deep = max(1, int(keep * num_layers / 2))  # half of the budget is spent on the layers before the cut
    return [
        Arm(UNIFORM, keep, {"method": "uniform", "layer": 0, "keep": keep}),
        Arm(RANDOM, keep, {"method": "random", "layer": 0, "keep": keep}),
        Arm(DEEP, keep, {"method": "random", "layer": deep, "keep": keep}),
        Arm(DOWNSAMPLE, keep, {"method": NONE}, shrinks=True),
    ]
