"""Pictures of what was kept: dropped tokens fade, kept ones stay as they are. Pillow only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

from tokenprune.errors import ConfigError
from tokenprune.tiling import View, lay_out, shape, spread

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
_AMBER_LEAST, _AMBER_MOST = 0.1, 0.55
COLUMNS = 8  # frames of a video side by side
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
    dropped side. Kept tokens that others were merged into are framed in amber and tinted, the more they stand for the
    stronger.

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
    size = shape(grid)
    keep = {int(index) for index in _integers(kept)}
    pairs = [(int(source), int(slot)) for source, slot in _integers(() if merged is None else merged)]
    total = math.prod(size)
    for index in keep | {source for source, _ in pairs}:
        if not 0 <= index < total:
            raise ConfigError(
                f"token {index} is outside the {size[0]} x {size[1]} x {size[2]} grid; pass raster indices from 0 "
                f"to {total - 1}"
            )
    picture = _draw_views(_frames(image, size), keep, stands_for([pairs]), scale)
    return picture if caption is None else add_caption(picture, caption)


class Kept(Protocol):
    """What is drawn of a `Report`: see there."""

    @property
    def method(self) -> str: ...
    @property
    def images(self) -> Sequence[Any]: ...
    @property
    def layers_cut(self) -> tuple[int, ...]: ...
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
    stages: bool = False,
) -> list[Picture]:
    """Draw every picture of a row as it was after the last cut.

    Args:
        report: from `tokenprune.report(model)`.
        images: the row's pictures in the order of the prompt; for a video, its frames.
        row: row of the batch.
        captions: one per picture (default: how many tokens were kept).
        scale: as for `draw_kept`.
        stages: one drawing per cut, side by side.

    Raises:
        ConfigError: these are not the row's pictures.
    """
    own = [image for image in report.images if image.row == row]
    starts = [sum(one.tokens for one in own[:i]) for i in range(len(own) + 1)]
    kept = [
        {starts[i] + int(index) for i, indices in enumerate(cut[row]) for index in indices}
        for cut in report.keep_lists
    ]
    moved = [_moved(cut, row, starts, report.pooled) for cut in report.merges]
    last = len(kept) - 1
    shown = range(len(kept)) if stages and last > 0 else [last]
    drawn = []
    for number, views in enumerate(lay_out(own, images)):
        tokens = {int(token) for view in views for token in view.tokens.flat}
        panels = []
        for cut in shown:
            keep = tokens & kept[cut] if kept else tokens
            mass = {token: m for token, m in stands_for(moved[: cut + 1]).items() if token in tokens}
            panel = _draw_views(views, keep, mass, scale)
            told = f"{len(keep)} of {len(tokens)} tokens" + _most(mass, keep)
            if len(shown) > 1:
                layer = report.layers_cut[cut]
                told = (f"before layer {layer}: " if layer else "before the LLM: ") + told
            elif captions is None:
                told = f"{report.method}: {told}"
            else:
                told = captions[number]
            panels.append(add_caption(panel, told))
        title = None if len(shown) == 1 else report.method if captions is None else captions[number]
        drawn.append(panels[0] if title is None else tile(panels, len(panels), title))
    return drawn


def stands_for(cuts: Sequence[Sequence[tuple[int, int]]]) -> dict[int, float]:
    """How many tokens each stands for that others were merged into: itself, and its share of each of them.

    Args:
        cuts: (source, slot) pairs, one list per cut. What stood for several passes them on when it is merged later.
    """
    mass: dict[int, float] = {}
    for pairs in cuts:
        slots: dict[int, list[int]] = {}
        for source, slot in pairs:
            if source != slot:
                slots.setdefault(source, []).append(slot)
        passed = {source: mass.pop(source, 1.0) for source in slots}
        for source, targets in slots.items():
            for slot in targets:
                mass[slot] = mass.get(slot, 1.0) + passed[source] / len(targets)
    return mass


def _moved(
    cut: dict[tuple[int, int], tuple[Tensor, Tensor]], row: int, starts: Sequence[int], pooled: bool
) -> list[tuple[int, int]]:
    """The pairs merged in a row at a cut, counted through all its images."""
    return [
        (int(a) + (0 if pooled else starts[i]), int(b) + (0 if pooled else starts[i]))
        for (r, i), (pairs, _) in cut.items()
        if r == row
        for a, b in _integers(pairs)
    ]


def _most(mass: dict[int, float], keep: set[int]) -> str:
    largest = max((m for token, m in mass.items() if token in keep), default=1.0)
    return f"; amber: stands for up to {largest:.0f}" if largest > 1 else ""


def _draw_views(views: Sequence[View], keep: set[int], mass: dict[int, float], scale: int | None) -> Picture:
    """The views of a picture side by side, all parts of it equally strongly tinted."""
    largest = max((m for token, m in mass.items() if token in keep), default=1.0)
    strength = {
        token: math.log(m) / math.log(largest) for token, m in mass.items() if token in keep and m > 1
    }
    panels = []
    for view in views:
        flat = view.tokens.reshape(-1).tolist()
        panels.append(
            _draw_view(
                _resize(view.picture, scale),
                (view.tokens.shape[1], view.tokens.shape[0]),
                {place for place, token in enumerate(flat) if token in keep},
                {place: strength[token] for place, token in enumerate(flat) if token in strength},
            )
        )
    return _abreast(panels)


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
    size = shape(grid)
    numbers = [float(v) for v in values]
    if len(numbers) != math.prod(size):
        raise ConfigError(
            f"a {size[0]} x {size[1]} x {size[2]} grid takes {math.prod(size)} values, not {len(numbers)}"
        )
    return draw_heat_views(_frames(image, size), numbers, caption, scale)


def draw_heat_views(
    views: Sequence[View], values: Sequence[float], caption: str | None = None, scale: int | None = None
) -> Picture:
    """The same of a picture's views (`lay_out`), side by side; `values` has one for every token they name."""
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    shades = [round(255 * (v - low) / span) if math.isfinite(v) else 0 for v in values]
    panels = []
    for view in views:
        picture = _resize(view.picture, scale)
        small = Image.new("L", view.tokens.shape[::-1])
        small.putdata([shades[token] for token in view.tokens.flat])
        heat = ImageOps.colorize(
            small.resize(picture.size, Image.Resampling.NEAREST), *_HEAT[::2], mid=_HEAT[1]
        )
        panels.append(Image.blend(ImageOps.grayscale(picture).convert("RGB"), heat, _HEAT_SHARE))
    drawn = _abreast(panels)
    return drawn if caption is None else add_caption(drawn, caption)


def _frames(image: Picture | Sequence[Picture], size: tuple[int, int, int]) -> list[View]:
    """A view per step of a (frames, height, width) grid."""
    tokens = np.arange(math.prod(size)).reshape(size)
    return [View(p, t) for p, t in zip(spread(image, size[0]), tokens, strict=True)]


def _abreast(panels: Sequence[Picture]) -> Picture:
    """The views of a picture side by side."""
    return panels[0] if len(panels) == 1 else tile(panels, columns=min(len(panels), COLUMNS))


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


def _draw_view(
    picture: Picture, grid: tuple[int, int], keep: set[int], strength: dict[int, float]
) -> Picture:
    """One view at its final size; raster indices of the tokens kept, and how strongly each is tinted."""
    bright = _mask(dict.fromkeys(keep, 1.0), grid, picture.size)
    faded = _blend(ImageOps.grayscale(picture).convert("RGB"), _SLATE, _SLATE_SHARE)
    faded.paste(OUTLINE, mask=ImageChops.subtract(_grow(bright, _line(picture, grid)), bright))
    tint = _mask(
        {i: _AMBER_LEAST + (_AMBER_MOST - _AMBER_LEAST) * s for i, s in strength.items()}, grid, picture.size
    )
    tinted = Image.composite(Image.new("RGB", picture.size, MERGED), picture, tint)
    result = Image.composite(tinted, faded, bright)
    framed = _mask(dict.fromkeys(strength, 1.0), grid, picture.size)
    result.paste(
        MERGED, mask=ImageChops.subtract(framed, _shrink(framed, grid, set(strength), _line(picture, grid)))
    )
    return result


def _blend(picture: Picture, color: tuple[int, int, int], share: float) -> Picture:
    return Image.blend(picture, Image.new("RGB", picture.size, color), share)


def _mask(share: dict[int, float], grid: tuple[int, int], size: tuple[int, int]) -> Picture:
    """A share of 255 at the pixels of each token. Pillow's nearest neighbour says which pixel is which token's."""
    cells = Image.new("L", grid)
    cells.putdata([round(255 * share.get(i, 0.0)) for i in range(grid[0] * grid[1])])
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
        alone = _mask({index: 1.0}, grid, mask.size)
        inner = ImageChops.lighter(inner, alone.filter(ImageFilter.MinFilter(2 * by + 1)))
    return inner


def _resize(image: Picture, scale: int | None) -> Picture:
    image = image.convert("RGB")
    largest = max(image.size)
    if scale is None and largest > MOST:
        size = (max(1, image.width * MOST // largest), max(1, image.height * MOST // largest))
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = max(1, SIDE // largest) if scale is None else scale
    # Nearest: an image of 96 pixels shows what the model saw, pixel by pixel.
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


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
