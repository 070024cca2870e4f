"""Pictures of what was kept: dropped tokens fade, kept ones stay as they are. Pillow only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

from tokenprune.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from tokenprune.tokens import Grid

Picture: TypeAlias = Image.Image
# (height, width), (frames, height, width), or tokenprune's own Grid
GridLike: TypeAlias = "tuple[int, int] | tuple[int, int, int] | Grid"

SIDE = 384  # small images are blown up to about this many pixels ...
MOST = 1024  # ... and large ones shrunk to this
OUTLINE = (255, 255, 255)
MERGED = (255, 176, 32)
INK, PAPER = (24, 24, 27), (255, 255, 255)
GAP = 8
# Dropped tokens fade into slate, not black: in a dark photograph black would look like more photograph.
_SLATE, _SLATE_SHARE = (52, 56, 66), 0.72
_AMBER_SHARE = 0.4
_HEAT, _HEAT_SHARE = ((28, 24, 96), (196, 60, 90), (255, 232, 64)), 0.6


def draw_kept(
    image: Picture | Sequence[Picture],
    grid: GridLike,
    kept: Iterable[Any],
    merged: Iterable[Any] | None = None,
    caption: str | None = None,
    scale: int | None = None,
) -> Picture:
    """Draw which visual tokens of an image were kept.

    Dropped tokens fade to a dark grey; kept ones keep every pixel, and a thin white line around them runs on the
    dropped side. Tokens merged into others are tinted amber, and what they were merged into has an amber frame.

    Args:
        image: the image, or the frames of a video (one per step of the grid, or a multiple of that).
        grid: layout of its tokens: (height, width) or (frames, height, width).
        kept: raster indices of the tokens kept.
        merged: (source, slot) pairs of raster indices, as in `Report.merges`.
        caption: a line of text below.
        scale: blow up by this factor (default: to about 384 pixels; images beyond 1024 are shrunk).

    Returns:
        A new RGB image; the frames of a video are side by side.

    Raises:
        ConfigError: indices outside the grid, or fewer frames than it has.
    """
    frames, height, width = _grid(grid)
    per_frame = height * width
    keep = {int(index) for index in _integers(kept)}
    pairs = [(int(source), int(slot)) for source, slot in _integers(() if merged is None else merged)]
    sources = {source for source, _ in pairs} - keep
    slots = {slot for _, slot in pairs} & keep
    for index in keep | sources:
        if not 0 <= index < frames * per_frame:
            raise ConfigError(
                f"token {index} is outside the {frames} x {height} x {width} grid; pass raster indices from 0 to "
                f"{frames * per_frame - 1}"
            )
    panels = []
    for t, frame in enumerate(_frames(image, frames)):
        low = t * per_frame
        own = [{i - low for i in group if low <= i < low + per_frame} for group in (keep, sources, slots)]
        panels.append(_draw_frame(_resize(frame, scale), (width, height), *own))
    picture = panels[0] if frames == 1 else tile(panels, columns=frames)
    return picture if caption is None else add_caption(picture, caption)


class Kept(Protocol):
    """What is drawn of a `Report`: see there."""

    @property
    def method(self) -> str: ...
    @property
    def images(self) -> Sequence[Any]: ...
    @property
    def keep_lists(self) -> list[list[list[list[int]]]]: ...
    @property
    def pooled(self) -> bool: ...
    @property
    def merges(self) -> list[dict[tuple[int, int], tuple[Tensor, Tensor]]]: ...


def draw_report(
    report: Kept,
    images: Sequence[Picture | Sequence[Picture]],
    row: int = 0,
    captions: Sequence[str] | None = None,
    scale: int | None = None,
) -> list[Picture]:
    """Draw every image of a row as it was after the last cut.

    Args:
        report: from `tokenprune.report(model)`.
        images: the row's images in the order of the prompt; for a video, its frames.
        row: row of the batch.
        captions: one per image (default: how many tokens were kept).
        scale: as for `draw_kept`.

    Raises:
        ConfigError: the number of images is not the row's.
    """
    own = [image for image in report.images if image.row == row]
    if len(own) != len(images):
        raise ConfigError(
            f"row {row} of the report has {len(own)} images, but {len(images)} were given to draw"
        )
    lists = report.keep_lists
    pictures = []
    for i, (facts, image) in enumerate(zip(own, images, strict=True)):
        kept = lists[-1][row][i] if lists else range(facts.tokens)
        start = sum(one.tokens for one in own[:i]) if report.pooled else 0
        key = (row, 0 if report.pooled else i)
        pairs = [pair for cut in report.merges if key in cut for pair in _integers(cut[key][0])]
        pairs = [(a - start, b - start) for a, b in pairs]
        pairs = [pair for pair in pairs if all(0 <= end < facts.tokens for end in pair)]  # within this image
        caption = (
            f"{report.method}: {len(kept)} of {facts.tokens} tokens" if captions is None else captions[i]
        )
        pictures.append(_draw_views(image, facts.grids, _integers(kept), pairs, caption, scale))
    return pictures


def _draw_views(
    image: Picture | Sequence[Picture],
    grids: Sequence[GridLike],
    kept: list[int],
    pairs: list[tuple[int, int]],
    caption: str,
    scale: int | None,
) -> Picture:
    """One picture per view of an image, side by side."""
    panels, start = [], 0
    for grid in grids:
        end = start + math.prod(_grid(grid))
        own = [index - start for index in kept if start <= index < end]
        merged = [(a - start, b - start) for a, b in pairs if start <= a < end and start <= b < end]
        panels.append(draw_kept(image, grid, own, merged, scale=scale))
        start = end
    return add_caption(panels[0] if len(panels) == 1 else tile(panels, columns=len(panels)), caption)


def draw_heat(
    image: Picture | Sequence[Picture],
    grid: GridLike,
    values: Iterable[Any],
    caption: str | None = None,
    scale: int | None = None,
) -> Picture:
    """Draw a number per visual token over an image: from the smallest, dark blue, to the largest, yellow.

    Args:
        image, grid, scale: as for `draw_kept`.
        values: one per token, in raster order; all equal, or NaN, is drawn as the smallest.
        caption: a line of text below.

    Raises:
        ConfigError: not one value per token of the grid.
    """
    frames, height, width = _grid(grid)
    per_frame = height * width
    numbers = [float(v) for v in values]
    if len(numbers) != frames * per_frame:
        raise ConfigError(
            f"a {frames} x {height} x {width} grid takes {frames * per_frame} values, not {len(numbers)}"
        )
    finite = [v for v in numbers if math.isfinite(v)] or [0.0]
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    shades = [round(255 * (v - low) / span) if math.isfinite(v) else 0 for v in numbers]
    panels = []
    for t, frame in enumerate(_frames(image, frames)):
        picture = _resize(frame, scale)
        small = Image.new("L", (width, height))
        small.putdata(shades[t * per_frame : (t + 1) * per_frame])
        heat = ImageOps.colorize(
            small.resize(picture.size, Image.Resampling.NEAREST), *_HEAT[::2], mid=_HEAT[1]
        )
        panels.append(Image.blend(ImageOps.grayscale(picture).convert("RGB"), heat, _HEAT_SHARE))
    drawn = panels[0] if frames == 1 else tile(panels, columns=frames)
    return drawn if caption is None else add_caption(drawn, caption)


def tile(pictures: Sequence[Picture], columns: int, title: str | None = None, gap: int = GAP) -> Picture:
    """Put pictures side by side, `columns` in a row, with a title above."""
    rows = [list(pictures[i : i + columns]) for i in range(0, len(pictures), columns)]
    heights = [max(p.height for p in row) for row in rows]
    widths = [max(row[i].width for row in rows if i < len(row)) for i in range(len(rows[0]))]
    sheet = Image.new(
        "RGB", (sum(widths) + gap * (len(widths) - 1), sum(heights) + gap * (len(rows) - 1)), PAPER
    )
    y = 0
    for row, tall in zip(rows, heights, strict=True):
        x = 0
        for picture, wide in zip(row, widths, strict=False):
            sheet.paste(picture, (x, y))
            x += wide + gap
        y += tall + gap
    return sheet if title is None else add_caption(sheet, title, above=True, size=18)


def add_caption(
    picture: Picture, text: str, *, above: bool = False, size: int | None = None, lines: int = 1
) -> Picture:
    """Add a strip of text, wrapped to the picture's width and at least `lines` high, below (or above) it."""
    font = ImageFont.load_default(size or max(12, min(16, picture.width // 18)))
    wrapped = _wrap(text, lambda line: font.getlength(line), picture.width - 8)
    _, top, _, bottom = font.getbbox("Ag")
    pitch = round(bottom - top) + 5
    strip = pitch * max(lines, len(wrapped)) + 6
    sheet = Image.new("RGB", (picture.width, picture.height + strip), PAPER)
    sheet.paste(picture, (0, strip if above else 0))
    pen, y = ImageDraw.Draw(sheet), 4 - top + (0 if above else picture.height)
    for i, line in enumerate(wrapped):
        pen.text((4, y + i * pitch), line, fill=INK, font=font)
    return sheet


def _draw_frame(
    picture: Picture, grid: tuple[int, int], keep: set[int], sources: set[int], slots: set[int]
) -> Picture:
    """One frame at its final size; the groups are raster indices within it."""
    bright, tinted, framed = (_mask(group, grid, picture.size) for group in (keep, sources, slots))
    grey = _blend(ImageOps.grayscale(picture).convert("RGB"), _SLATE, _SLATE_SHARE)
    faded = Image.composite(_blend(grey, MERGED, _AMBER_SHARE), grey, tinted)
    faded.paste(OUTLINE, mask=ImageChops.subtract(_grow(bright, _line(picture, grid)), bright))
    result = Image.composite(picture, faded, bright)
    inside = ImageChops.subtract(framed, _shrink(framed, grid, slots, _line(picture, grid)))
    result.paste(MERGED, mask=inside)
    return result


def _blend(picture: Picture, color: tuple[int, int, int], share: float) -> Picture:
    return Image.blend(picture, Image.new("RGB", picture.size, color), share)


def _mask(group: set[int], grid: tuple[int, int], size: tuple[int, int]) -> Picture:
    """255 at the pixels of these tokens. Pillow's nearest neighbour says which pixel is which token's."""
    cells = Image.new("L", grid)
    cells.putdata([255 if i in group else 0 for i in range(grid[0] * grid[1])])
    return cells.resize(size, Image.Resampling.NEAREST)


def _line(picture: Picture, grid: tuple[int, int]) -> int:
    """Width of an outline: a sixteenth of a token."""
    return max(1, round(min(picture.width / grid[0], picture.height / grid[1]) / 16))


def _grow(mask: Picture, by: int) -> Picture:
    return mask.filter(ImageFilter.MaxFilter(2 * by + 1))


def _shrink(mask: Picture, grid: tuple[int, int], group: set[int], by: int) -> Picture:
    """Every token of `group` without its border, also where two of them touch."""
    inner = Image.new("L", mask.size)
    for index in group:
        alone = _mask({index}, grid, mask.size)
        inner = ImageChops.lighter(inner, alone.filter(ImageFilter.MinFilter(2 * by + 1)))
    return inner


def _frames(image: Picture | Sequence[Picture], frames: int) -> list[Picture]:
    """One picture per step of the grid: of a video given in full, the middle one of those merged in a step."""
    given = [image] if isinstance(image, Image.Image) else list(image)
    if len(given) < frames:
        raise ConfigError(
            f"the grid has {frames} frames, but {len(given)} were given; pass all frames of the video"
        )
    return [given[(2 * t + 1) * len(given) // (2 * frames)] for t in range(frames)]


def _resize(image: Picture, scale: int | None) -> Picture:
    image = image.convert("RGB")
    largest = max(image.size)
    if scale is None and largest > MOST:
        size = (max(1, image.width * MOST // largest), max(1, image.height * MOST // largest))
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = max(1, SIDE // largest) if scale is None else scale
    # Nearest: an image of 96 pixels shows what the model saw, pixel by pixel.
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _grid(grid: GridLike) -> tuple[int, int, int]:
    if isinstance(grid, tuple):
        return grid if len(grid) == 3 else (1, *grid)
    return grid.frames, grid.height, grid.width


def _integers(values: Any) -> list[Any]:
    """Lists as they are; tensors and arrays as lists."""
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _wrap(text: str, width_of: Any, limit: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and width_of(longer) <= limit:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines or [""]
