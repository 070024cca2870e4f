"""What the page asks of a model: one question whole and pruned, with what both cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from tokenprune import testbeds
from tokenprune.analysis.calibration import make_prompt
from tokenprune.analysis.memory import Memory, last_state
from tokenprune.api import pruned, report
from tokenprune.errors import ConfigError
from tokenprune.models import find_family, stock_model
from tokenprune.reporting import Report
from tokenprune.timing import FirstToken, now
from tokenprune.tune.drift import cosine_of

Stages = list[tuple[int, float]]


@dataclass(frozen=True)
class Answer:
    """One way of answering.

    Attributes:
        text: of the answer.
        tokens: of the prompt, in the last layer.
        kv: bytes of the prompt's keys and values.
        first, seconds: until the first token, and until the last.
    """

    text: str
    tokens: int
    kv: int
    first: float
    seconds: float


@dataclass(frozen=True)
class Shown:
    """What came of a question.

    Attributes:
        whole, pruned: the answers.
        drift: 1 - cosine of the prompt's last state.
        report: of the pruned prompt.
        pictures: what was kept, cut by cut.
        python: the same as code.
    """

    whole: Answer
    pruned: Answer
    drift: float
    report: Report
    pictures: list[Image.Image]
    python: str


@dataclass
class Asking:
    """A model that is asked.

    Attributes:
        name: it was loaded by.
        model, processor: stock.
        read: a question as this model has it (the testbed's small one knows few words).
        max_new_tokens: of an answer.
    """

    name: str
    model: Any
    processor: Any
    read: Callable[[str], str] = field(default=lambda text: text)
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        self.inner = stock_model(self.model)
        self.layers = len(find_family(self.inner).layers())

    def ask(
        self, picture: Image.Image | None, question: str, method: str, keep: float, stages: Stages
    ) -> Shown:
        """Ask whole and pruned.

        Args:
            picture: RGB.
            question: about it.
            method: a name.
            keep: share of the visual tokens, on average over layers.
            stages: cuts of one's own, (layer, share of the original tokens); the last one's share is solved from
                `keep`. Empty: the method's own.

        Raises:
            ConfigError: no picture or question, or a setting that cannot be.
        """
        if picture is None:
            raise ConfigError("give a picture first: drop one, or take an example")
        if not question.strip():
            raise ConfigError("ask something about the picture")
        arguments = _arguments(method, keep, stages)
        inputs = make_prompt(self.processor, [picture.convert("RGB")], self.read(question))
        inputs = inputs.to(self.inner.device, dtype=self.inner.dtype)
        with pruned(
            self.model, **arguments
        ):  # first: what cannot be is refused before anything is waited for
            shorter = self._answer(inputs)
            told = report(self.model)
            state = last_state(self.inner, inputs).state
        with pruned(self.model, "none"):
            whole = self._answer(inputs)
        drift = float(cosine_of(state, Memory().reference(self.model, inputs).state))
        pictures = told.draw([picture], processor=self.processor, stages=True)
        return Shown(whole, shorter, drift, told, pictures, self._as_python(question, arguments))

    def _answer(self, inputs: Mapping[str, Any]) -> Answer:
        device = inputs["input_ids"].device
        first = FirstToken(device)
        with torch.inference_mode():
            self.model.generate(
                **inputs, max_new_tokens=1, do_sample=False
            )  # who goes first must not be the slower
            began = now(device)
            output = self.model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, stopping_criteria=[first]
            )
        ended = now(device)
        new = output[:, inputs["input_ids"].shape[1] :]
        text = " ".join(self.processor.batch_decode(new, skip_special_tokens=True)[0].split())
        told = report(self.model)
        return Answer(text, told.layers[-1].length, told.kv_used, (first.at or ended) - began, ended - began)

    def _as_python(self, question: str, arguments: Mapping[str, Any]) -> str:
        method = arguments["method"]
        given = "".join(f", {name}={value!r}" for name, value in arguments.items() if name != "method")
        wrap = f"tokenprune.wrap(model{'' if method == 'auto' else f', {method!r}'}{given})"
        if self.name in testbeds.names():
            load = f"from tokenprune_testbed import load\n\nmodel, processor = load({self.name!r})"
        else:
            load = (
                f"from transformers import AutoModelForImageTextToText, AutoProcessor\n\nname = {self.name!r}\n"
                f'model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")\n'
                f"processor = AutoProcessor.from_pretrained(name)"
            )
        return (
            f"from PIL import Image\nimport tokenprune\n{load}\n\n"
            f'content = [\n    {{"type": "image", "image": Image.open("photo.jpg")}},\n'
            f'    {{"type": "text", "text": {self.read(question)!r}}},\n]\n'
            f"inputs = processor.apply_chat_template(\n"
            f'    [{{"role": "user", "content": content}}],\n    add_generation_prompt=True,\n    tokenize=True,\n'
            f'    return_dict=True,\n    return_tensors="pt",\n).to(model.device, dtype=model.dtype)\n\n{wrap}\n'
            f"output = model.generate(**inputs, max_new_tokens={self.max_new_tokens}, do_sample=False)\n"
            f'print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n'
            f"print(tokenprune.report(model))\n"
        )


def _arguments(method: str, keep: float, stages: Stages) -> dict[str, Any]:
    if method == "none":
        return {"method": method}
    if not stages:
        return {"method": method, "keep": keep}
    if method == "auto":
        raise ConfigError("'auto' brings its own stages: choose a method by name, or leave the stages to it")
    cuts = [(int(layer), float(share)) for layer, share in stages]
    return {"method": method, "keep": keep, "cuts": [*cuts[:-1], (cuts[-1][0], None)]}
