"""`tokenprune demo`: a small comparison on a testbed's model, shown: answers, accuracy, time, memory and pictures."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenprune.cli.options import JsonOption
from tokenprune.cli.shell import InputError, console, print_json, progress, quiet_transformers
from tokenprune_kernels.machine import cpu_name

if TYPE_CHECKING:
    from PIL import Image
    from rich.table import Table

    from tokenprune.compare.run import Comparison, Progress
    from tokenprune.compare.summary import Summary

BUDGETS = (0.33, 0.22, 0.11)  # average retention over the decoder layers
CONTROLS = ("uniform", "random")
TIMED_PROMPTS = 4  # prompts in the batch that is timed
# What is shown is settled before anything is asked: the first question of each of these families.
SHOWN, QUICK_SHOWN = ("attribute", "position", "reading"), ("attribute", "position")


@dataclass(frozen=True)
class Setting:
    """How a testbed's model is shown.

    Attributes:
        layer: of EntropyPrune's cut.
        questions, quick_questions: how many are asked.
        rounds, quick_rounds: of timing.
    """

    layer: int
    questions: int
    quick_questions: int
    rounds: int
    quick_rounds: int

    @property
    def methods(self) -> tuple[str, ...]:
        """The default, and the methods as they are; controls stand beside them."""
        return "auto", "vflowopt", f"entropyprune,layer={self.layer}"


SETTINGS = {
    "smol": Setting(2, questions=40, quick_questions=20, rounds=2, quick_rounds=1),
    "small": Setting(1, questions=280, quick_questions=70, rounds=10, quick_rounds=5),
}
_DEFAULTS = ", ".join(f"{s.questions} or, quick, {s.quick_questions} to {n}" for n, s in SETTINGS.items())


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
        bool, typer.Option("--quick", help="Fewer questions: about a minute on one CPU core.")
    ] = False,
    questions: Annotated[
        int | None, typer.Option("--questions", min=1, help=f"How many  [default: {_DEFAULTS}]")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the pictures.")] = Path(
        "tokenprune-demo"
    ),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the questions drawn.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Prune a testbed model on unseen scenes: answers, accuracy, time, memory, pictures."""
    _make_folder(out)
    with progress("loading the model", as_json) as show:
        name, loaded, processor = _load(None if model is None else model.value)
        setting = SETTINGS[name]
        rounds = setting.quick_rounds if quick else setting.rounds
        count = questions or (setting.quick_questions if quick else setting.questions)
        found = _compare(name, loaded, processor, count, seed, show)
        show("timing", 0, 0)
        times = _time(found, rounds)
    summary = found.summary
    families = QUICK_SHOWN if quick else SHOWN
    first = {question.family: i for i, question in reversed(list(enumerate(summary.questions)))}
    shown = [first[family] for family in families if family in first] or [0]
    pictures = []
    for number in shown:
        path = out / f"{summary.questions[number].family}.png"
        _sheet(found, number).save(path)
        pictures.append(str(path))
    document = _document(name, summary, shown, times, pictures, rounds)
    if as_json:
        print_json(document)
    else:
        _show(document, summary, shown)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out: cannot make the folder {str(out)!r}: {error.strerror}; name another"
        ) from error


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


def _compare(
    name: str, model: Any, processor: Any, count: int, seed: int, show: Callable[[str, int, int], None]
) -> Comparison:
    from tokenprune.compare.questions import load_questions
    from tokenprune.compare.run import compare
    from tokenprune_testbed.evaluate import MAX_NEW_TOKENS

    def told(now: Progress) -> None:
        show(now.what, now.done, now.total)

    with tempfile.TemporaryDirectory() as folder:
        return compare(
            model,
            processor,
            load_questions(f"testbed:{name}", count, seed=seed),
            Path(folder),
            told=told,
            methods=SETTINGS[name].methods,
            budgets=BUDGETS,
            controls=CONTROLS,
            batch_size=50,
            max_new_tokens=MAX_NEW_TOKENS,
            time_batches=(),
        )


def _time(found: Comparison, rounds: int) -> dict[str, float]:
    """Milliseconds to the first token of a batch, by arm."""
    from tokenprune.compare.speed import measure_times

    taken = measure_times(found.asker, found.arms, TIMED_PROMPTS, "first token", rounds, 1)
    return {row["arm"]: row["ms"] for row in taken}


def _sheet(found: Comparison, number: int) -> Image.Image:
    """One question: a row per method, a column per budget; the picture as it is on the left."""
    from PIL import Image

    from tokenprune.compare.pictures import kept_of_question
    from tokenprune.draw import add_caption, tile

    summary = found.summary
    panels: dict[str, Image.Image] = {}
    for arm in found.arms:
        mark = "" if summary.right(arm.key)[number] else "  (wrong)"
        budget = "" if arm.keep is None else f", {arm.keep:.0%}"
        caption = f"{_title(arm.name)}{budget}: {summary.answers[arm.key][number] or '-'}{mark}"
        panels[arm.key] = add_caption(kept_of_question(found.asker, arm, number), caption, lines=2)
    whole = panels["none"]
    blank = Image.new("RGB", whole.size, "white")
    cells = []
    for i, name in enumerate(summary.names):
        own = [panels[arm.key] for arm in found.arms if arm.name == name]
        cells += [blank if i else whole, *own]
    question = summary.questions[number]
    title = f"{question.text}   true answer: {question.answers[0]}   (average retention: answer)"
    return tile(cells, columns=1 + len(BUDGETS), title=title)


def _title(name: str) -> str:
    """A method's name; the layer it is cut at is said below the tables."""
    return name.partition(",")[0]


# -- output -------------------------------------------------------------------------------------------------------


def _document(
    name: str,
    summary: Summary,
    shown: Sequence[int],
    times: dict[str, float],
    pictures: list[str],
    rounds: int,
) -> dict[str, Any]:
    """Everything the demo found, ready for JSON."""
    import torch

    from tokenprune_testbed import compared

    machine = {"cpu": cpu_name(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    rows, keys = [], [*summary.answers]
    for row, key in zip(summary.rows, keys, strict=True):
        assert row.accuracy is not None
        own = {"method": _title(row.name), "keep": row.keep, "correct": int(summary.right(key).sum())}
        own |= {"accuracy": row.accuracy.value, "low": row.accuracy.low, "high": row.accuracy.high}
        rows.append({**own, "first_token_ms": times[key], "kept": row.kept, "kv_bytes": row.kv})
    asked = len(summary.questions)
    return {
        "questions": asked,
        "model": name,
        "layer": SETTINGS[name].layer,
        "rows": rows,
        "compared": [
            {"method": method, "keep": keep, **asdict(found)}
            for (method, keep), found in compared.read(name).items()
            if keep is None or keep in BUDGETS
        ],
        "shown": [_shown(summary, number) for number in shown],
        "pictures": pictures,
        "machine": machine,
        "measured": (
            f"Measured on {machine['cpu']} with torch {machine['torch']}, {machine['threads']} "
            f"thread{'s' * (torch.get_num_threads() > 1)}, float32: {asked} held-out questions to the testbed's "
            f"{name!r}, each asked once per cell; time to the first token is the median of {rounds} rounds with "
            f"{TIMED_PROMPTS} prompts, vision tower and scoring included."
        ),
    }


def _shown(summary: Summary, number: int) -> dict[str, Any]:
    question = summary.questions[number]
    answers = [
        {
            "method": _title(row.name),
            "keep": row.keep,
            "answer": said[number],
            "correct": bool(summary.right(key)[number]),
        }
        for row, (key, said) in zip(summary.rows, summary.answers.items(), strict=True)
    ]
    return {
        "family": question.family,
        "question": question.text,
        "answer": question.answers[0],
        "answers": answers,
    }


def _show(document: dict[str, Any], summary: Summary, shown: Sequence[int]) -> None:
    out = console()
    for own in document["shown"]:
        table = _table(f"{own['question']}  (true answer: {own['answer']})", justify="left")
        _add_methods(table, own["answers"], _answer_cell)
        out.print(table)
    compared = document["compared"]
    asked = sorted({row["questions"] for row in compared})
    table = _table(
        f"accuracy in % of {' or '.join(f'{count:,}' for count in asked)} held-out questions, committed in "
        f"eval/results ({compared[0]['cpu']}, {compared[0]['date']})"
    )
    _add_methods(
        table, compared, lambda row: f"{100 * row['accuracy']:.1f} ± {50 * (row['high'] - row['low']):.1f}"
    )
    out.print(table)
    rows = document["rows"]
    half = max(row["high"] - row["low"] for row in rows) / 2
    table = _table(f"{document['questions']} questions about unseen scenes, asked just now")
    _add_methods(table, rows, lambda row: f"{row['accuracy']:.0%}", f"right (± {100 * half:.0f}): ")
    table.add_section()
    _add_methods(table, rows, lambda row: f"{row['first_token_ms']:.0f}", "first token, ms: ")
    table.add_section()
    # What depends on the budget alone: the methods of a column keep the same number of tokens.
    columns = [rows[0], *(row for row in rows if row["method"] == rows[1]["method"])]
    table.add_row("visual tokens, average", *(f"{row['kept']:.1%}" for row in columns))
    table.add_row("KV cache per prompt, KiB", *(f"{row['kv_bytes'] / 1024:.0f}" for row in columns))
    out.print(table)
    out.print(
        f"{document['questions']} questions are good to about ± {100 * half:.0f} points (95 %), too few to tell "
        f"methods apart: the table before does. auto is wrap(model, keep=...): the profile known for this model; "
        f"vflowopt has its defaults, entropyprune is as released and cut before decoder layer {document['layer']}, the "
        f"controls uniform and random before the LLM. Columns are the average over layers, as papers count. "
        f"'tokenprune compare' asks the same of your own model."
    )
    out.print(f"Kept tokens over the image: {', '.join(document['pictures'])}")
    out.print(document["measured"], markup=False)


def _table(title: str, justify: Any = "right") -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("")
    for header in ("all tokens", *(f"{budget:.0%}" for budget in BUDGETS)):
        table.add_column(header, justify=justify, min_width=10)
    return table


def _add_methods(table: Table, rows: Sequence[dict[str, Any]], cell: Any, before: str = "") -> None:
    """A line per method: the unpruned model under "all tokens", the others under their budgets."""
    by_place = {(row["method"], row["keep"]): cell(row) for row in rows}
    order = ("none", "auto", *dict.fromkeys(row["method"] for row in rows))
    for method in dict.fromkeys(order):
        table.add_row(before + method, *(by_place.get((method, keep), "") for keep in (None, *BUDGETS)))


def _answer_cell(row: dict[str, Any]) -> str:
    from rich.markup import escape

    answer = escape(row["answer"]) or "-"
    return f"[green]{answer}[/green]" if row["correct"] else f"[red]{answer} ✗[/red]"
