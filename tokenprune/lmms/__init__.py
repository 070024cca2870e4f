"""tokenprune as a model of lmms-eval, and the testbed's questions as tasks of it.

    python -m lmms_eval --model tokenprune --model_args pretrained=MODEL,method=entropyprune,keep=0.25 --tasks mme

lmms-eval finds `manifest` through the entry-point group ``lmms_eval.models``.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What is registered: one class per slot."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        "tokenprune",
        simple_class_path="tokenprune.lmms.model.Simple",
        chat_class_path="tokenprune.lmms.model.Chat",
    )
