"""The pruning methods, one file each. Third parties pass an instance of their own `Method` to `wrap`."""

from __future__ import annotations

import dataclasses
from importlib.metadata import entry_points
from typing import Any

from tokenprune.errors import ConfigError
from tokenprune.methods.base import DecoderShape, ImageTokens, Method, Needs, ScoreMethod, Text
from tokenprune.methods.cdpruner import CDPruner
from tokenprune.methods.dart import DART
from tokenprune.methods.divprune import DivPrune
from tokenprune.methods.entropyprune import EntropyPrune
from tokenprune.methods.evs import EVS
from tokenprune.methods.fastv import FastV
from tokenprune.methods.importance import ImportanceMap
from tokenprune.methods.merge import Merge
from tokenprune.methods.none import NoPruning
from tokenprune.methods.prumerge import PruMerge
from tokenprune.methods.pyramiddrop import PyramidDrop
from tokenprune.methods.question import Question
from tokenprune.methods.random import Random
from tokenprune.methods.recycle import Recycle
from tokenprune.methods.relevance import Relevance
from tokenprune.methods.restore import Restore
from tokenprune.methods.sparsevlm import SparseVLM
from tokenprune.methods.spread import Spread
from tokenprune.methods.staged import Staged
from tokenprune.methods.tome import ToMe
from tokenprune.methods.uniform import Uniform
from tokenprune.methods.vflowopt import VFlowOpt
from tokenprune.methods.visionzip import VisionZip
from tokenprune.tokens import Grid, Selection, VisionAttention

METHODS: dict[str, type[Method]] = {
    m.name: m
    for m in (
        CDPruner,
        DART,
        DivPrune,
        EntropyPrune,
        EVS,
        FastV,
        ImportanceMap,
        Merge,
        NoPruning,
        PruMerge,
        PyramidDrop,
        Question,
        Random,
        Relevance,
        Restore,
        SparseVLM,
        ToMe,
        Uniform,
        VFlowOpt,
        VisionZip,
    )
}


#: Where other packages register methods: an entry point of this group whose name is the method's.
GROUP = "tokenprune.methods"


def find_method(name: str) -> type[Method] | None:
    """The method of that name, ours or an installed package's; None: there is none.

    Raises:
        ConfigError: the entry point is no method, or one of another name.
    """
    if name not in METHODS:
        for entry in entry_points(group=GROUP, name=name):
            found = entry.load()
            if not (
                isinstance(found, type) and issubclass(found, Method) and getattr(found, "name", "") == name
            ):
                raise ConfigError(
                    f"the entry point {entry.value!r} of {GROUP} is no Method of the name {name!r}"
                )
            METHODS[name] = found
    return METHODS.get(name)


def find_all() -> dict[str, type[Method]]:
    """All methods by name, those of installed packages among them."""
    for entry in entry_points(group=GROUP):
        find_method(entry.name)
    return METHODS


def make_method(method: str | Method, parameters: dict[str, Any]) -> Method:
    """Build a method from its name and parameters, or check and return an instance.

    Raises:
        ConfigError: an unknown name or parameter, or a value the method refuses.
    """
    if isinstance(method, Method):
        if parameters:
            raise ConfigError(f"{', '.join(parameters)}: set on the method instance you pass, not beside it")
        return method
    cls = find_method(method) if isinstance(method, str) else None
    if cls is None:
        raise ConfigError(
            f"unknown method {method!r}; choose one of {', '.join(sorted(METHODS))}, or pass a Method"
        )
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = [name for name in parameters if name not in known]
    if unknown:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ConfigError(f"method {method!r} has no parameter {', '.join(map(repr, unknown))}; {has}")
    return cls(**parameters)


__all__ = [
    "DART",
    "EVS",
    "METHODS",
    "CDPruner",
    "DecoderShape",
    "DivPrune",
    "EntropyPrune",
    "FastV",
    "Grid",
    "ImageTokens",
    "ImportanceMap",
    "Merge",
    "Method",
    "Needs",
    "NoPruning",
    "PruMerge",
    "PyramidDrop",
    "Question",
    "Random",
    "Recycle",
    "Relevance",
    "Restore",
    "ScoreMethod",
    "Selection",
    "SparseVLM",
    "Spread",
    "Staged",
    "Text",
    "ToMe",
    "Uniform",
    "VFlowOpt",
    "VisionAttention",
    "VisionZip",
    "find_all",
    "find_method",
    "make_method",
]
