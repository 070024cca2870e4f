"""What a search found, for people: a page of Markdown with one figure."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from tokenprune import tables
from tokenprune.analysis.plots import new_figure, save_figure
from tokenprune.errors import ConfigError
from tokenprune.tune.inspect import spread
from tokenprune.tune.search import Found

FIGURE, PAGE = "report.png", "report.md"


def write_report(found: Found, folder: Path, names: Sequence[str] = ()) -> Path:
    """Write report.md and report.png: convergence, importances, cost, and drift sample by sample.

    Args:
        found: by `search`.
        folder: made where it is missing.
        names: of the samples, their files for example, to name the worst by.

    Returns:
        Of the page.

    Raises:
        ConfigError: matplotlib is missing, or the folder cannot be written to.
    """
    importances = _importances(found.study)
    figure = new_figure(4, columns=2)
    convergence, important, cost, samples = figure.axes
    _draw_convergence(convergence, found)
    important.barh(list(importances)[::-1], list(importances.values())[::-1])
    important.set(title="importance of parameters", xlabel="share")
    important.tick_params(axis="y", labelsize=7)
    _draw_cost(cost, found)
    _draw_samples(samples, found)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_figure(figure, folder / FIGURE)
        (folder / PAGE).write_text(_page(found, importances, names), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the report to {str(folder)!r}: {error.strerror or error}") from None
    return folder / PAGE


def _importances(study: Any) -> dict[str, float]:
    """By parameter, the largest first; nothing where there are too few trials to tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = optuna.importance.get_param_importances(
                study,
                evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
                target=lambda trial: trial.values[0],
            )
        except (ValueError, RuntimeError):
            return {}
    return {name: float(share) for name, share in found.items()}


def _draw_convergence(axes: Any, found: Found) -> None:
    whole = [one.value if len(one.drift) == found.samples else np.inf for one in found.tried]
    passes = found.samples + np.cumsum([len(one.drift) for one in found.tried])
    axes.plot(passes, [one.value for one in found.tried], ".", markersize=3, alpha=0.4, label="trial")
    axes.step(passes, np.minimum.accumulate(whole), where="post", label="best so far")
    axes.set(title="convergence", xlabel="prefills of a prompt", ylabel="drift", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=7)


def _draw_cost(axes: Any, found: Found) -> None:
    costs, label = _costs(found)
    axes.plot(costs, [one.value for one in found.tried], ".", markersize=3, alpha=0.4, label="trial")
    by_number = dict(zip((one.number for one in found.tried), costs, strict=True))
    front = sorted((by_number[one.number], one.value) for one in found.front)
    axes.plot(
        *zip(*front, strict=True), "o-", markersize=4, label="Pareto front" if len(front) > 1 else "best"
    )
    axes.set(title="drift against cost", xlabel=label, ylabel="drift", yscale="log")
    axes.legend(fontsize=7)


def _costs(found: Found) -> tuple[list[float], str]:
    searched = found.study.user_attrs["tokenprune"]["cost"]
    if searched is None:
        return [one.flops / 1e9 for one in found.tried], "GFLOPs of a prompt's prefill"
    label = "FLOPs, pruned / unpruned" if searched == "flops" else "seconds of a prompt's prefill"
    return [one.cost or 0.0 for one in found.tried], label


def _draw_samples(axes: Any, found: Found) -> None:
    best = found.front[0].drift
    order = np.argsort(best)
    for name, drift in {"found": best, **found.controls}.items():
        axes.plot(np.asarray(drift)[order], ".-", markersize=3, linewidth=0.8, label=name)
    axes.set(title="drift sample by sample", xlabel="sample, by drift", ylabel="drift", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=7)


def _page(found: Found, importances: dict[str, float], names: Sequence[str]) -> str:
    asked = found.study.user_attrs["tokenprune"]
    profile = found.profiles[0]
    assert profile.measured is not None
    searched = {"found": found.front[0].drift, **found.controls}
    drifts = {f"{name}, searched on": drift for name, drift in searched.items()}
    drifts |= {f"{name}, held out": drift for name, drift in found.held_out.items()}
    lines = [
        f"# Search of {profile.made.date}: {asked['metric']} drift at {asked['keep']}",
        "",
        f"Model {asked['model']} ({profile.family}); {found.samples} samples; sampler {profile.made.sampler}, seed "
        f"{profile.made.seed}; {len(found.tried)} trials, {found.passes} prefills of a prompt; on "
        f"{profile.made.hardware} with torch {profile.made.versions['torch']} and transformers "
        f"{profile.made.versions['transformers']}.",
        "",
        *(f"**Caution.** {text[0].upper()}{text[1:]}.\n" for text in found.cautions()),
        f"![convergence, importances, cost, samples]({FIGURE})",
        "",
        tables.markdown(
            ["", "drift, mean", "median", "95 %", "worst"],
            [[name, *(f"{value:.4g}" for value in spread(drift).values())] for name, drift in drifts.items()],
        ),
        "",
        tables.markdown(
            ["budget", "setting", "drift", "GFLOPs of a prompt"],
            [
                [f"{p.keep:.4g}", _setting(p), f"{one.value:.4g}", f"{one.flops / 1e9:.3g}"]
                for p, one in zip(found.profiles, found.front, strict=True)
            ],
            {1: "---"},
        ),
        "",
    ]
    if importances:
        shares = [[name, f"{share:.2f}"] for name, share in importances.items()]
        lines += [tables.markdown(["parameter", "importance (PED-ANOVA)"], shares), ""]
    best = found.front[0].drift
    worst = [[_called(int(i), names), f"{best[i]:.4g}"] for i in np.argsort(best)[::-1][:5]]
    lines.append(tables.markdown(["samples with the largest drift", "drift"], worst))
    return "\n".join(lines) + "\n"


def _called(number: int, names: Sequence[str]) -> str:
    """A sample by its file; a bar or a newline in a name would end the table's cell."""
    own = names[number] if number < len(names) else ""
    plain = "".join(c if c.isprintable() and c not in "|`<" else "?" for c in own)
    return f"`{plain}`" if plain else f"number {number}"


def _setting(profile: Any) -> str:
    cuts = ", ".join(
        f"{c.layer}: {'rest' if c.keep is None else format(c.keep, '.4g')}" for c in profile.cuts
    )
    if profile.stages:
        return "; ".join(
            f"{own.layer}: {own.method} {'rest' if own.keep is None else format(own.keep, '.4g')}"
            for own in profile.stages
        )
    own = {
        name: format(value, ".4g") if isinstance(value, float) else value
        for name, value in profile.parameters.items()
    }
    return " ".join(
        [profile.method, *(f"{n}={v}" for n, v in own.items()), f"cuts {cuts}" if cuts else ""]
    ).strip()
