"""The pruning methods, one file each. Third parties pass an instance of their own `Method` to `wrap`."""

from __future__ import annotations

import dataclasses
from typing import Any

from tokenprune.errors import ConfigError
from tokenprune.methods.base import DecoderShape, ImageTokens, Method, Needs, ScoreMethod, Text
from tokenprune.methods.divprune import DivPrune
from tokenprune.methods.entropyprune import EntropyPrune
from tokenprune.methods.fastv import FastV
from tokenprune.methods.importance import ImportanceMap
from tokenprune.methods.none import NoPruning
from tokenprune.methods.pyramiddrop import PyramidDrop
from tokenprune.methods.question import Question
from tokenprune.methods.random import Random
from tokenprune.methods.recycle import Recycle
from tokenprune.methods.sparsevlm import SparseVLM
from tokenprune.methods.spread import Spread
from tokenprune.methods.staged import Staged
from tokenprune.methods.uniform import Uniform
from tokenprune.methods.vflowopt import VFlowOpt
from tokenprune.methods.visionzip import VisionZip
from tokenprune.tokens import Grid, Selection, VisionAttention

METHODS: dict[str, type[Method]] = {
    m.name: m
    for m in (
        *(DivPrune, EntropyPrune, FastV, ImportanceMap, NoPruning, PyramidDrop, Question, Random, SparseVLM),
        *(Uniform, VFlowOpt, VisionZip),
    )
}


def make_method(method: str | Method, parameters: dict[str, Any]) -> Method:
    """Build a method from its name and parameters, or check and return an instance.

    Raises:
        ConfigError: an unknown name or parameter, or a value the method refuses.
    """
    if isinstance(method, Method):
        if parameters:
            raise ConfigError(f"{', '.join(parameters)}: set on the method instance you pass, not beside it")
        return method
    if not isinstance(method, str) or method not in METHODS:
        raise ConfigError(
            f"unknown method {method!r}; choose one of {', '.join(sorted(METHODS))}, or pass a Method"
        )
    cls = METHODS[method]
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = [name for name in parameters if name not in known]
    if unknown:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ConfigError(f"method {method!r} has no parameter {', '.join(map(repr, unknown))}; {has}")
    return cls(**parameters)


__all__ = [
    "METHODS",
    "DecoderShape",
    "DivPrune",
    "EntropyPrune",
    "FastV",
    "Grid",
    "ImageTokens",
    "ImportanceMap",
    "Method",
    "Needs",
    "NoPruning",
    "PyramidDrop",
    "Question",
    "Random",
    "Recycle",
    "ScoreMethod",
    "Selection",
    "SparseVLM",
    "Spread",
    "Staged",
    "Text",
    "Uniform",
    "VFlowOpt",
    "VisionAttention",
    "VisionZip",
    "make_method",
]
