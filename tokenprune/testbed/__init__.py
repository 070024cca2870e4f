"""A small vision-language model that was really trained, and questions it needs its eyes for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from tokenprune.testbed.evaluate import Result, evaluate
from tokenprune.testbed.questions import FAMILIES, Sample, evaluation_set

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = ["FAMILIES", "MODEL_DIR", "Result", "Sample", "evaluate", "evaluation_set", "load"]

# ``evaluate`` must name the function here, so its module is imported at once; ``python -m`` finds that odd.
warnings.filterwarnings(
    "ignore", message=r"'tokenprune\.testbed\.evaluate' found in sys\.modules", category=RuntimeWarning
)

MODEL_DIR = Path(__file__).with_name("model")


def load(
    dtype: torch.dtype | None = None, path: Path | str | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The shipped model, in eval mode, and its processor.

    Args:
        dtype: of the weights (default: float32; they are stored in half precision).
        path: another model folder, such as one that ``train`` wrote.
    """
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = str(path or MODEL_DIR)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype or torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)
