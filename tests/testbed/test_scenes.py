"""Scenes: rendering, layout and the two splits."""

import numpy as np
import pytest

from tokenprune.testbed.scenes import (
    ASSETS,
    COLOR_NAMES,
    COLORS,
    DIGITS,
    GLYPH_SIZE,
    IMAGE_SIZE,
    KINDS,
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


@pytest.mark.parametrize(
    "options", [{}, {"num_objects": 14}, {"row_length": 4}, {"num_objects": 5, "add_digit": True}]
)
def test_objects_fit_and_do_not_overlap(options):
    for scene in _scenes(40, **options):
        assert scene.image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        assert scene.image.dtype == np.uint8
        for i, a in enumerate(scene.objects):
            assert a.kind in KINDS and a.color in COLORS
            assert 0 <= a.x <= IMAGE_SIZE - GLYPH_SIZE and 0 <= a.y <= IMAGE_SIZE - GLYPH_SIZE
            for b in scene.objects[:i]:
                assert abs(a.x - b.x) >= GLYPH_SIZE or abs(a.y - b.y) >= GLYPH_SIZE


def test_default_scenes_have_two_to_seven_freely_placed_objects():
    scenes = _scenes(200)
    assert {len(s.objects) for s in scenes} == set(range(2, 8))
    assert {o.x % 8 for s in scenes for o in s.objects} == set(range(8))


def test_every_object_is_visible_in_its_colour():
    for scene in _scenes(20):
        for obj in scene.objects:
            window = scene.image[obj.y : obj.y + GLYPH_SIZE, obj.x : obj.x + GLYPH_SIZE].astype(int)
            distance = np.abs(window - np.array(COLORS[obj.color])).max(-1)
            assert distance.min() <= 2


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
    assert ASSETS.stat().st_size <= 1_000_000
    with np.load(ASSETS) as archive:
        assert archive["digits"].shape == (1797, 8, 8)
        assert archive["digits"].max() == 16
        assert archive["digit_is_test"].sum() == 397


def test_place_names_the_third_of_the_centre():
    assert SceneObject("star", COLOR_NAMES[0], 0, 0).place == "top left"
    assert SceneObject("star", COLOR_NAMES[0], 41, 82).place == "bottom center"
    assert SceneObject("star", COLOR_NAMES[0], 82, 41).place == "middle right"
    assert SceneObject("star", COLOR_NAMES[0], 26, 41).place_margin == 1.0
