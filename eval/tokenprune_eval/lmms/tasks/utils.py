"""What lmms-eval asks of a question of the testbed."""

from __future__ import annotations

from typing import Any


def to_visual(document: dict[str, Any]) -> list[Any]:
    return [image.convert("RGB") for image in document["images"]]


def to_text(document: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    return str(document["question"])


def process_results(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Right when the words are the expected ones exactly, as the testbed's own evaluator counts."""
    return {"accuracy": float(" ".join(results[0].split()) == document["answer"])}
