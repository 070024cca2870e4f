"""Image files from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from tokenprune.errors import ConfigError


def open_image(path: Path) -> Image.Image:
    """An image file as RGB, turned the way the camera was held.

    Raises:
        ConfigError: it is missing, or no image.
    """
    if not path.is_file():
        raise ConfigError(f"there is no image file {str(path)!r}; check the path")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    # SyntaxError: what Pillow calls broken PNGs
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"{str(path)!r} is no image that Pillow can read; give a PNG, JPEG or WebP file"
        ) from error


def as_seen(image_processor: Any, image: Image.Image) -> Image.Image:
    """The part of an image that became tokens: CLIP processors cut the middle out of the resized image."""
    if not getattr(image_processor, "do_center_crop", False):
        return image
    crop, size = image_processor.crop_size, image_processor.size
    width, height = image.size
    if "shortest_edge" in size:
        scale = size["shortest_edge"] / min(width, height)
        width, height = round(width * scale), round(height * scale)
    else:
        width, height = size["width"], size["height"]
    # Centred padding where the crop is larger than the image, as the processors do.
    part = image.resize((width, height))
    dx, dy = (width - crop["width"]) // 2, (height - crop["height"]) // 2
    if dx < 0 or dy < 0:
        part = ImageOps.expand(part, border=(max(0, -dx), max(0, -dy)))
        dx, dy = max(0, dx), max(0, dy)
    return part.crop((dx, dy, dx + crop["width"], dy + crop["height"]))
