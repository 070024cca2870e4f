"""`tokenprune demo`: a testbed model answers questions with all of its visual tokens, and with a few."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenprune.cli.options import JsonOption
from tokenprune.cli.shell import InputError, console, print_json, quiet_transformers
from tokenprune_kernels.machine import cpu_name

if TYPE_CHECKING:
    from rich.table import Table

    from tokenprune_testbed.questions import Sample

BUDGETS = (0.33, 0.22, 0.11)  # average retention over the decoder layers
# The default, the methods (entropyprune as released), the controls: those of the comparison that stands beside them.
METHODS = ("auto", "vflowopt", "entropyprune", "uniform", "random")
FORMS: dict[str, dict[str, Any]] = {"entropyprune": {"source": "query", "normalization": "none"}}


@dataclass(frozen=True)
class Setting:
    """How a testbed model is shown.

    Attributes:
        layer: of EntropyPrune's cut.
        scenes, quick_scenes: how many are asked about.
        repeats, quick_repeats: timed forwards of each variant.
    """

    layer: int
    scenes: int
    quick_scenes: int
    repeats: int
    quick_repeats: int


SETTINGS = {
    "smol": Setting(
        2,
        scenes=20,
        quick_scenes=10,
        repeats=2,
        quick_repeats=1,
    ),
    "small": Setting(
        1,
        scenes=160,
        quick_scenes=40,
        repeats=10,
        quick_repeats=5,
    ),
}
TIMED_PROMPTS = 4  # prompts in the batch that is timed
# What is shown is settled before anything is asked: the first question of each of these families.
SHOWN, QUICK_SHOWN = ("attribute", "position", "reading"), ("attribute", "position")


@dataclass
class Variant:
    """A method at a budget, and what was found.

    Attributes:
        method: its name.
        keep: average retention asked for; None for `none`.
        layer: the cut's; None: the method's own cuts.
        parameters: of the method.
        correct: by question.
        answers: by question.
        kept: {question: kept raster indices of each image}, of the questions shown.
        grid: frames, height, width of an image's tokens.
        tokens, tokens_average, tokens_after_cut: visual tokens per image: all, mean over layers, after the cut.
        kv_bytes: keys and values of one prompt with one image.
        seconds: of each timed prefill.
    """

    method: str
    keep: float | None
    layer: int | None = 0
    parameters: dict[str, Any] = field(default_factory=dict)
    correct: list[bool] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    kept: dict[int, list[list[int]]] = field(default_factory=dict)
    grid: tuple[int, int, int] = (1, 1, 1)
    tokens: float = 0.0
    tokens_average: float = 0.0
    tokens_after_cut: float = 0.0
    kv_bytes: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def arguments(self) -> dict[str, Any]:
        """For `tokenprune.pruned`."""
        budget = {} if self.keep is None else {"keep": self.keep}
        cut = {} if self.keep is None or self.layer is None else {"layer": self.layer}
        return {"method": self.method, **budget, **cut, **self.parameters}

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def prefill_ms(self) -> float:
        return statistics.median(self.seconds) * 1e3

    @property
    def title(self) -> str:
        return self.method if self.keep is None else f"{self.method}, {self.keep:.0%}"


def _help_scenes() -> str:
    counts = ", ".join(f"{s.scenes} or, quick, {s.quick_scenes} of {name}" for name, s in SETTINGS.items())
    return f"How many  [default: {counts}]"


class TestbedModel(str, Enum):
    """See `tokenprune_testbed`."""

    __test__ = False  # not for pytest

    smol = "smol"
    small = "small"


def demo(
    model: Annotated[
        TestbedModel | None,
        typer.Option(
            "--model",
            help="A pretrained decoder (smol), or the small model of the package  [default: smol where its decoder is "
            "installed]",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer scenes: about a minute on one CPU core.")
    ] = False,
    scenes: Annotated[
        int | None,
        typer.Option("--scenes", min=1, help=_help_scenes()),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the pictures.")] = Path(
        "tokenprune-demo"
    ),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the scenes and of the method 'random'.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Prune a testbed model on unseen scenes: answers, accuracy, time, memory, pictures."""
    _make_folder(out)
    with _progress(as_json) as say:
        say("loading the model")
        name, loaded, processor = _load(None if model is None else model.value)
        setting = SETTINGS[name]
        samples = make_questions(scenes or (setting.quick_scenes if quick else setting.scenes), seed)
        shown = _choose_shown(samples, QUICK_SHOWN if quick else SHOWN)
        variants = make_variants(setting, seed)
        for variant in variants:
            say(f"{len(samples)} questions: {variant.title}")
            ask(variant, loaded, processor, samples, shown)
        say("timing prefill")
        repeats = setting.quick_repeats if quick else setting.repeats
        timed = time_prefill(variants, loaded, processor, samples, repeats)
        pictures = _save_pictures(out, variants, samples, shown)
    document = _document(name, variants, samples, shown, timed, pictures, repeats)
    if as_json:
        print_json(document)
    else:
        _show(document, variants, samples, shown)


def _load(name: str | None) -> tuple[str, Any, Any]:
    """The model asked for, or smol, or small where smol's decoder is not installed; with its name."""
    from tokenprune_testbed.loading import load
    from tokenprune_testbed.smol import MissingDecoderError

    quiet_transformers()
    try:
        return name or "smol", *load(name or "smol")
    except MissingDecoderError as error:
        if name is not None:
            raise
        console(stderr=True).print(f"{error}; going on with the small model", markup=False)
        return "small", *load("small")


def make_questions(scenes: int, seed: int) -> list[Sample]:
    """Questions about `scenes` scenes of the test split, the question families in turn, up to two to a scene."""
    import numpy as np

    from tokenprune_testbed.questions import FAMILIES, Sample, ask, scene_for

    samples: list[Sample] = []
    for i in range(scenes):
        rng = np.random.default_rng([seed, i])
        family = FAMILIES[i % len(FAMILIES)]
        found: list[Any] = []
        while not found:  # a scene may have no unambiguous question of its family
            scene = scene_for(family, rng, "test")
            found = ask(scene, rng, family)
        images = [scene.image] if scene.previous is None else [scene.previous, scene.image]
        samples += [Sample(images, *found[j]) for j in rng.permutation(len(found))[:2]]
    return samples


def _choose_shown(samples: list[Sample], families: tuple[str, ...]) -> list[int]:
    first = {sample.family: i for i, sample in reversed(list(enumerate(samples)))}
    wanted = [first[family] for family in families if family in first]
    return wanted or [0]


def make_variants(setting: Setting, seed: int) -> list[Variant]:
    """The unpruned model, then every method at every budget."""
    variants = [Variant("none", None)]
    parameters = {**FORMS, "random": {"seed": seed}}
    # Controls lose least before the LLM; auto and vflowopt have cuts of their own.
    layers = {"entropyprune": setting.layer, "uniform": 0, "random": 0}
    for method in METHODS:
        given = parameters.get(method, {})
        variants += [Variant(method, budget, layers.get(method), given) for budget in BUDGETS]
    return variants


def ask(variant: Variant, model: Any, processor: Any, samples: list[Sample], shown: list[int]) -> None:
    """Every question once, by the same `evaluate` that the testbed's tables use."""
    import tokenprune
    from tokenprune_testbed import evaluate

    tokens: list[tuple[float, float, float]] = []

    def note(indices: list[int]) -> None:
        report = tokenprune.report(model)
        (variant.grid,) = report.images[0].grids
        tokens.extend((i.tokens, i.average, i.kept[-1] if i.kept else i.tokens) for i in report.images)
        for row, index in enumerate(indices):
            if index in shown and report.pruned:
                variant.kept[index] = report.keep_lists[-1][row]

    with tokenprune.pruned(model, **variant.arguments):
        result = evaluate(model, processor, samples, after_generate=note)
    variant.correct, variant.answers = result.correct, result.answers
    variant.tokens, variant.tokens_average, variant.tokens_after_cut = (
        sum(column) / len(tokens) for column in zip(*tokens, strict=True)
    )


def time_prefill(
    variants: list[Variant], model: Any, processor: Any, samples: list[Sample], repeats: int
) -> int:
    """Time one forward over a batch of prompts with one image each, vision tower and cache included.

    The variants take turns, so that a slower minute of the machine hits all of them; the first round warms up.

    Returns:
        How many prompts the batch had.
    """
    import torch

    import tokenprune
    from tokenprune_testbed.language import make_inputs

    chosen = [s for s in samples if len(s.images) == 1][:TIMED_PROMPTS]
    inputs = make_inputs(processor, chosen)
    for turn in range(repeats + 1):
        for variant in variants:
            with tokenprune.pruned(model, **variant.arguments), torch.inference_mode():
                start = time.perf_counter()
                model(**inputs, use_cache=True, logits_to_keep=1)
                seconds = time.perf_counter() - start
                if turn:
                    variant.seconds.append(seconds)
                else:
                    variant.kv_bytes = tokenprune.report(model).kv_used // len(chosen)
    return len(chosen)


# -- pictures -----------------------------------------------------------------------------------------------------


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out: cannot make the folder {str(out)!r}: {error.strerror}; name another"
        ) from error


def _save_pictures(out: Path, variants: list[Variant], samples: list[Sample], shown: list[int]) -> list[str]:
    paths = []
    for index in shown:
        path = out / f"{samples[index].family}.png"
        _sheet(variants, samples[index], index).save(path)
        paths.append(str(path))
    return paths


def _sheet(variants: list[Variant], sample: Sample, index: int) -> Any:
    """One question: a row per method, a column per budget; the picture as it is on the left."""
    from PIL import Image

    from tokenprune.draw import add_caption, draw_kept, tile

    frames = [Image.fromarray(image) for image in sample.images]
    scale = 3 if len(frames) == 1 else 2
    total = math.prod(variants[0].grid)

    def panel(variant: Variant) -> Any:
        lists = variant.kept.get(index) or [list(range(total))] * len(frames)
        drawn = [draw_kept(f, variant.grid, kept, scale=scale) for f, kept in zip(frames, lists, strict=True)]
        mark = "" if variant.correct[index] else "  (wrong)"
        caption = f"{variant.title}, {len(lists[0])} of {total}: {variant.answers[index] or '-'}{mark}"
        return add_caption(tile(drawn, len(drawn), gap=2), caption, lines=2)

    whole = panel(variants[0])
    blank = Image.new("RGB", whole.size, "white")
    panels = []
    for i, method in enumerate(METHODS):
        panels += [whole if i == 0 else blank, *(panel(v) for v in variants if v.method == method)]
    title = f"{sample.question}   true answer: {sample.answer}   (average retention, tokens after the cut: answer)"
    return tile(panels, columns=1 + len(BUDGETS), title=title)


# -- output -------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(silent: bool) -> Iterator[Any]:
    """A line that says what is going on, on stderr and only in a terminal."""
    err = console(stderr=True)
    if silent or not err.is_terminal:
        yield lambda text: None
        return
    with err.status("") as status:
        yield status.update


def _document(
    name: str,
    variants: list[Variant],
    samples: list[Sample],
    shown: list[int],
    timed: int,
    pictures: list[str],
    repeats: int,
) -> dict[str, Any]:
    """Everything the demo found, ready for JSON."""
    import torch

    from tokenprune_testbed import compared
    from tokenprune_testbed.evaluate import wilson_interval

    rows = []
    for v in variants:
        low, high = wilson_interval(sum(v.correct), len(v.correct))
        rows.append(
            {
                "method": v.method,
                "keep": v.keep,
                "correct": sum(v.correct),
                "accuracy": v.accuracy,
                "low": low,
                "high": high,
                "prefill_ms": v.prefill_ms,
                "tokens": v.tokens,
                "tokens_average": v.tokens_average,
                "tokens_after_cut": v.tokens_after_cut,
                "kv_bytes": v.kv_bytes,
            }
        )
    machine: dict[str, Any] = {
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    return {
        "questions": len(samples),
        "scenes": len({id(s.images) for s in samples}),
        "model": name,
        "layer": SETTINGS[name].layer,
        "parameters": FORMS,
        "rows": rows,
        "compared": [
            {"method": method, "keep": keep, **asdict(found)}
            for (method, keep), found in compared.read(name).items()
            if keep is None or keep in BUDGETS
        ],
        "shown": [_shown(variants, samples[i], i) for i in shown],
        "pictures": pictures,
        "machine": machine,
        "measured": (
            f"Measured on {machine['cpu']} with torch {machine['torch']}, {machine['threads']} "
            f"thread{'s' * (machine['threads'] > 1)}, float32: {len(samples)} held-out questions to the testbed's "
            f"{name!r}, each asked once per cell; prefill is the median of {repeats} forwards over {timed} prompts, "
            f"vision tower and scoring included."
        ),
    }


def _shown(variants: list[Variant], sample: Sample, index: int) -> dict[str, Any]:
    answers = [
        {"method": v.method, "keep": v.keep, "answer": v.answers[index], "correct": v.correct[index]}
        for v in variants
    ]
    return {"family": sample.family, "question": sample.question, "answer": sample.answer, "answers": answers}


def _show(document: dict[str, Any], variants: list[Variant], samples: list[Sample], shown: list[int]) -> None:
    out = console()
    for index in shown:
        sample = samples[index]
        table = _table(f"{sample.question}  (true answer: {sample.answer})", justify="left")
        _add_methods(table, variants, lambda v: _answer_cell(v, index))  # noqa: B023  # called at once
        out.print(table)
    _show_compared(document["compared"])
    half = max(row["high"] - row["low"] for row in document["rows"]) / 2
    table = _table(
        f"{document['questions']} questions about {document['scenes']} unseen scenes, asked just now",
        justify="right",
    )
    _add_methods(table, variants, lambda v: f"{v.accuracy:.0%}", f"right (± {100 * half:.0f}): ")
    table.add_section()
    _add_methods(table, variants, lambda v: f"{v.prefill_ms:.0f}", "prefill ms: ")
    table.add_section()
    _add_costs(table, variants)
    out.print(table)
    out.print(
        f"{document['questions']} questions are good to about ± {100 * half:.0f} points (95 %), too few to tell "
        f"methods apart: the table before does. auto is wrap(model, keep=...): the profile known for this model; "
        f"vflowopt has its defaults, entropyprune is as released and cut before decoder layer {document['layer']}, the "
        f"controls uniform and random before the LLM. Columns are the average over layers, as papers count."
    )
    out.print(f"Kept tokens over the image: {', '.join(document['pictures'])}")
    out.print(document["measured"], markup=False)


def _show_compared(rows: list[dict[str, Any]]) -> None:
    """The committed comparison, which asked enough to tell methods apart; nothing where there is none."""
    if not rows:
        return
    found = {(row["method"], row["keep"]): row for row in rows}
    one, asked = rows[0], sorted({int(row["questions"]) for row in rows})
    many = " or ".join(f"{count:,}" for count in asked)
    table = _table(
        f"accuracy in % of {many} held-out questions, committed in eval/results ({one['cpu']}, "
        f"{one['date']})",
        justify="right",
    )

    def cell(method: str, keep: float | None) -> str:
        own = found.get((method, keep))
        return "" if own is None else f"{100 * own['accuracy']:.1f} ± {50 * (own['high'] - own['low']):.1f}"

    for method in ("none", *METHODS):
        cells = [cell(method, None)] if method == "none" else ["", *(cell(method, keep) for keep in BUDGETS)]
        table.add_row(method, *cells)
    console().print(table)


def _table(title: str, justify: Any) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("")
    for header in ("all tokens", *(f"{budget:.0%}" for budget in BUDGETS)):
        table.add_column(header, justify=justify, min_width=10)
    return table


def _add_methods(table: Table, variants: list[Variant], cell: Any, before: str = "") -> None:
    for method in ("none", *METHODS):
        cells = [cell(v) for v in variants if v.method == method]
        table.add_row(before + method, *(cells if method == "none" else ["", *cells]))


def _add_costs(table: Table, variants: list[Variant]) -> None:
    """What depends on the budget alone: the methods of a column keep the same number of tokens."""
    columns = [v for v in variants if v.method in ("none", METHODS[0])]
    table.add_row("visual tokens, average", *(f"{v.tokens_average:.1f}" for v in columns))
    table.add_row("visual tokens, after the cut", *(f"{v.tokens_after_cut:.0f}" for v in columns))
    table.add_row("KV cache per prompt, KiB", *(f"{v.kv_bytes / 1024:.0f}" for v in columns))


def _answer_cell(variant: Variant, index: int) -> str:
    from rich.markup import escape

    answer = escape(variant.answers[index]) or "-"
    return f"[green]{answer}[/green]" if variant.correct[index] else f"[red]{answer} ✗[/red]"
