"""Image files from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from tokenprune.errors import ConfigError
from tokenprune.files import given_path

# By Pillow's name, and the ends of such files' names. Others are never opened: EPS, for one, runs a program.
FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
}
SUFFIXES = tuple(suffix for own in FORMATS.values() for suffix in own)
MOST_PIXELS = 2**27  # 400 MB as RGB, whatever they take in the file


def open_image(path: Path) -> Image.Image:
    """An image file as RGB, turned the way the camera was held; of an animation the first picture.

    Raises:
        ConfigError: it is missing, no image of the known formats, broken, or too large.
    """
    path = given_path(path)
    if not path.is_file():
        raise ConfigError(f"there is no image file {str(path)!r}; check the path")
    try:
        opened = Image.open(path, formats=tuple(FORMATS))
    except Exception as error:  # what Pillow's readers raise on broken files has no common base
        raise _unreadable(repr(str(path))) from error
    with opened:
        return as_rgb(opened, repr(str(path)))


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """A picture as RGB, turned the way the camera was held. It may not have been read yet.

    Raises:
        ConfigError: it is broken, or too large.
    """
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise ConfigError(
            f"{name} has {width} x {height} pixels, more than the {MOST_PIXELS:,} that are read; make it smaller"
        )
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # as above
        raise _unreadable(name) from error


def _unreadable(name: str) -> ConfigError:
    known = ", ".join(FORMATS)
    return ConfigError(f"{name} is no image that can be read ({known}); give another file")


def as_seen(image_processor: Any, image: Image.Image) -> Image.Image:
    """The part of an image that became tokens: CLIP processors cut the middle out of the resized image.

    Those that make tiles of it (LLaVA-NeXT) have the setting too, but show it whole.
    """
    if not getattr(image_processor, "do_center_crop", False) or hasattr(
        image_processor, "image_grid_pinpoints"
    ):
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


# In Qwen-VL's processors' `size` these edges are numbers of pixels; in those of others the longest one is a side.
_EDGES = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))


def limit_pixels(processor: Any, least: int | None, most: int | None) -> None:
    """Have a processor scale pictures to within a number of pixels, as tables at a fixed resolution ask for.

    That is what people do instead of pruning, so it is how both are compared at equally many tokens.

    Raises:
        ConfigError: its pictures have one size whatever they are, or a limit is no number of pixels.
    """
    given = {"min_pixels": least, "max_pixels": most}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} takes a number of pixels, not {value!r}")
    images = getattr(processor, "image_processor", None)
    size = getattr(images, "size", None)
    if images is None or size is None or "longest_edge" not in size or not hasattr(images, "merge_size"):
        raise ConfigError(
            f"a {type(images).__name__} takes no {' or '.join(given)}: only those of Qwen-VL, GLM-V and kin scale "
            f"to a number of pixels; 'size' sets the longest side of others"
        )
    least, most = (given.get(name, size[edge]) for name, edge in _EDGES)
    if least is None or most is None or least > most:
        raise ConfigError(f"min_pixels={least} is more than max_pixels={most}")
    images.size = type(size)(shortest_edge=least, longest_edge=most)
    for name, value in (("min_pixels", least), ("max_pixels", most)):
        if hasattr(images, name):
            setattr(images, name, value)


def limit_side(processor: Any, longest: int | None) -> None:
    """Have a processor scale pictures to a longest side in pixels (Pixtral, Idefics3, SmolVLM).

    Raises:
        ConfigError: it has none to set, or that is no number of pixels.
    """
    if longest is None:
        return
    if isinstance(longest, bool) or not isinstance(longest, int) or longest < 1:
        raise ConfigError(f"size takes a number of pixels, not {longest!r}")
    images = getattr(processor, "image_processor", None)
    size = getattr(images, "size", None)
    if images is None or size is None or "longest_edge" not in size or hasattr(images, "merge_size"):
        raise ConfigError(
            f"a {type(images).__name__} takes no size: its pictures have one size, or take min_pixels and max_pixels"
        )
    images.size = type(size)(longest_edge=longest)
