"""Models and images named on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune import testbeds
from tokenprune.cli.shell import InputError, one_line, quiet_transformers
from tokenprune.errors import UnsupportedModelError
from tokenprune.files import given_path
from tokenprune.optional import install_hint

if TYPE_CHECKING:
    from PIL import Image

ATTENTION = ("sdpa", "eager", "flash_attention_2")
# What processors need that the library does not, and how it is had.
NEEDED = {
    "torchvision": f"{install_hint('vision')}; without a GPU pip install torch torchvision --index-url "
    f"https://download.pytorch.org/whl/cpu first, for PyPI's is built for CUDA",
    "num2words": install_hint("vision"),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)


def load_model(
    name: str, dtype: str = "auto", device: str | None = None, attention: str = "sdpa"
) -> tuple[Any, Any]:
    """A model in eval mode on its device, and its processor. Code from the hub is never run.

    Args:
        name: a testbed's ("small", "smol", "pages"), a local folder, or a hub id.
        dtype: "auto" or the name of a torch dtype.
        device: a torch device, "auto" to spread over GPUs, or None for the first GPU there is.
        attention: "sdpa", "eager" or "flash_attention_2".

    Raises:
        InputError: it cannot be loaded; says why and what to give instead.
        UnsupportedModelError: it could be loaded, but not pruned; nothing was downloaded but its config.
    """
    import torch

    if attention not in ATTENTION:
        raise InputError(f"attention is one of {', '.join(ATTENTION)}, not {attention!r}")
    device = check_device(device)
    wanted = None if dtype == "auto" else getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise InputError(f"dtype is auto, float32, bfloat16 or float16, not {dtype!r}")
    testbed = testbeds.find(name)
    if testbed is not None:
        quiet_transformers()
        model, processor = testbed.load(wanted)
        return model.to("cpu" if device == "auto" else device), processor
    folder = given_path(name)
    if not folder.is_dir() and (folder.exists() or not _HUB_ID.fullmatch(name)):
        raise InputError(
            f"{name!r} is no model folder; give a folder, a hub id such as {_an_example()}, or 'small' or 'smol', the "
            f"testbed's"
        )
    source = str(folder) if folder.is_dir() else name
    quiet_transformers()
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    config = _pretrained(AutoConfig, source, name)
    _check_type(name, config)
    processor = _pretrained(AutoProcessor, source, name)
    if getattr(processor, "image_processor", None) is None:
        raise InputError(f"{name!r} has no image processor; give a folder saved with its processor")
    spread = {"device_map": "auto"} if device == "auto" else {}
    # Not the attention that the checkpoint's config asks for: it may name a kernel to be fetched from the hub.
    for own in (config, *(getattr(config, part) for part in config.sub_configs)):
        own._attn_implementation = attention
    options = {"config": config, "dtype": wanted or "auto", **spread}
    model = _pretrained(AutoModelForImageTextToText, source, name, **options)
    return (model if spread else model.to(device)).eval(), processor


def _pretrained(auto: Any, source: str, name: str, **options: Any) -> Any:
    try:
        return auto.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # broken files raise whatever their reader does
        # Their messages fill a screen; the first sentence says what happened.
        text = one_line(str(error))
        for package, how in NEEDED.items():
            if package in text.lower():
                raise InputError(f"cannot load {name!r}: its processor needs {package}; {how}") from error
        kind = re.search(r"model type `([\w-]+)`", text)
        if kind is not None:
            raise UnsupportedModelError(_unknown(name, kind[1])) from error
        reason = re.split(r"(?<=[a-z)'\"])[.:]?\s(?=[A-Z])", text)[0][:160].rstrip(".: ")
        hint = "" if Path(source).is_dir() else f", nor is there a folder {name!r}"
        raise InputError(
            f"cannot load {name!r}: {reason}{hint}; give a model folder, a hub id, or 'small' or 'smol', the testbed's"
        ) from error


def _unknown(name: str, kind: str) -> str:
    """Of a checkpoint that transformers does not read."""
    from tokenprune.models import TWINS

    if kind in TWINS:
        return (
            f"{name!r} is a {kind!r} checkpoint as its authors released it, which transformers does not read; its twin "
            f"is {TWINS[kind]}"
        )
    from tokenprune.releases import release

    return f"{name!r} is a {kind!r} model, which {release()} does not know; 'tokenprune models' lists what is pruned"


def _check_type(name: str, config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    if config.model_type not in KNOWN:  # of those, types without a family are tried
        raise UnsupportedModelError(
            f"{name!r} is a {config.model_type!r} model, which reads no images; 'tokenprune models' lists what is "
            f"pruned"
        )


def _an_example() -> str:
    from tokenprune.models import FAMILIES

    return next(family.examples[0] for family in FAMILIES.values() if family.examples)


def scale_pictures(processor: Any, min_pixels: int | None, max_pixels: int | None, size: int | None) -> None:
    """Have a processor make pictures smaller or larger, as its family takes it.

    Raises:
        ConfigError: it does not take that.
    """
    from tokenprune.images import limit_pixels, limit_side

    limit_pixels(processor, min_pixels, max_pixels)
    limit_side(processor, size)


def check_device(device: str | None) -> str:
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "auto":
        return device
    try:
        torch.empty(0, device=device)
        usable = torch.device(device).type != "meta"  # which holds no numbers
    except (RuntimeError, AssertionError):  # an AssertionError where torch was built without CUDA
        usable = False
    if not usable:
        raise InputError(f"--device {device!r} cannot be used here; give cpu, cuda, cuda:N or auto")
    return device


def load_images(paths: Sequence[Path]) -> list[Image.Image]:
    """Open images as RGB, turned the way the camera was held.

    Raises:
        ConfigError: a file is missing, or no image.
    """
    from tokenprune.images import open_image

    return [open_image(path) for path in paths]
