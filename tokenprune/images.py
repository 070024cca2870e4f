"""Image files from outside."""

from __future__ import annotations

from pathlib import Path

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
