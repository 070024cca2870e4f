"""Three vision-language models that were really trained, and questions they need their eyes for.

"small" (3.9 M parameters) was trained from nothing for these pictures and lies in the package; "smol" is a LLaVA whose
decoder, SmolLM2-135M-Instruct, others have pretrained on text; "pages" reads pages of print.
"""

from tokenprune_testbed.evaluate import Result, evaluate
from tokenprune_testbed.loading import MODEL_DIR, MODELS, load, model_folder
from tokenprune_testbed.questions import FAMILIES, Sample, evaluation_set

__all__ = [
    "FAMILIES",
    "MODELS",
    "MODEL_DIR",
    "Result",
    "Sample",
    "evaluate",
    "evaluation_set",
    "load",
    "model_folder",
]
