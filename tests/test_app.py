"""The page: what it asks, and itself in a real browser."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tokenprune
from tokenprune.app.asking import Asking
from tokenprune.errors import ConfigError
from tokenprune_testbed import evaluation_set, load
from tokenprune_testbed.questions import known_words

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
SAMPLE = [sample for sample in evaluation_set(40) if len(sample.images) == 1][8]
PICTURE = Image.fromarray(SAMPLE.images[0])


@pytest.fixture(scope="module")
def asking() -> Asking:
    return Asking("small", *load("small"), read=known_words)


@pytest.mark.parametrize(
    ("method", "stages"), [("auto", []), ("vflowopt", [(0, 0.6), (4, 0.4), (8, 0.1)]), ("none", [])]
)
def test_both_answers_and_what_they_cost(asking: Asking, method: str, stages: Any) -> None:
    shown = asking.ask(PICTURE, SAMPLE.question, method, 0.4, stages)
    assert shown.whole.text == SAMPLE.answer and shown.whole.tokens > 144
    if method == "none":
        assert (shown.pruned.text, shown.pruned.kv) == (shown.whole.text, shown.whole.kv)
        assert shown.drift == pytest.approx(0, abs=1e-6)
    else:
        assert shown.report.retention_average == pytest.approx(0.4, abs=0.02)
        assert shown.pruned.kv < 0.6 * shown.whole.kv and 0 < shown.drift < 0.5
    assert not stages or list(shown.report.layers_cut) == [0, 4, 8]
    assert len(shown.pictures) == 1 and not tokenprune.is_wrapped(asking.model)


@pytest.mark.parametrize(
    ("picture", "question", "method", "stages", "text"),
    [
        (None, "what color is the star ?", "auto", [], "give a picture"),
        (PICTURE, " ", "auto", [], "ask something"),
        (PICTURE, "who is this ?", "auto", [], "does not know"),
        (PICTURE, "what color is the star ?", "auto", [(0, 0.5)], "brings its own stages"),
        (PICTURE, "what color is the star ?", "uniform", [(9, 0.5)], "cannot be reached"),
        (PICTURE, "what color is the star ?", "nosuch", [], "unknown method"),
    ],
)
def test_what_cannot_be_is_said(
    asking: Asking, picture: Any, question: str, method: str, stages: Any, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        asking.ask(picture, question, method, 0.2, stages)
    assert not tokenprune.is_wrapped(asking.model)


def test_the_code_it_shows_says_the_same(
    asking: Asking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    PICTURE.save("photo.jpg", quality=100, subsampling=0)
    shown = asking.ask(Image.open("photo.jpg"), SAMPLE.question, "merge", 0.3, [])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(shown.python, "shown", "exec"), {})
    assert printed.getvalue().startswith(f"{shown.pruned.text}\ntokenprune: merge")


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(asking: Asking) -> Iterator[str]:
    pytest.importorskip("gradio")
    from tokenprune.app.page import build, serve

    page = build(asking, [(PICTURE, SAMPLE.question)])
    yield serve(page, "127.0.0.1", None)
    page.close()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_the_page_in_a_browser(address: str, width: int, height: int, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    PICTURE.save(tmp_path / "picture.png")
    said: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        strange: list[str] = []
        page.on(
            "request", lambda request: strange.append(request.url) if address not in request.url else None
        )
        page.goto(address)
        page.set_input_files("input[type=file]", tmp_path / "picture.png")
        question = page.locator("#question textarea")
        question.fill("who is this ?")
        page.locator("#ask").click()
        page.get_by_text("does not know").wait_for(timeout=60_000)
        question.fill(SAMPLE.question)
        page.locator("#keep input[type=number]").fill("40")
        page.locator("#keep input[type=number]").press("Tab")
        page.locator("#ask").click()
        page.locator("#costs table").wait_for(timeout=60_000)
        page.locator("#kept img").wait_for(timeout=60_000)
        page.wait_for_function("document.querySelector('#kept img').naturalWidth > 100", timeout=60_000)
        assert SAMPLE.answer in page.locator("#whole").inner_text()
        assert page.locator("#trouble").inner_text().strip() == ""
        row = page.locator("#costs tr").nth(1).inner_text().split()
        assert row[-2] == "144" and 55 <= int(row[-1]) <= 60, row  # 40 % of them
        page.get_by_text("As Python").click()
        page.get_by_text("tokenprune.wrap").first.wait_for(timeout=60_000)
        kept = Path(os.environ.get("TOKENPRUNE_SCREENSHOTS", tmp_path))  # to look at them
        page.screenshot(path=kept / f"page_{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    assert not said, said
    assert not [url for url in strange if not url.startswith(("data:", "blob:"))], strange
    assert (kept / f"page_{width}.png").stat().st_size > 20_000
