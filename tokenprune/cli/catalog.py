"""`tokenprune methods` and `tokenprune models`: what there is to choose from."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenprune.cli.options import JsonOption
from tokenprune.cli.shell import InputError, console, print_json

if TYPE_CHECKING:
    from tokenprune.methods import Method
    from tokenprune.models import Family


def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method in full.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """The pruning methods, or one of them in full."""
    from tokenprune.methods import find_all, find_method

    known = dict(find_all())
    if name is not None and ":" in name:
        own = find_method(name)
        assert own is not None  # or it raises
        known[name] = own
    if name is not None and name not in known:
        raise InputError(f"unknown method {name!r}; choose one of {', '.join(sorted(known))}")
    chosen = known if name is None else {name: known[name]}
    facts = [_method_facts(cls) for _, cls in sorted(chosen.items())]
    if as_json:
        print_json(facts if name is None else facts[0])
    elif name is None:
        _print_methods(facts)
    else:
        _print_method(facts[0])


def models(as_json: JsonOption = False) -> None:
    """The model families that can be pruned."""
    from tokenprune.models import FAMILIES

    facts = [_family_facts(family) for family in FAMILIES.values()]
    if as_json:
        print_json(facts)
        return
    from rich.table import Table

    table = Table(title="model families", title_justify="left")
    for header in ("family", "model_type", "checkpoints", "layer", "about", "what works"):
        table.add_column(header, overflow="fold")
    for one in facts:
        layer = "L / 16" if one["published_layer"] is None else str(one["published_layer"])
        table.add_row(
            one["name"],
            "\n".join(one["model_types"]),
            "\n".join(one["examples"]),
            layer,
            one["about"],
            "\n".join(one["works"]),
        )
    console().print(table)
    console().print(
        "layer: the decoder layer a cut enters unless --layer says otherwise (L: the number of layers)."
    )


def _method_facts(cls: type[Method]) -> dict[str, Any]:
    return {
        "name": cls.name,
        "paper": cls.paper or None,
        "min_layer": cls.min_layer,
        "reads_text": cls().reads(),
        "sees": _sees(cls),
        "parameters": [_parameter_facts(cls, f) for f in dataclasses.fields(cls)],
        "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
        "description": inspect.getdoc(cls) or "",
    }


def _sees(cls: type[Method]) -> list[str]:
    """What a method with its default parameters is shown of an image, and may say."""
    needs = cls().needs()
    layer = "the layer before the cut"
    told = [f"{state} states of its tokens" for state in needs.states]
    told += [f"{state} states of the prompt's text" for state in needs.prompt]
    told += [
        text
        for wanted, text in (
            (needs.last_row, f"the attention of the prompt's last token in {layer}"),
            (needs.features, "the projector's features"),
            (needs.words, "the text's word embeddings"),
            (needs.vision is not None, "attention of the vision tower"),
            (needs.pixels is not None, "8-bit pixels"),
            (needs.digest, "a seed made from pixels and prompt"),
            (needs.bias, "says: biases on attention"),
            (needs.counts, "says: how many tokens an image keeps"),
        )
        if wanted
    ]
    return [*told, "where its tokens are"]


def _parameter_facts(cls: type[Method], parameter: dataclasses.Field[Any]) -> dict[str, Any]:
    # A method's file names the `Choice` of a parameter like the parameter, in capitals.
    choice = getattr(sys.modules[cls.__module__], parameter.name.upper(), None)
    return {
        "name": parameter.name,
        "default": None if parameter.default is dataclasses.MISSING else parameter.default,
        "choices": list(choice.values) if choice is not None else None,
    }


def _print_methods(facts: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title="pruning methods", title_justify="left")
    for header in ("method", "paper", "layers", "reads text", "parameters (default first)"):
        table.add_column(header, no_wrap=header == "method")
    for one in facts:
        parameters = "\n".join(_parameter_line(p) for p in one["parameters"])
        layers = f"from {one['min_layer']}" + ("" if one["min_layer"] else " (before the LLM)")
        table.add_row(
            one["name"],
            one["paper"] or "control",
            layers,
            "yes" if one["reads_text"] else "no",
            parameters or "-",
        )
    console().print(table)
    console().print("tokenprune methods NAME describes one of them.")


def _print_method(one: dict[str, Any]) -> None:
    out = console()
    out.print(f"[bold]{one['name']}[/bold]  {one['paper'] or 'control'}\n")
    out.print(one["description"], markup=False)
    out.print(
        f"\nCuts at layer {one['min_layer']} and later"
        + ("" if one["min_layer"] else " (0 is before the LLM)")
    )
    out.print(
        "What is kept depends on the text too."
        if one["reads_text"]
        else "The text does not change what is kept."
    )
    out.print(f"It is shown: {', '.join(one['sees'])}.", markup=False)
    if one["parameters"]:
        out.print("\nOn the command line:")
    for parameter in one["parameters"]:
        out.print(f"  --param {_parameter_line(parameter)}", markup=False)


def _parameter_line(parameter: dict[str, Any]) -> str:
    default = parameter["default"]
    shown = str(default).lower() if isinstance(default, bool) else str(default)
    choices = [str(not default).lower()] if isinstance(default, bool) else parameter["choices"] or []
    others = [choice for choice in choices if choice != default]
    return f"{parameter['name']}=" + " | ".join([shown, *others])


def _family_facts(family: type[Family]) -> dict[str, Any]:
    from tokenprune.methods import EntropyPrune
    from tokenprune.models import Family as Base

    works = ["cuts before the LLM and at any layer"]
    if family.vision_tap is not Base.vision_tap:
        works.append("methods that read the vision tower's attention")
    if not family.mrope:
        works.append("compact positions (cuts before the LLM)")
    module = sys.modules[family.__module__]
    return {
        "name": family.name,
        "about": (inspect.getdoc(module) or "").partition("\n")[0],
        "model_types": list(family.model_types),
        "examples": list(family.examples),
        "published_layer": EntropyPrune.published_layers.get(family.name),
        "mrope": family.mrope,
        "works": works,
    }
