"""Pictures of kept tokens, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import tiny
import tokenprune
from tokenprune.draw import MERGED, OUTLINE, SIDE, add_caption, draw_kept, draw_report, tile
from tokenprune.errors import ConfigError
from tokenprune.methods import Grid

Array = NDArray[np.int64]


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """Bright pixels, so that dimming makes every one of them darker."""
    return Image.fromarray(np.random.default_rng(seed).integers(150, 240, (height, width, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> Array:
    return np.asarray(image.convert("RGB")).astype(np.int64)


def cell(array: Array, index: int, grid: tuple[int, int]) -> Array:
    height, width = array.shape[0] // grid[0], array.shape[1] // grid[1]
    row, column = divmod(index, grid[1])
    return array[row * height : (row + 1) * height, column * width : (column + 1) * width]


@pytest.mark.parametrize("grid", [(12, 12), (6, 8), (1, 3)], ids=str)
def test_kept_tokens_keep_every_pixel_and_dropped_ones_are_dimmed(grid: tuple[int, int]) -> None:
    image = noise(8 * grid[0], 8 * grid[1])
    n = grid[0] * grid[1]
    kept = [i for i in range(n) if i % 3 == 0]
    drawn = draw_kept(image, grid, kept, scale=4)
    assert drawn.size == (4 * image.width, 4 * image.height)
    before, after = pixels(image).repeat(4, 0).repeat(4, 1), pixels(drawn)
    for i in range(n):
        old, new = cell(before, i, grid), cell(after, i, grid)
        if i in kept:
            assert (old == new).all()
            continue
        white = (new == OUTLINE).all(-1)
        assert (new.max(-1) < old.min(-1))[~white].all()
        assert np.ptp(new[~white].mean(0)) < 15  # grey, whatever the image's colours
        assert 0 <= white.mean() < 0.3
    assert (after == OUTLINE).all(-1).any()


def test_the_outline_runs_around_groups_not_between_neighbours() -> None:
    drawn = pixels(draw_kept(noise(32, 32), (4, 4), [5, 6], scale=2))
    assert (drawn[16:32, 16:48] < 255).any(-1).all()  # the two tokens, and the border they share
    assert (drawn[15, 16:48] == 255).all() and (drawn[32, 16:48] == 255).all()
    assert (drawn[16:32, 15] == 255).all() and (drawn[16:32, 48] == 255).all()


def test_all_kept_is_the_image_and_small_images_are_blown_up() -> None:
    image = noise(96, 96)
    drawn = draw_kept(image, (12, 12), range(144))
    assert drawn.size == (SIDE, SIDE)
    assert (pixels(drawn) == pixels(image).repeat(4, 0).repeat(4, 1)).all()


def test_large_images_are_shrunk_and_the_given_one_is_left_alone() -> None:
    image = noise(600, 2048)
    before = pixels(image)
    assert draw_kept(image, (6, 20), [0]).size == (1024, 300)
    assert (pixels(image) == before).all()


def test_tokens_need_not_divide_the_image() -> None:
    drawn = pixels(draw_kept(noise(50, 70), (4, 6), [0, 23], scale=1))
    assert drawn.shape == (50, 70, 3)
    assert (drawn[:12, :11] >= 150).all()


def test_merged_tokens_and_their_slots_are_amber() -> None:
    image = noise(32, 32)
    pairs = torch.tensor(
        [[0, 5], [1, 5], [5, 5], [2, 9]]
    )  # slot 9 is not kept, 5 is also a source of its own
    plain, drawn = (pixels(draw_kept(image, (4, 4), [5, 10], m, scale=4)) for m in (None, pairs))
    for source in (0, 1, 2):
        old, new = cell(plain, source, (4, 4))[4:12, 4:12], cell(drawn, source, (4, 4))[4:12, 4:12]
        assert (new[..., 0] > old[..., 0]).all()
        assert (new[..., 0] > new[..., 2] + 40).all()  # red over blue: amber
    assert (cell(drawn, 3, (4, 4)) == cell(plain, 3, (4, 4))).all()
    assert (cell(drawn, 10, (4, 4)) == cell(plain, 10, (4, 4))).all()
    slot = cell(drawn, 5, (4, 4))
    assert (slot[0] == MERGED).all() and (slot[:, -1] == MERGED).all()
    assert (slot[8:-8, 8:-8] == cell(plain, 5, (4, 4))[8:-8, 8:-8]).all()


def test_a_video_is_drawn_frame_by_frame() -> None:
    frames = [noise(32, 32, seed) for seed in range(4)]
    drawn = draw_kept(frames, Grid(2, 4, 4), [0, 16 + 15], scale=2)
    assert drawn.width > 2 * 64 and drawn.height == 64
    array = pixels(drawn)
    # The second of every two frames stands for both.
    assert (array[:16, :16] == pixels(frames[1]).repeat(2, 0).repeat(2, 1)[:16, :16]).all()
    assert (array[-16:, -16:] == pixels(frames[3]).repeat(2, 0).repeat(2, 1)[-16:, -16:]).all()
    with pytest.raises(ConfigError, match="pass all frames"):
        draw_kept(frames[0], (2, 4, 4), [0])


@pytest.mark.parametrize("kept", [[16], [-1]])
def test_indices_outside_the_grid_are_refused(kept: list[int]) -> None:
    with pytest.raises(ConfigError, match="0 to 15"):
        draw_kept(noise(32, 32), (4, 4), kept)


def test_a_caption_is_a_strip_below_and_wraps() -> None:
    image = noise(96, 96)
    short = draw_kept(image, (12, 12), range(144), caption="all")
    assert short.width == SIDE and short.height > SIDE
    assert (pixels(short)[:SIDE] == pixels(draw_kept(image, (12, 12), range(144)))).all()
    assert pixels(short)[SIDE:].min() < 100  # ink
    longer = add_caption(image, "many words " * 10)
    assert longer.width == 96 and longer.height > 96 + 60
    title = add_caption(image, "word", above=True)
    assert (pixels(title)[-96:] == pixels(image)).all()


def test_tiles_stand_in_rows() -> None:
    pictures = [noise(20, 30), noise(10, 10), noise(5, 40)]
    sheet = tile(pictures, columns=2, gap=4)
    assert sheet.size == (40 + 4 + 10, 20 + 4 + 5)
    assert (pixels(sheet)[24:, :40] == pixels(pictures[2])).all()


def test_a_report_draws_every_image_of_a_row() -> None:  # contract 17
    model = tiny.llava()
    inputs = tiny.inputs(model, [["text:3", "image", "text:4"], ["image", "text:2", "image", "text:1"]])
    side = int(model.config.image_seq_length**0.5)
    with tokenprune.pruned(model, "random", keep=0.5, layer=1), torch.no_grad():
        model(**inputs)
        report = tokenprune.report(model)
    images = [noise(8 * side, 8 * side, seed) for seed in range(2)]
    drawn = draw_report(report, images, row=1, captions=["", ""], scale=1)
    for i, (image, picture) in enumerate(zip(images, drawn, strict=True)):
        array = pixels(picture)[: 8 * side]
        same = [
            (cell(array, t, (side, side)) == cell(pixels(image), t, (side, side))).all()
            for t in range(side * side)
        ]
        assert np.flatnonzero(same).tolist() == report.keep_lists[-1][1][i]
    with pytest.raises(ConfigError, match="has 1 images, but 2 were given"):
        draw_report(report, images)
