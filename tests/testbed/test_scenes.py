"""Scenes: rendering, layout and the two splits."""

import numpy as np
import pytest

from tokenprune_testbed.grounds import (
    CELL_SIZE,
    GROUND_ASSETS,
    GROUNDS,
    IMAGE_SIZE,
    PLACES,
    TINTS,
    _textures,
    make_ground,
)
from tokenprune_testbed.scenes import (
    ASSETS,
    COLOR_NAMES,
    COLORS,
    DIGITS,
    GLYPH_SIZE,
    KINDS,
    MOSAIC_SIZES,
    SceneObject,
    load_assets,
    make_scene,
)


def _scenes(count, split="train", **options):
    return [make_scene(np.random.default_rng([5, i]), split, **options) for i in range(count)]


def test_same_seed_same_scene():
    first, second = (make_scene(np.random.default_rng(3), row_length=3) for _ in range(2))
    assert np.array_equal(first.image, second.image)
    assert first.objects == second.objects
    assert not np.array_equal(first.image, make_scene(np.random.default_rng(4), row_length=3).image)


@pytest.mark.parametrize("scenes", ["plain", "mosaic"])
@pytest.mark.parametrize(
    "options", [{}, {"num_objects": 14}, {"row_length": 4}, {"num_objects": 5, "add_digit": True}]
)
def test_objects_fit_and_do_not_overlap(options, scenes):
    for scene in _scenes(40, **options, scenes=scenes):
        assert scene.image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        assert scene.image.dtype == np.uint8
        for i, a in enumerate(scene.objects):
            assert a.kind in KINDS and a.color in COLORS
            assert 0 <= a.x <= IMAGE_SIZE - a.size and 0 <= a.y <= IMAGE_SIZE - a.size
            for b in scene.objects[:i]:
                taken = np.zeros((2, IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
                for mask, obj in zip(taken, (a, b), strict=True):
                    mask[obj.y : obj.y + obj.size, obj.x : obj.x + obj.size] = True
                assert not (taken[0] & taken[1]).any()


def test_default_scenes_have_two_to_seven_freely_placed_objects():
    scenes = _scenes(200)
    assert {len(s.objects) for s in scenes} == set(range(2, 8))
    assert {o.x % 8 for s in scenes for o in s.objects} == set(range(8))


@pytest.mark.parametrize(("scenes", "within"), [("plain", 2), ("mosaic", 12)])
def test_every_object_is_visible_in_its_colour(scenes, within):
    for scene in _scenes(20, scenes=scenes):
        for obj in scene.objects:
            window = scene.image[obj.y : obj.y + obj.size, obj.x : obj.x + obj.size].astype(int)
            distance = np.abs(window - np.array(COLORS[obj.color])).max(-1)
            assert distance.min() <= within


def test_sizes_differ_in_mosaic_scenes_only():
    assert {o.size for s in _scenes(40) for o in s.objects} == {GLYPH_SIZE}
    assert {o.size for s in _scenes(40, scenes="mosaic") for o in s.objects} == set(MOSAIC_SIZES)


def test_every_ninth_shows_its_ground_in_its_tint():
    for i in range(40):
        ground = make_ground(np.random.default_rng([6, i]), "train")
        assert len(ground.cells) == len(PLACES) and set(ground.cells) == set(ground.tints)
        for index, kind in enumerate(ground.cells):
            y, x = (CELL_SIZE * v for v in divmod(index, 3))
            color = ground.image[y : y + CELL_SIZE, x : x + CELL_SIZE].mean((0, 1))
            tint = np.array(TINTS[ground.tints[kind]])
            cosine = (color @ tint) / (np.linalg.norm(color) * np.linalg.norm(tint))
            assert cosine > 0.999


def test_grounds_come_from_halves_of_their_pictures_that_share_no_row_of_pixels():
    for kind in GROUNDS:
        seen, unseen = (_textures()[split][kind] for split in ("train", "test"))
        assert min(seen.shape + unseen.shape) >= CELL_SIZE
        pieces = {seen[y, x : x + 16].tobytes() for y in range(len(seen)) for x in range(seen.shape[1] - 15)}
        assert not any(
            unseen[y, x : x + 16].tobytes() in pieces
            for y in range(len(unseen))
            for x in range(0, unseen.shape[1] - 15, 5)
        )


def test_islands_stripes_and_mixtures_all_occur():
    grounds = [make_ground(np.random.default_rng([7, i]), "test") for i in range(200)]
    assert {len(g.tints) for g in grounds} >= {2, 3, 4, 5}
    assert {kind for g in grounds for kind in g.cells} == set(GROUNDS)
    assert any(len(g.places(kind)) == 1 for g in grounds for kind in g.tints)


def test_row_is_written_left_to_right_and_holds_the_only_digits():
    for scene in _scenes(40, row_length=3, num_objects=6):
        row = [scene.objects[i] for i in scene.row]
        assert len(row) == 3
        assert [o.x for o in row] == sorted(o.x for o in row)
        assert max(o.y for o in row) - min(o.y for o in row) <= 2
        assert [o for o in scene.objects if o.is_digit] == row
        assert len({o.kind for o in row}) == 3


def test_new_digit_is_the_only_difference():
    for scene in _scenes(40, num_objects=4, add_digit=True):
        new = scene.objects[-1]
        assert scene.previous is not None
        changed = (scene.image != scene.previous).any(-1)
        rows, columns = np.nonzero(changed)
        assert changed.any()
        assert rows.min() >= new.y and rows.max() < new.y + GLYPH_SIZE
        assert columns.min() >= new.x and columns.max() < new.x + GLYPH_SIZE
        assert new.is_digit
        assert new.kind not in [o.kind for o in scene.objects[:-1]]


def test_row_and_new_digit_exclude_each_other():
    with pytest.raises(ValueError, match="not both"):
        make_scene(np.random.default_rng(0), row_length=2, add_digit=True)


def test_splits_share_no_glyph_and_no_photograph():
    assets = load_assets()
    for kind in DIGITS:
        pools = assets.glyphs["train"][kind], assets.glyphs["test"][kind]
        seen, unseen = ({mask.tobytes() for mask in pool} for pool in pools)
        assert len(unseen) >= 20
        assert not seen & unseen
    seen, unseen = ({photo.tobytes() for photo in assets.photos[s]} for s in ("train", "test"))
    assert seen and unseen and not seen & unseen


def test_assets_are_small_and_complete():
    assert ASSETS.stat().st_size + GROUND_ASSETS.stat().st_size <= 1_000_000
    with np.load(ASSETS) as archive:
        assert archive["digits"].shape == (1797, 8, 8)
        assert archive["digits"].max() == 16
        assert archive["digit_is_test"].sum() == 397


def test_place_names_the_third_of_the_centre():
    assert SceneObject("star", COLOR_NAMES[0], 0, 0).place == "top left"
    assert SceneObject("star", COLOR_NAMES[0], 41, 82).place == "bottom center"
    assert SceneObject("star", COLOR_NAMES[0], 82, 41).place == "middle right"
    assert SceneObject("star", COLOR_NAMES[0], 26, 41).place_margin == 1.0
