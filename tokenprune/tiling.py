"""How the images of a prompt lie on the pictures somebody gave: crops, tiles, views and frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from tokenprune.errors import ConfigError
from tokenprune.tokens import Grid, IntArray

Frames = Image.Image | Sequence[Image.Image]


class Part(Protocol):
    """What is read of an `ImageReport`, or of an `Image`."""

    @property
    def kind(self) -> str: ...
    @property
    def grids(self) -> Sequence[Any]: ...
    @property
    def continues(self) -> bool: ...
    @property
    def cell(self) -> tuple[int, int] | None: ...


@dataclass(frozen=True)
class View:
    """A grid of tokens over a picture.

    Attributes:
        picture: that it is drawn on.
        tokens: (height, width) the number of each token, counted through all images of the row.
    """

    picture: Image.Image
    tokens: IntArray


def lay_out(parts: Sequence[Part], pictures: Sequence[Frames]) -> list[list[View]]:
    """The views of each of a row's pictures.

    The tiles of a picture, and the crops that are images of their own, are put together again, so that one view has
    the picture's shape; what shows all of it (the thumbnail, the base view) is another view. A video has a view per
    frame.

    Args:
        parts: the images of a row, from a report.
        pictures: in the order of the prompt; of a video, its frames, all of them or as many as the model was shown.

    Raises:
        ConfigError: these are not the pictures of that row.
    """
    groups: list[list[int]] = []
    for i, part in enumerate(parts):
        if part.continues and groups:
            groups[-1].append(i)
        else:
            groups.append([i])
    starts = np.cumsum([0, *(sum(math.prod(shape(g)) for g in part.grids) for part in parts)])
    given = _match(pictures, len(groups))
    return [
        _views([parts[i] for i in own], [int(starts[i]) for i in own], picture)
        for own, picture in zip(groups, given, strict=True)
    ]


def _match(pictures: Sequence[Frames], count: int) -> list[Frames]:
    """A picture for each of so many groups; where frames of a video are pictures to the model, its frames."""
    if len(pictures) == count:
        return list(pictures)
    if len(pictures) == 1 and not isinstance(pictures[0], Image.Image):
        return list(spread(pictures[0], count))
    flat = [f for p in pictures for f in ([p] if isinstance(p, Image.Image) else p)]
    if len(flat) == count:
        return list(flat)
    raise ConfigError(
        f"the row of the report has {count} pictures, but {len(pictures)} were given to draw; give those of the "
        f"prompt in its order, and for a video all its frames"
    )


def shape(grid: Any) -> tuple[int, int, int]:
    """(frames, height, width) of a `Grid`, or of what says it as two or three numbers."""
    if isinstance(grid, Grid):
        return grid.frames, grid.height, grid.width
    return (1, *grid) if len(grid) == 2 else tuple(grid)


def _views(parts: Sequence[Part], starts: Sequence[int], picture: Frames) -> list[View]:
    crops = {
        part.cell: _tokens(part, start)[0][0] for part, start in zip(parts, starts, strict=True) if part.cell
    }
    views = []
    if crops:
        rows, columns = (1 + max(cell[axis] for cell in crops) for axis in (0, 1))
        missing = [(r, c) for r in range(rows) for c in range(columns) if (r, c) not in crops]
        if not missing:
            whole = np.block([[crops[r, c] for c in range(columns)] for r in range(rows)])
            views.append(View(_one(picture), whole))
    for part, start in zip(parts, starts, strict=True):
        if part.cell:
            continue
        for frames in _tokens(part, start):
            if part.kind == "image" and len(frames) > 1:
                tiles, rest = _together(frames, _one(picture).size)
                views += [View(_one(picture), tokens) for tokens in (tiles, *rest)]
            else:
                views += [View(p, t) for p, t in zip(spread(picture, len(frames)), frames, strict=True)]
    return views


def _tokens(part: Part, start: int) -> list[IntArray]:
    """(frames, height, width) numbers of its tokens, one array per grid."""
    numbered = []
    for frames, height, width in map(shape, part.grids):
        count = frames * height * width
        numbered.append(np.arange(start, start + count).reshape(frames, height, width))
        start += count
    return numbered


def _together(tiles: IntArray, size: tuple[int, int]) -> tuple[IntArray, list[IntArray]]:
    """Tiles (n, h, w) of a picture (width, height) side by side, and the thumbnail that comes last.

    The processors take the arrangement whose shape is most like the picture's, so of all that have so many tiles it
    is that one.
    """
    count = len(tiles) - 1
    ratio = size[0] / size[1]
    shapes = [(count // c, c) for c in range(1, count + 1) if count % c == 0]
    rows, columns = min(shapes, key=lambda shape: abs(shape[1] / shape[0] - ratio))
    grid = tiles[:-1].reshape(rows, columns, *tiles.shape[1:])
    whole = grid.transpose(0, 2, 1, 3).reshape(rows * tiles.shape[1], columns * tiles.shape[2])
    return whole, [tiles[-1]]


def _one(picture: Frames) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else picture[0]


def spread(picture: Frames, count: int) -> list[Image.Image]:
    """So many of the frames given: of those merged in a step, the middle one."""
    given = [picture] if isinstance(picture, Image.Image) else list(picture)
    if len(given) < count:
        raise ConfigError(
            f"the grid has {count} frames, but {len(given)} were given; pass all frames of the video"
        )
    return [given[(2 * t + 1) * len(given) // (2 * count)] for t in range(count)]
