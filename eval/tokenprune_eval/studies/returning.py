"""Tokens that come back: an experiment on answers of 64 words and more.

``python -m tokenprune_eval.studies.returning``

What a cut at layer K dropped still lies in the cache of the layers before it. A step's attention in layer K - 1 says
which of it the step wants; the best of that comes back into the layers behind the cut, for this step and later ones
(arXiv 2604.12358, 2605.31457). Here the model that reads pages copies whole pages. Masks on the stock model do what
a side cache would: a token that came back has the keys and values it would get from a late pass over the kept
tokens. So accuracy and tokens are as they would be, and no time is saved: none is reported.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tokenprune
from tokenprune import tables
from tokenprune_testbed import load
from tokenprune_testbed.language import make_inputs
from tokenprune_testbed.modeling import EOS, NUM_VISUAL_TOKENS
from tokenprune_testbed.pages import MAX_NEW_TOKENS, evaluation_pages

FIRST = 1  # column of the first visual token: the begin token stands before it


@dataclass(frozen=True)
class Rule:
    """What a step does to the visual tokens behind the cut.

    Attributes:
        back: tokens that come back at each step.
        swap: as many of those present go, the least attended in this step.
        by: "attention" of the step in the layer before the cut, or "random".
    """

    back: int = 0
    swap: bool = False
    by: str = "attention"

    def __str__(self) -> str:
        if not self.back:
            return "fixed"
        return f"{self.back} {'swapped' if self.swap else 'more'} by {self.by}"


class Sight:
    """What queries see: every layer's mask.

    Attributes:
        present: visual tokens behind the cut (b, 144).
        keys: columns so far, the running step's among them.
    """

    def __init__(self, model: Any, layer: int, kept: Tensor, rule: Rule, seed: int = 0) -> None:
        self.model, self.layer, self.present, self.rule = model, layer, kept.clone(), rule
        self.random = torch.Generator().manual_seed(seed)
        self.keys = 0

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """With the masks in place."""
        layers = self.model.model.language_model.layers
        with ExitStack() as hooks:
            for index, layer in enumerate(layers):
                hook = self._whole if index < self.layer else self._cut
                hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            attention = layers[self.layer - 1].self_attn
            hooks.callback(attention.register_forward_hook(self._wanted).remove)
            yield

    def _whole(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": _mask(self._causal(args[0]), args[0].dtype)}

    def _cut(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sees = self._causal(args[0])
        columns = torch.ones(len(sees), sees.shape[-1], dtype=torch.bool)
        columns[:, FIRST : FIRST + NUM_VISUAL_TOKENS] = self.present
        themselves = torch.eye(sees.shape[-1], dtype=torch.bool)[-sees.shape[-2] :]
        sees = sees & (columns[:, None, None] | themselves)
        return args, {**kwargs, "attention_mask": _mask(sees, args[0].dtype)}

    def _causal(self, hidden: Tensor) -> Tensor:
        sees = torch.ones(hidden.shape[1], self.keys, dtype=torch.bool).tril(self.keys - hidden.shape[1])
        return sees.expand(len(hidden), 1, -1, -1)

    def _wanted(self, attention: Any, args: Any, output: Any) -> None:
        weights = output[1]
        if weights.shape[2] > 1 or not self.rule.back:  # the prompt
            return
        wanted = weights.mean(1)[:, 0, FIRST : FIRST + NUM_VISUAL_TOKENS].float()
        if self.rule.by == "random":
            wanted = torch.rand(wanted.shape, generator=self.random)
        best = wanted.masked_fill(self.present, -1).topk(self.rule.back, -1)
        if self.rule.swap:
            worst = wanted.masked_fill(~self.present, 2).topk(self.rule.back, -1, largest=False)
            better = best.values > worst.values
            self.present.scatter_(1, worst.indices, ~better)
            self.present.scatter_(1, best.indices, better | self.present.gather(1, best.indices))
        else:
            self.present.scatter_(1, best.indices, True)


def _mask(sees: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)


def read_pages(model: Any, inputs: Any, sight: Sight) -> tuple[list[list[int]], float]:
    """Greedy answers, and how many visual tokens a step saw behind the cut on average, as a share."""
    seen = []
    with sight.hooked(), torch.inference_mode():
        sight.keys = inputs["input_ids"].shape[1]
        out = model(**inputs, use_cache=True)
        tokens, cache = [out.logits[:, -1].argmax(-1)], out.past_key_values
        open_rows = tokens[-1] != EOS
        while open_rows.any() and len(tokens) < MAX_NEW_TOKENS:
            sight.keys += 1
            out = model(input_ids=tokens[-1][:, None], past_key_values=cache, use_cache=True)
            seen.append(sight.present[open_rows].float().mean().item())
            tokens.append(out.logits[:, -1].argmax(-1))
            open_rows = open_rows & (tokens[-1] != EOS)
    rows = torch.stack(tokens, 1).tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in rows], float(np.mean(seen))


def kept_by(model: Any, inputs: Any, method: str, layer: int, keep: float) -> Tensor:
    """What a method keeps at one cut (b, 144), by the library itself; nothing is merged."""
    settings = {"recycling": "none"} if method == "vflowopt" else {}
    with tokenprune.pruned(model, method, cuts=[(layer, keep)], **settings), torch.inference_mode():
        model(**inputs)
        lists = tokenprune.report(model).keep_lists[0]
    kept = torch.zeros(len(lists), NUM_VISUAL_TOKENS, dtype=torch.bool)
    for row, (image,) in zip(kept, lists, strict=True):
        row[torch.as_tensor(image)] = True
    return kept


def main(argv: Sequence[str] | None = None) -> None:
    """Every rule at every share, as CSV and as Markdown."""
    parser = argparse.ArgumentParser(description="Do dropped tokens pay for coming back?")
    parser.add_argument("--pages", type=int, default=100)
    parser.add_argument("--method", default="vflowopt")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.22, 0.33, 0.5])
    parser.add_argument("--fixed", type=float, nargs="+", default=[0.22, 0.33, 0.5, 0.66, 0.8, 1.0])
    parser.add_argument("--csv", type=Path, default=Path("eval/results/returning.csv"))
    options = parser.parse_args(argv)
    model, processor = load("pages")
    model.set_attn_implementation("eager")
    samples = evaluation_pages(options.pages, least=64)
    inputs = make_inputs(processor, samples)
    rules = [Rule(1), *(Rule(back, True) for back in (1, 4, 8)), Rule(4, True, "random")]
    arms = [(keep, Rule()) for keep in options.fixed] + [
        (keep, rule) for keep in options.keep for rule in rules
    ]
    rows = []
    for keep, rule in arms:
        kept = (
            kept_by(model, inputs, options.method, options.layer, keep)
            if keep < 1
            else torch.ones(len(samples), NUM_VISUAL_TOKENS, dtype=torch.bool)
        )
        sight = Sight(model, options.layer, kept, rule)
        answers, seen = read_pages(model, inputs, sight)
        said = [processor.tokenizer.decode(answer).split() for answer in answers]
        wanted = [sample.answer.split() for sample in samples]
        right = [
            sum(a == b for a, b in zip(s, w, strict=False)) / len(w)
            for s, w in zip(said, wanted, strict=True)
        ]
        rows.append(
            {
                "method": options.method,
                "layer": options.layer,
                "pages": len(samples),
                "kept": f"{keep:g}",
                "rule": str(rule),
                "seen": f"{seen:.4f}",
                "words_right": f"{np.mean(right):.4f}",
                "pages_right": f"{np.mean([s == w for s, w in zip(said, wanted, strict=True)]):.4f}",
            }
        )
        print(*rows[-1].values(), flush=True)
    tables.write(options.csv, rows)


if __name__ == "__main__":
    main()
