"""Pages of print: what stands on them is what is asked, the shipped model reads them, and its training runs."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenprune
from tokenprune_testbed import evaluate, load
from tokenprune_testbed.language import make_inputs
from tokenprune_testbed.modeling import PAGE_WORDS, PAGES, WORDS
from tokenprune_testbed.pages import (
    CHARACTERS,
    FONTS,
    MAX_NEW_TOKENS,
    PRINTED,
    SIZES,
    ask_page,
    evaluation_pages,
    load_letters,
    make_page,
    spoken,
)


def test_numbers_are_spoken_digit_by_digit() -> None:
    assert spoken(("total", "407", "due")) == "total four zero seven due"


@pytest.mark.parametrize("split", ["train", "test"])
def test_what_is_printed_is_what_is_asked(split) -> None:
    for seed in range(40):
        page = make_page(np.random.default_rng(seed), split)
        assert page.image.shape == (96, 96, 3) and page.image.dtype == np.uint8
        printed = "".join(c for line in page.lines for word in line for c in word)
        assert "".join(CHARACTERS[int(k)] for k in page.letters[:, 0]) == printed
        assert (np.diff(page.letters[:, 1]) >= 0).all(), "lines from top to bottom"
        *lines, whole = ask_page(page)
        assert " ".join(qa.answer for qa in lines) == whole.answer
        for word in f"{whole.question} {whole.answer} {lines[0].question}".split():
            assert word in PAGE_WORDS
        assert len(whole.answer.split()) < MAX_NEW_TOKENS


def test_letters_are_where_the_page_says() -> None:
    page = make_page(np.random.default_rng(3))
    grey = page.image.astype(float).mean(-1)
    paper = np.median(grey)
    for _, _, x, y in page.letters:
        box = grey[int(y) - 4 : int(y) + 5, int(x) - 2 : int(x) + 3]
        assert np.abs(box - paper).max() > 40


def test_every_font_has_every_letter_and_splits_share_none() -> None:
    assert not set(FONTS["train"]) & set(FONTS["test"])
    for font in (*FONTS["train"], *FONTS["test"]):
        for size in SIZES:
            letters = load_letters(font, size)
            assert len(letters) == len(CHARACTERS)
            assert all(mask.max() > 0.4 for mask in letters), font


def test_held_out_pages_are_the_same_again() -> None:
    first, again = (evaluation_pages(12, seed=4) for _ in range(2))
    assert [s.answer for s in first] == [s.answer for s in again]
    assert all(np.array_equal(a.images[0], b.images[0]) for a, b in zip(first, again, strict=True))
    assert [s.family for s in first] == ["line", "page"] * 6
    assert all(len(s.answer.split()) >= 64 for s in evaluation_pages(5, least=64))


def test_vocabulary_goes_on_from_the_small_models() -> None:
    assert PAGE_WORDS[: len(WORDS)] == WORDS and len(set(PAGE_WORDS)) == len(PAGE_WORDS)
    assert set(PRINTED) <= set(PAGE_WORDS)
    assert PAGES.ids(ask_page(make_page(np.random.default_rng(0)))[0])[1][-1] == 2


@pytest.fixture(scope="module")
def reader():
    return load("pages")


def test_the_shipped_model_reads(reader) -> None:
    model, processor = reader
    result = evaluate(model, processor, evaluation_pages(60), batch_size=30, max_new_tokens=MAX_NEW_TOKENS)
    assert result.families["line"].accuracy > 0.75 and result.families["page"].accuracy > 0.35
    blind = evaluate(
        model,
        processor,
        evaluation_pages(60),
        batch_size=30,
        max_new_tokens=MAX_NEW_TOKENS,
        shuffle_images=True,
    )
    assert blind.overall.accuracy < 0.1


def test_the_guard_knows_its_pages(reader) -> None:
    model, processor = reader
    inputs = make_inputs(processor, evaluation_pages(8))
    with tokenprune.pruned(model, "uniform", keep=0.3, text_floor=0.8), torch.inference_mode():
        model(**inputs)
        report = tokenprune.report(model)
    assert report.retention_average > 0.78 and len({image.kept for image in report.images}) == 1


def test_training_runs_and_goes_on(tmp_path: Path) -> None:
    from tokenprune_testbed.train_pages import Options, train

    options = Options(layers=2, dense_minutes=0.01, minutes=0.02, batch_size=2, workers=0, evaluated=2)
    train(tmp_path / "a", load.__globals__["MODEL_DIR"], options)
    train(tmp_path / "b", tmp_path / "a" / "model", options)
    for run in ("a", "b"):
        with (tmp_path / run / "curve.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert rows and set(rows[-1]) == {"seconds", "step", "overall", "line", "page"}
    model, _ = load(str(tmp_path / "b" / "model"))
    assert len(model.model.language_model.layers) == 2


@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_masks_of_the_returning_experiment_are_the_librarys_cut(reader, keep) -> None:
    from tokenprune_eval.studies.returning import Rule, Sight, kept_by, read_pages

    model, processor = reader
    samples = evaluation_pages(3, least=64)
    inputs = make_inputs(processor, samples)
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        if keep < 1:
            kept = kept_by(model, inputs, "uniform", 2, keep)
            assert kept.sum(1).tolist() == [round(144 * keep)] * 3
            with tokenprune.pruned(model, "uniform", cuts=[(2, keep)]):
                out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        else:
            kept = torch.ones(3, 144, dtype=torch.bool)
            out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers, seen = read_pages(model, inputs, Sight(model, 2, kept, Rule()))
        _, more = read_pages(model, inputs, Sight(model, 2, kept, Rule(2)))
        _, level = read_pages(model, inputs, Sight(model, 2, kept, Rule(2, swap=True)))
    finally:
        model.set_attn_implementation(before)
    new = out[:, inputs["input_ids"].shape[1] :].tolist()
    assert answers == [row[: row.index(2)] if 2 in row else row for row in new]
    assert seen == pytest.approx(kept.float().mean().item()) == pytest.approx(level)
    assert more > seen if keep < 1 else more == seen
