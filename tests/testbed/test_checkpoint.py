"""The shipped checkpoint answers held-out questions, with its eyes; and the evaluator counts right."""

import numpy as np
import pytest
import torch

from tokenprune_testbed import MODEL_DIR, Sample, evaluate, evaluation_set, load
from tokenprune_testbed.evaluate import Score, wilson_interval

shipped = pytest.mark.skipif(
    not (MODEL_DIR / "config.json").exists(), reason="no checkpoint in this checkout"
)


@pytest.fixture(scope="module")
def loaded():
    return load()


class _Parrot:
    """Answers the first word of ``replies`` to every prompt, as ``generate`` would."""

    device = torch.device("cpu")

    def __init__(self, reply):
        self.reply = reply
        self.shapes = []

    def generate(self, input_ids, **kwargs):
        self.shapes.append((tuple(input_ids.shape), tuple(kwargs["pixel_values"].shape)))
        return torch.cat([input_ids, torch.tensor(self.reply).expand(len(input_ids), -1)], 1)


@pytest.fixture
def parrot():
    from tokenprune_testbed.modeling import EOS, WORD_IDS, build_processor

    return _Parrot([WORD_IDS["red"], EOS]), build_processor()


def test_exact_match_and_order(parrot):
    model, processor = parrot
    samples = evaluation_set(70)
    seen = []
    result = evaluate(model, processor, samples, batch_size=8, after_generate=seen.append)
    assert result.correct == [s.answer == "red" for s in samples]
    assert result.answers == ["red"] * 70
    assert sorted(i for batch in seen for i in batch) == list(range(70))
    assert result.overall.correct == sum(result.correct) == sum(f.correct for f in result.families.values())
    # One- and two-image prompts are kept apart.
    assert all(len({len(samples[i].images) for i in batch}) == 1 for batch in seen)


def test_mixed_batches_when_asked(parrot):
    model, processor = parrot
    samples = evaluation_set(20)
    evaluate(model, processor, samples, batch_size=20, mix_image_counts=True)
    assert model.shapes == [((20, 1 + 288 + 7), (22, 3, 96, 96))]


@pytest.mark.parametrize("control", ["shuffle_images", "mean_image"])
def test_controls_replace_every_image(parrot, control):
    model, processor = parrot
    images = []
    generate = model.generate
    model.generate = lambda **kwargs: images.append(kwargs["pixel_values"]) or generate(**kwargs)
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (96, 96, 3), dtype=np.uint8) for _ in range(6)]
    samples = [Sample([f], "how many digits ?", "two", "counting") for f in frames]
    evaluate(model, processor, samples)
    evaluate(model, processor, samples, **{control: True})
    plain, changed = images
    assert all((a - b).abs().max() > 0.1 for a, b in zip(plain, changed, strict=True))
    if control == "shuffle_images":
        assert sorted(a.sum().item() for a in plain) == pytest.approx(sorted(b.sum().item() for b in changed))
    else:
        assert changed.flatten(2).std(-1).max() < 1e-4


def test_wilson_interval():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(90, 100)
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)
    assert Score.of([True, True, False, False]).accuracy == 0.5


@shipped
def test_checkpoint_is_small_and_stock(loaded):
    model, processor = loaded
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert sum(f.stat().st_size for f in MODEL_DIR.iterdir()) <= 10_000_000
    assert model.config.text_config.num_hidden_layers == 16
    assert model.config.vision_feature_select_strategy == "default"


@shipped
@pytest.mark.slow
def test_checkpoint_answers_and_needs_its_eyes(loaded):
    samples = evaluation_set(140, seed=5)
    seeing = evaluate(*loaded, samples)
    blind = evaluate(*loaded, samples, shuffle_images=True)
    assert seeing.overall.accuracy >= 0.9, str(seeing)
    assert blind.overall.accuracy <= 0.35, str(blind)


@shipped
@pytest.mark.slow
def test_answers_do_not_depend_on_the_batch(loaded):
    samples = evaluation_set(28, seed=6)
    apart = evaluate(*loaded, samples, batch_size=1)
    together = evaluate(*loaded, samples, batch_size=28, mix_image_counts=True)
    assert apart.answers == together.answers
