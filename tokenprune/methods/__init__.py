"""The pruning methods, one file each. Third parties pass an instance of their own `Method` to `wrap`."""

from __future__ import annotations

from tokenprune.methods.base import Method, ScoreMethod
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
from tokenprune.methods.registry import METHODS, find_all, find_method, make_method
from tokenprune.methods.relevance import Relevance
from tokenprune.methods.restore import Restore
from tokenprune.methods.seen import ImageTokens, Needs, Text
from tokenprune.methods.sparsevlm import SparseVLM
from tokenprune.methods.spread import Spread
from tokenprune.methods.staged import Staged
from tokenprune.methods.tome import ToMe
from tokenprune.methods.uniform import Uniform
from tokenprune.methods.vflowopt import VFlowOpt
from tokenprune.methods.visionzip import VisionZip
from tokenprune.tokens import DecoderShape, Grid, Selection, VisionAttention

METHODS.update(
    (m.name, m)
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
)


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
