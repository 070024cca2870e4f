"""Training's shortcuts change nothing: packed questions equal single ones, grown models equal small ones."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tokenprune_testbed.dense import (
    BACKGROUND,
    DenseHead,
    dense_scenes,
    dense_targets,
    patch_objects,
    pixel_values,
)
from tokenprune_testbed.grounds import COLUMN_WORDS, GROUNDS, ROW_WORDS, TINT_NAMES
from tokenprune_testbed.language import PATCH_WORDS
from tokenprune_testbed.modeling import BOS, IMAGE, NUM_VISUAL_TOKENS, SMALL, build_model
from tokenprune_testbed.packing import IGNORE, answer_loss, make_batch
from tokenprune_testbed.scenes import GLYPH_SIZE, make_scene
from tokenprune_testbed.train import Phase, cosine, grow_depth


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(num_layers=2).eval()


def _features(model, batch):
    return model.model.vision_tower(batch.pixels).last_hidden_state[:, 1:]


@pytest.mark.parametrize("scenes", ["plain", "mosaic"])
@pytest.mark.parametrize("two_images", [False, True])
def test_isolated_questions_equal_single_prompts(model, two_images, scenes):
    batch = make_batch(np.random.default_rng(1), 2, SMALL, two_images=two_images, scenes=scenes)
    images = 1 + two_images
    total, count = 0.0, 0
    with torch.inference_mode():
        packed = answer_loss(model, batch, _features(model, batch))[0]
        for row in range(2):
            for number in range(int(batch.questions[row].max()) + 1):
                mine = batch.questions[row] == number
                prefix = torch.tensor([BOS] + [IMAGE] * (images * NUM_VISUAL_TOKENS))
                ids = torch.cat([prefix, batch.ids[row][mine]])[None]
                pixels = batch.pixels[row * images : (row + 1) * images]
                logits = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits
                labels = batch.labels[row][mine]
                total += F.cross_entropy(
                    logits[0, len(prefix) :], labels, ignore_index=IGNORE, reduction="sum"
                ).item()
                count += int((labels != IGNORE).sum())
    assert packed.item() == pytest.approx(total / count, rel=1e-4)


def test_chained_questions_equal_one_long_prompt(model):
    batch = make_batch(np.random.default_rng(1), 1, SMALL, chained=True)
    with torch.inference_mode():
        packed = answer_loss(model, batch, _features(model, batch))[0]
        ids = torch.cat([torch.tensor([BOS] + [IMAGE] * NUM_VISUAL_TOKENS), batch.ids[0]])[None]
        logits = model(input_ids=ids, pixel_values=batch.pixels, attention_mask=torch.ones_like(ids)).logits
    alone = F.cross_entropy(logits[0, 1 + NUM_VISUAL_TOKENS :], batch.labels[0], ignore_index=IGNORE)
    assert packed.item() == pytest.approx(alone.item(), rel=1e-4)


def test_kept_tokens_show_the_objects_first(model):
    scene = make_scene(np.random.default_rng(7), num_objects=3)
    shown = {i for i, owner in enumerate(patch_objects(scene)) if owner >= 0}
    batch = make_batch(np.random.default_rng(3), 4, SMALL, visual_tokens=60)
    assert batch.kept.shape == (4, 60)
    assert (batch.kept.diff(dim=1) > 0).all()
    assert 6 <= len(shown) <= 27


def test_patch_objects_follow_the_boxes():
    scene = make_scene(np.random.default_rng(0), num_objects=6)
    owners = patch_objects(scene).reshape(12, 12)
    for index, obj in enumerate(scene.objects):
        x, y = (int(v // 8) for v in obj.center)
        assert owners[y, x] == index
        away = owners.copy()
        away[
            obj.y // 8 : (obj.y + GLYPH_SIZE - 1) // 8 + 1, obj.x // 8 : (obj.x + GLYPH_SIZE - 1) // 8 + 1
        ] = BACKGROUND
        assert not (away == index).any()


def test_patches_of_the_ground_name_what_was_drawn_there():
    scenes = [make_scene(np.random.default_rng([4, i]), num_objects=5, scenes="mosaic") for i in range(6)]
    targets = dense_targets(scenes)
    for i, scene in enumerate(scenes):
        cells = np.array(scene.ground.cells).reshape(3, 3)
        for patch in range(NUM_VISUAL_TOKENS):
            y, x = divmod(patch, 12)
            said = {
                role: words[index] if (index := int(getattr(targets, role)[i, patch])) >= 0 else None
                for role, words in PATCH_WORDS.items()
            }
            if targets.background[i, patch]:
                kind = cells[y // 4, x // 4]
                row, column = ROW_WORDS[y // 4], COLUMN_WORDS[x // 4]
                expected = (kind, scene.ground.tints[kind], row, column)
                assert tuple(said.values()) == expected
            else:
                assert said["kind"] not in GROUNDS and said["color"] not in TINT_NAMES
    plain = dense_targets([make_scene(np.random.default_rng(4), num_objects=5)])
    assert (plain.kind[plain.background] == IGNORE).all()


def test_growing_keeps_the_function(model):
    batch = make_batch(np.random.default_rng(2), 2, SMALL)
    grown = grow_depth(model, 5).eval()
    assert len(grown.model.language_model.layers) == 5
    with torch.inference_mode():
        before, after = (answer_loss(m, batch, _features(m, batch))[0] for m in (model, grown))
    assert after.item() == pytest.approx(before.item(), rel=1e-5)


def test_dense_loss_reaches_tower_projector_and_words(model):
    scenes = [
        scene
        for kind in ("mosaic", "plain")
        for scene in dense_scenes(np.random.default_rng(0), 2, scenes=kind)
    ]
    loss, accuracy = DenseHead()(model, pixel_values([s.image for s in scenes]), dense_targets(scenes))
    loss.backward()
    for module in (
        model.model.vision_tower.encoder,
        model.model.multi_modal_projector,
        model.get_input_embeddings(),
    ):
        assert sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None) > 0
    assert set(accuracy) == {"object", "kind", "ground", "place"}
    model.zero_grad()


def test_schedule():
    assert Phase.parse("16x144:45") == Phase(16, 144, 45.0)
    assert cosine(0.0, 0, 100) == pytest.approx(0.01)
    assert cosine(0.0, 99, 100) == 1.0
    assert cosine(1.0, 500, 100) == pytest.approx(0.0)
