"""The Entropy Collapse Layer: its statistics on curves made by hand, its record, and `layer="auto"`."""

import copy
import json
import math

import numpy as np
import pytest
import torch

import tiny
import tokenprune
from tokenprune import ConfigError, NoCollapseError
from tokenprune.analysis.collapse import find_collapse
from tokenprune.fingerprint import fingerprint
from tokenprune.profiles.collapse import Collapse, collapse_path, read_collapse

pytestmark = pytest.mark.usefixtures("cache")


def curves(drops, images=40, noise=0.01, seed=0):
    """(images, L + 1) curves that fall by drops[l] on entering layer l + 1, each image with noise of its own."""
    rng = np.random.default_rng(seed)
    mean = 0.9 - np.concatenate([[0], np.cumsum(drops)])
    return mean + noise * rng.standard_normal((images, len(mean)))


# -- the statistics -------------------------------------------------------------------------------------------------


def test_a_clear_collapse():
    found = find_collapse(curves([0.0, 0.0, 0.2, 0.05, 0, 0, 0, 0]))
    assert (found.layer, found.clear, found.runner_up, found.source) == (3, True, 4, "detected")
    assert found.verdict().startswith("clear collapse")
    assert found.drop[3] == pytest.approx(0.2, abs=0.01) and found.drop[0] == 0
    assert len(found.mean) == 9


def test_only_the_first_half_is_searched():
    found = find_collapse(curves([0, 0.05, 0, 0, 0.5, 0, 0, 0]))
    assert (found.layer, found.clear) == (2, True)
    assert find_collapse(curves([0, 0, 0, 0.3, 0.5, 0, 0, 0])).layer == 4


def test_a_flat_curve_is_not_clear():
    found = find_collapse(curves([0.0] * 8))
    assert not found.clear
    assert "no clear collapse" in found.verdict()


def test_two_like_drops_are_not_clear():
    found = find_collapse(curves([0.1, 0, 0.1, 0, 0, 0, 0, 0]))
    assert not found.clear and {found.layer, found.runner_up} == {1, 3}
    assert "at layer" in found.verdict()


def test_the_bootstrap_is_paired():
    """Images that differ by far more than the drop, all by the same at every layer: the drop is still certain."""
    offset = np.random.default_rng(1).normal(0, 0.3, (40, 1))
    found = find_collapse(curves([0, 0.02, 0, 0], noise=0.001) + offset)
    assert found.clear and found.layer == 2
    assert found.high[1] - found.low[1] > 0.1 > 10 * (found.drop_high[2] - found.drop_low[2])


def test_the_interval_is_the_normal_one_of_many_images():
    values = curves([0.1, 0.0, 0.0, 0.0], images=400, noise=0.05)
    found = find_collapse(values)
    error = values.std(0, ddof=1) / math.sqrt(400)
    assert np.allclose(found.low, values.mean(0) - 1.96 * error, atol=0.1 * error.max())
    assert np.allclose(found.high, values.mean(0) + 1.96 * error, atol=0.1 * error.max())
    drops = values[:, :-1] - values[:, 1:]
    assert found.drop_low[1] == pytest.approx(
        drops[:, 0].mean() - 1.96 * drops[:, 0].std(ddof=1) / 20, abs=1e-3
    )
    assert find_collapse(values) == found  # seeded
    assert find_collapse(values, seed=1).low != found.low


def test_images_without_a_value_are_left_out_and_counted():
    values = curves([0, 0.2, 0, 0], images=20)
    values[3, 1] = values[7, 4] = np.nan
    found = find_collapse(values)
    assert (found.images, found.excluded) == (18, 2)
    values[10:13, 0] = np.nan
    with pytest.raises(ConfigError, match=r"at least 16 images .* not 15 \(5 more were left out"):
        find_collapse(values)


# -- on a model -----------------------------------------------------------------------------------------------------


def calls(model, images=16):
    return [tiny.inputs(model, [["text:3", "image", "text:4"]] * 4, seed=seed) for seed in range(images // 4)]


def collapsing(layer=2):
    """A model whose tokens fall into two clusters on entering `layer`: the layer before it throws each far along
    one direction, to the side that the sign of its first feature says."""
    model = tiny.llava(layers=6)
    block = model.model.language_model.layers[layer - 1]
    direction = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def push(module, args, output):
        return output + 50 * torch.tanh(100 * output[..., :1]) * direction

    block.register_forward_hook(push)
    return model


def test_detect_save_and_use():
    model = collapsing()
    found = tokenprune.detect_ecl(model, calls(model))
    assert (found.layer, found.clear, found.images) == (2, True, 16)
    assert found.model == fingerprint(model)
    assert read_collapse(collapse_path(found.model)) == found
    inputs = calls(model)[0]
    with tokenprune.pruned(model, keep=0.5, layer="auto"), torch.no_grad():
        model(**inputs)
        report = tokenprune.report(model)
        assert report.layers_cut == (2,)
        assert "detected on 16 images by von_neumann" in str(report)
        with tokenprune.override(model, layer=1):
            model(**inputs)
            assert tokenprune.report(model).layers_cut == (1,)


def test_no_clear_collapse_is_an_error_with_the_curve():
    model = tiny.llava(layers=6)
    with pytest.raises(NoCollapseError, match=r"no clear collapse.*fallback_layer") as caught:
        tokenprune.detect_ecl(model, calls(model))
    assert len(caught.value.collapse.mean) == 7 and not caught.value.collapse.clear
    assert not collapse_path(fingerprint(model)).exists()
    found = tokenprune.detect_ecl(model, calls(model), fallback_layer=4)
    assert (found.layer, found.source, found.clear) == (4, "fallback", False)
    with tokenprune.pruned(model, keep=0.8, layer="auto"), torch.no_grad():
        model(**calls(model)[0])
        assert "fallback on 16 images" in str(tokenprune.report(model))


def test_auto_before_anything_was_detected():
    model = tiny.llava()
    with pytest.raises(ConfigError, match=r"none was yet: run tokenprune\.detect_ecl"):
        tokenprune.wrap(model, keep=0.5, layer="auto")
    assert not tokenprune.is_wrapped(model)
    with pytest.raises(ConfigError, match="or 'auto', not 'first'"):
        tokenprune.wrap(model, keep=0.5, layer="first")


def test_another_models_layer_is_not_taken():
    model = tiny.llava()
    tokenprune.detect_ecl(model, calls(model), fallback_layer=2)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.language_model.layers[3].mlp.up_proj.weight.add_(0.1)
    with pytest.raises(ConfigError, match="none was yet"):
        tokenprune.wrap(other, keep=0.5, layer="auto")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {**d, "layer": 100}, "the layer on them"),
        (lambda d: {**d, "layer": "2; import os"}, "layer"),
        (lambda d: {**d, "layer": "2"}, "layer: .*valid integer"),
        (lambda d: {**d, "layer": 2.0}, "layer: .*valid integer"),
        (lambda d: {**d, "layer": True}, "layer: .*valid integer"),
        (lambda d: {**d, "clear": 1}, "clear: .*valid boolean"),
        (lambda d: {**d, "estimator": "\x1b[31mred"}, "estimator: "),
        (lambda d: {**d, "model": "../../etc/passwd"}, "model: "),
        (lambda d: {**d, "mean": d["mean"][:-1]}, "of one length"),
        (lambda d: {**d, "mean": [float("nan")] * len(d["mean"])}, r"mean.0: .*finite"),
        (lambda d: {**d, "version": 2}, "version"),
        (lambda d: {**d, "hook": "x"}, "hook: Extra inputs"),
        (lambda d: [d], "the document"),
        (lambda d: {**d, "model": "0" * 32}, "is of another model"),
    ],
)
def test_a_file_that_was_tampered_with(change, message):
    model = tiny.llava()
    found = tokenprune.detect_ecl(model, calls(model), fallback_layer=2)
    path = collapse_path(found.model)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ConfigError, match=message):
        tokenprune.wrap(model, keep=0.5, layer="auto")
    path.write_text(" " * (2**20 + 1))
    with pytest.raises(ConfigError, match="too large"):
        tokenprune.wrap(model, keep=0.5, layer="auto")
    path.write_bytes(b"\x80\x04\x95")  # the beginning of a pickle
    with pytest.raises(ConfigError, match="is no detected layer"):
        tokenprune.wrap(model, keep=0.5, layer="auto")


@pytest.mark.parametrize("layer", [0, 6, 2.0, True, "2"])
def test_fallback_layer_is_checked(layer):
    model = tiny.llava(layers=6)
    model.register_forward_pre_hook(lambda *_: pytest.fail("measured before it was refused"))
    with pytest.raises(ConfigError, match="fallback_layer must be an int from 1 to 5"):
        tokenprune.detect_ecl(model, calls(model), fallback_layer=layer)


def test_a_cache_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKENPRUNE_CACHE", str(tmp_path / "file"))
    model = collapsing()
    inputs = calls(model)
    handle = model.register_forward_pre_hook(lambda *_: pytest.fail("measured before it was refused"))
    with pytest.raises(ConfigError, match="set TOKENPRUNE_CACHE"):
        tokenprune.detect_ecl(model, inputs)
    handle.remove()
    found = tokenprune.detect_ecl(model, inputs, save=False)
    assert (found.layer, found.model) == (2, "")


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": 1.5}, {"resamples": 0}, {"resamples": True}])
def test_bootstrap_arguments_are_checked(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be an int"):
        find_collapse(curves([0, 0.2, 0, 0]), **wrong)


def test_the_record_survives_json():
    found = find_collapse(curves([0, 0.2, 0, 0]), "von_neumann")
    assert Collapse.model_validate_json(found.model_dump_json()) == found


# -- fingerprints ---------------------------------------------------------------------------------------------------


def test_fingerprint_is_of_the_weights_and_config():
    model = tiny.llava(dtype=torch.bfloat16)
    own = fingerprint(model)
    assert len(own) == 32
    assert fingerprint(copy.deepcopy(model)) == own
    assert fingerprint(copy.deepcopy(model).float()) != own
    assert fingerprint(tiny.llava(dtype=torch.bfloat16, attn_implementation="eager")) == own
    with tokenprune.pruned(model, keep=0.5, layer=1):
        assert fingerprint(model) == own
    assert fingerprint(tiny.llava(dtype=torch.bfloat16, seed=1)) != own
    assert fingerprint(tiny.llava(dtype=torch.bfloat16, layers=5)) != own
    changed = copy.deepcopy(model)
    changed.config.text_config.rms_norm_eps = 1e-3
    assert fingerprint(changed) != own
