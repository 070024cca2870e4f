"""Pictures of kept tokens, pixel by pixel."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import tiny
import tokenprune
from tokenprune.draw import MERGED, OUTLINE, SIDE, add_caption, draw_kept, draw_report, stands_for, tile
from tokenprune.errors import ConfigError
from tokenprune.methods import Grid
from tokenprune.tiling import lay_out

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


def test_the_more_a_token_stands_for_the_more_amber_it_is() -> None:
    image = noise(32, 32)
    # Slot 9 is not kept; 5, which is also a source of its own, stands for four, 10 for two.
    pairs = torch.tensor([[0, 5], [1, 5], [3, 5], [5, 5], [2, 9], [4, 10]])
    plain, drawn = (pixels(draw_kept(image, (4, 4), [5, 10, 12], m, scale=4)) for m in (None, pairs))
    for untouched in (0, 1, 2, 3, 9, 12):  # a merged token fades like any that went
        assert (cell(drawn, untouched, (4, 4)) == cell(plain, untouched, (4, 4)))[4:-4, 4:-4].all()
    amber = []
    for slot in (5, 10):
        new, old = cell(drawn, slot, (4, 4)), cell(plain, slot, (4, 4))
        assert (new[0] == MERGED).all() and (new[:, -1] == MERGED).all()
        amber.append((old[4:-4, 4:-4, 2] - new[4:-4, 4:-4, 2]).mean())
    assert amber[0] > amber[1] + 20 and amber[1] > 20


def test_what_stood_for_several_passes_them_on() -> None:
    assert stands_for([[(0, 1), (2, 1), (1, 1)], [(1, 3), (4, 3), (4, 5)]]) == {3: 1 + 3 + 0.5, 5: 1.5}
    assert stands_for([]) == {} and stands_for([[(7, 7)]]) == {}


@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (3, 2), (1, 6), (6, 1)])
def test_tiles_lie_as_the_picture_does(rows: int, columns: int) -> None:
    part = SimpleNamespace(kind="image", grids=((7, 2, 2),), continues=False, cell=None)
    ((whole, thumbnail),) = lay_out([part], [Image.new("RGB", (30 * columns, 28 * rows))])
    assert whole.tokens.shape == (2 * rows, 2 * columns) and thumbnail.tokens.tolist() == [[24, 25], [26, 27]]
    for tile_number in range(6):
        r, c = divmod(tile_number, columns)
        own = whole.tokens[2 * r : 2 * r + 2, 2 * c : 2 * c + 2]
        assert own.flatten().tolist() == list(range(4 * tile_number, 4 * tile_number + 4))


def test_crops_that_are_images_of_their_own_make_one_picture_again() -> None:
    model = tiny.smolvlm()
    inputs = tiny.inputs(model, [["text:2", "image:2x3", "text:1", "image:1x1", "image:2x1", "text:3"]])
    with tokenprune.pruned(model, "random", keep=0.5, layer=0), torch.no_grad():
        model(**inputs)
        report = tokenprune.report(model)
    pictures = [noise(60, 90), noise(30, 30), noise(80, 40)]
    views = lay_out(report.images, pictures)
    assert [[view.tokens.shape for view in own] for own in views] == [
        [(6, 9), (3, 3)],
        [(3, 3)],
        [(6, 3), (3, 3)],
    ]
    assert views[0][0].tokens[0].tolist() == [*range(3), *range(9, 12), *range(18, 21)]
    assert sorted(t for own in views for v in own for t in v.tokens.flat) == list(
        range(sum(i.tokens for i in report.images))
    )
    assert len(report.draw(pictures)) == 3
    with pytest.raises(ConfigError, match="has 3 pictures, but 1 were given"):
        report.draw(pictures[:1])


def test_stages_stand_side_by_side() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, [["text:3", "image", "text:4"]])
    with tokenprune.pruned(model, "vflowopt", keep=0.5), torch.no_grad():
        model(**inputs)
        report = tokenprune.report(model)
    (one,), (several,) = (report.draw([noise(40, 40)], stages=stages) for stages in (False, True))
    assert len(report.layers_cut) > 1 and several.width > len(report.layers_cut) * one.width


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
    with pytest.raises(ConfigError, match="has 1 pictures, but 2 were given"):
        draw_report(report, images)
