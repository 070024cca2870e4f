"""The page itself (Gradio): inputs on the left, both answers, their costs and what was kept on the right."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from tokenprune import tables
from tokenprune.app.asking import Asking, Shown, Stages
from tokenprune.methods import find_all

MOST_STAGES = 3
NOTHING = "&nbsp;"
CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
#whole, #pruned { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px 14px; }
#whole, #pruned { min-height: 84px; }
#whole p, #pruned p { font-size: 1.05rem; overflow-wrap: anywhere; margin: 2px 0; }
#costs table { width: 100%; font-variant-numeric: tabular-nums; }
#costs td:not(:first-child), #costs th:not(:first-child) { text-align: right; white-space: nowrap; }
@media (max-width: 640px) { #costs td, #costs th { padding: 5px 6px; font-size: 0.85rem; } }
#trouble { color: #be123c; }
footer { display: none !important; }
"""


def build(asking: Asking, examples: Sequence[tuple[Image.Image, str]]) -> gr.Blocks:
    """The page for a model.

    Args:
        asking: the model.
        examples: pictures with a question each.
    """
    methods = ["auto", *sorted(find_all())]
    with gr.Blocks(title=f"tokenprune: {asking.name}", analytics_enabled=False) as page:
        gr.Markdown(f"## tokenprune: {asking.name}\nOne picture, one question, whole and pruned.")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                picture = gr.Image(type="pil", label="Picture", height=280, sources=["upload", "clipboard"])
                question = gr.Textbox(label="Question", elem_id="question", submit_btn=False)
                with gr.Row():
                    method = gr.Dropdown(
                        methods, value="auto", label="Method", elem_id="method", min_width=150
                    )
                    keep = gr.Slider(
                        5, 100, 25, step=1, label="Tokens kept, %", elem_id="keep", min_width=150
                    )
                with gr.Accordion("Stages of your own", open=False):
                    count = gr.Slider(0, MOST_STAGES, 0, step=1, label="How many cuts (0: the method's own)")
                    stages = [_stage_sliders(asking.layers, number) for number in range(MOST_STAGES)]
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=3, min_width=320):
                trouble = gr.Markdown(NOTHING, elem_id="trouble")
                with gr.Row():
                    whole = gr.Markdown("**Whole**", elem_id="whole", min_width=150)
                    shorter = gr.Markdown("**Pruned**", elem_id="pruned", min_width=150)
                costs = gr.Markdown(elem_id="costs")
                kept = gr.Image(
                    label="Kept, cut by cut; amber: stands for others, too",
                    interactive=False,
                    elem_id="kept",
                    buttons=["download", "fullscreen"],
                )
                with gr.Accordion("As Python", open=False):
                    python = gr.Code(language="python", interactive=False, elem_id="python", wrap_lines=True)
        if examples:
            gr.Examples([list(own) for own in _saved(examples)], [picture, question], label="Examples")
        sliders = [slider for pair in stages for slider in pair]
        outputs = [trouble, whole, shorter, costs, kept, python]

        def answer(given: Any, text: str, name: str, percent: float, cuts: int, *values: float) -> list[Any]:
            return _answer(asking, given, text, name, percent, list(_pairs(cuts, values)))

        for event in (ask.click, question.submit):
            event(answer, [picture, question, method, keep, count, *sliders], outputs, api_name=False)
    return page


def _stage_sliders(layers: int, number: int) -> tuple[gr.Slider, gr.Slider]:
    with gr.Row():
        layer = gr.Slider(
            0,
            layers - 1,
            number * layers // MOST_STAGES,
            step=1,
            label=f"cut {number + 1}: layer",
            min_width=120,
        )
        share = gr.Slider(
            1, 100, 60 - 20 * number, step=1, label="kept, % (the last: by budget)", min_width=120
        )
    return layer, share


def _pairs(cuts: int, values: Sequence[float]) -> Stages:
    return [(int(values[2 * i]), values[2 * i + 1] / 100) for i in range(int(cuts))]


def _answer(
    asking: Asking, picture: Any, question: str, method: str, percent: float, stages: Stages
) -> list[Any]:
    """The page's outputs; whatever goes wrong is text on it."""
    try:
        shown = asking.ask(picture, question, method, percent / 100, stages)
    except Exception as error:  # a page that dies tells nobody anything
        text = " ".join(str(error).split()) or type(error).__name__
        return [_plain(text), "**Whole**", "**Pruned**", "", None, ""]
    return [
        NOTHING,
        f"**Whole**\n\n{_plain(shown.whole.text) or '(nothing)'}",
        f"**Pruned** ({shown.report.method})\n\n{_plain(shown.pruned.text) or '(nothing)'}",
        _costs(shown),
        shown.pictures[0],
        shown.python,
    ]


def _plain(text: str) -> str:
    """A model's or an error's words, of which Markdown and HTML make nothing."""
    return "".join(f"&#{ord(c)};" if c in "\\`*_{}[]()<>#+-!|~&$" else c for c in text)


def _costs(shown: Shown) -> str:
    whole, own, told = shown.whole, shown.pruned, shown.report
    rows = (
        ("visual tokens, mean over layers", f"{told.tokens}", f"{told.retention_average * told.tokens:.0f}"),
        ("prompt after the last cut", f"{whole.tokens}", f"{own.tokens}"),
        ("KV cache of the prompt", f"{whole.kv / 1e6:.2f} MB", f"{own.kv / 1e6:.2f} MB"),
        ("first token", f"{1e3 * whole.first:.0f} ms", f"{1e3 * own.first:.0f} ms"),
        ("whole answer", f"{1e3 * whole.seconds:.0f} ms", f"{1e3 * own.seconds:.0f} ms"),
        ("prefill FLOPs", "1", f"{told.flops / told.flops_unpruned:.2f}"),
        ("drift of the last state", "0", f"{shown.drift:.4f}"),
    )
    return tables.markdown(["", "whole", "pruned"], rows)


def _saved(examples: Sequence[tuple[Image.Image, str]]) -> list[tuple[str, str]]:
    """Gradio shows files."""
    folder = Path(tempfile.mkdtemp(prefix="tokenprune-"))
    saved = []
    for number, (picture, question) in enumerate(examples):
        path = folder / f"{number}.png"
        picture.save(path)
        saved.append((str(path), question))
    return saved


def serve(page: gr.Blocks, host: str, port: int | None) -> str:
    """Begin to serve it, in a thread; its address. Nothing is shared beyond the host named.

    Args:
        page: from `build`.
        host: address to listen at.
        port: None: the first free one from 7860 on.
    """
    theme = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="teal"
    )
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        theme=theme,
        css=CSS,
        footer_links=[],
    )
    return str(page.local_url)
