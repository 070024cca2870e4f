"""Random programs against the oracle: prompts, steps, turns, crops, copies, moved rows, overrides and interrupts.

Each program is a conversation on one cache (growing, plain, static; with windows, size terms, compact_early), and
after every call the logits are those of a full-length forward in which the dropped tokens are masked. A call may be
refused by name where it cannot be exact; it is never wrong.

TOKENPRUNE_PROGRAMS=1000 runs that many.
"""

from __future__ import annotations

import copy
import os
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, StaticCache

import judge
import oracle
import tiny
import tokenprune
from test_interrupts import Interrupt, of_generate
from tokenprune.releases import cache_argument, cache_of

COUNT = int(os.environ.get("TOKENPRUNE_PROGRAMS", "120"))
BLOCKS = 12
LAYERS = 6
# (family, sliding window): windows end among what was dropped, and are crossed while decoding.
MODELS: tuple[tuple[str, int | None], ...] = (
    *(("llava", None), ("llava_next", None), ("internvl", None), ("idefics3", None), ("qwen2_vl", None)),
    *(("llava_mistral", 12), ("llava_mistral", 30), ("llava_qwen2", 14), ("llava_qwen3", 30), ("gemma3", 12)),
    *(("gemma3", 40), ("qwen2_5_vl", 16), ("qwen3_vl", None)),
)
SETTINGS: tuple[dict[str, Any], ...] = (
    {"method": "vflowopt", "keep": 0.5},
    {"method": "vflowopt", "cuts": [(2, 0.7), (4, 0.4)]},
    {"method": "vflowopt", "recycling": "cells", "cuts": [(1, 0.6), (3, 0.5)]},
    {"method": "entropyprune", "layer": 2, "keep": 0.5},
    {"method": "random", "cuts": [(1, 0.6), (4, 0.2)]},
    {"method": "uniform", "layer": 0, "keep": 0.4},
)
ROWS = (
    (["text:5", "image", "text:6"],),
    (["text:4", "image", "text:7"], ["text:9"], ["text:3"], ["text:2", "image", "text:5"]),
    (["text:3", "image", "text:2", "image", "text:6"], ["image", "text:6"]),
)


@dataclass
class Talk:
    """A conversation: all it consists of, for the oracle, and the cache it goes on with."""

    inputs: dict[str, Any]
    cuts: Any
    merges: Any
    biases: Any
    early: Any
    prompt: int
    cache: Any
    done: list[str] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[1]


class Program:
    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        name, window = self.draw.choice(MODELS)
        options: dict[str, Any] = {} if window is None else {"sliding_window": window}
        attention = self.draw.choice(("sdpa", "eager"))
        options |= {"layers": LAYERS, "attn_implementation": attention, "seed": seed % 3}
        self.model, self.judge = tiny.build(name, **options), tiny.build(name, **options)
        self.settings = dict(self.draw.choice(SETTINGS))
        self.early = self.draw.random() < 0.4
        self.kind = self.draw.choice(("growing", "growing", "plain", "static"))
        self.rows = self.draw.choice(ROWS)
        self.what = f"{name} {window} {attention} {self.kind} early={self.early} {self.settings}"
        self.name = cache_argument(self.model)

    def cache(self) -> Any:
        config = self.model.config.get_text_config()
        if self.kind == "static":
            return StaticCache(config=config, max_cache_len=256)
        return DynamicCache(config=config) if self.kind == "growing" else DynamicCache()

    def begin(self, rows: Any, cache: Any) -> Talk:
        model = self.model
        inputs = tiny.inputs(model, rows, pad="left", seed=self.draw.randrange(99))
        inputs["position_ids"] = oracle._generate_positions(model, inputs, inputs["attention_mask"])
        with torch.no_grad():
            out = model(**inputs, **{self.name: cache})
        report, positions = tokenprune.report(model), tiny.visual_positions(model, inputs)
        length = inputs["input_ids"].shape[1]
        talk = Talk(
            inputs,
            judge.cuts_of(report),
            judge.merges_of(report, positions),
            judge.biases_of(report, positions),
            [[length] * len(row) for row in positions] if self.early else None,
            length,
            cache_of(out),
        )
        wanted = self.judged(talk)
        assert report.index is not None
        assert (
            judge.difference_at(report.index, out.logits, wanted, inputs["attention_mask"]) <= judge.TOLERANCE
        )
        return talk

    def judged(self, talk: Talk) -> torch.Tensor:
        positions = tiny.visual_positions(self.model, talk.inputs)
        return oracle.masked_forward(
            self.judge,
            talk.inputs,
            talk.cuts,
            positions,
            talk.merges,
            biases=talk.biases,
            early=talk.early,
        ).logits

    def say(self, talk: Talk, count: int) -> None:
        """`count` more tokens, all at once."""
        ids = talk.inputs["input_ids"]
        new = torch.randint(tiny.FIRST_TEXT_ID, tiny.VOCAB, (len(ids), count), generator=self.generator)
        positions = talk.inputs["position_ids"][..., -1:] + torch.arange(1, count + 1)
        mask = F.pad(talk.inputs["attention_mask"], (0, count), value=1)
        call = {"input_ids": new, "attention_mask": mask, "position_ids": positions, self.name: talk.cache}
        with torch.no_grad():
            logits = self.model(**call).logits
        talk.inputs |= {
            "input_ids": torch.cat([ids, new], 1),
            "attention_mask": mask,
            "position_ids": torch.cat([talk.inputs["position_ids"], positions], -1),
        }
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in talk.inputs:
                talk.inputs[name] = F.pad(talk.inputs[name], (0, count))
        difference = float((logits - self.judged(talk)[:, -count:]).abs().max())
        assert difference <= judge.TOLERANCE, f"{difference} after {talk.done}"

    # -- what may happen between calls ------------------------------------------------------------------------------

    def step(self, talk: Talk) -> None:
        for _ in range(self.draw.randrange(1, 4)):
            self.say(talk, 1)

    def turn(self, talk: Talk) -> None:
        self.say(talk, self.draw.randrange(2, 6))

    def deep_copy(self, talk: Talk) -> None:
        talk.cache = copy.deepcopy(talk.cache)

    def crop(self, talk: Talk) -> None:
        """Back to any column behind the prompt's last picture."""
        if self.kind == "static" or any(getattr(layer, "is_sliding", False) for layer in talk.cache.layers):
            return
        gone = self.draw.randrange(0, talk.length - talk.prompt + 1)
        if not gone:
            return
        for layer in talk.cache.layers:
            layer.crop(-gone)
        for name in ("input_ids", "attention_mask", "position_ids", "mm_token_type_ids", "token_type_ids"):
            if name in talk.inputs:
                talk.inputs[name] = talk.inputs[name][..., :-gone]

    def move_rows(self, talk: Talk) -> None:
        batch = len(talk.inputs["input_ids"])
        if self.kind == "static":
            return
        rows = [self.draw.randrange(batch) for _ in range(self.draw.randrange(1, batch + 2))]
        talk.cache.batch_select_indices(torch.tensor(rows))
        positions = tiny.visual_positions(self.model, talk.inputs)
        selected: dict[str, Any] = {}
        for name, value in talk.inputs.items():
            of_rows = oracle.shares(name, talk.inputs, positions, None)
            if name == "position_ids":
                selected[name] = value[..., rows, :]
            elif of_rows is None:
                selected[name] = value[rows]
            else:
                parts = value.split(of_rows)
                selected[name] = torch.cat([parts[r] for r in rows])
        talk.inputs = selected
        if not any(
            tiny.visual_positions(self.model, selected)
        ):  # stock wants no pictures rather than none of them
            for name in [n for n in selected if "pixel" in n or "image" in n]:
                del selected[name]

        def taken(table: Any) -> Any:
            return None if table is None else [table[r] for r in rows]

        talk.cuts = [(layer, taken(lists)) for layer, lists in talk.cuts]
        talk.merges, talk.biases = ([taken(cut) for cut in table] for table in (talk.merges, talk.biases))
        talk.early = taken(talk.early)

    def other_prompt(self, talk: Talk) -> None:
        """Another conversation, under other settings."""
        other = dict(self.draw.choice(SETTINGS))
        clear = {"cuts": None, "layer": None, "keep": None}
        with tokenprune.override(self.model, **{**clear, **other}):
            self.begin(self.draw.choice(ROWS), self.cache())

    def interrupt(self, talk: Talk) -> None:
        """Ctrl-C in another prompt, or in a step on a copy of this cache."""
        inputs = tiny.inputs(self.model, self.draw.choice(ROWS), pad="left")
        if self.draw.random() < 0.5:
            inputs = {"input_ids": torch.full((len(talk.inputs["input_ids"]), 1), 40)}
            inputs |= {
                "attention_mask": F.pad(talk.inputs["attention_mask"], (0, 1), value=1),
                "position_ids": talk.inputs["position_ids"][..., -1:] + 1,
                self.name: copy.deepcopy(talk.cache),
            }
        try:
            with torch.no_grad(), Interrupt(self.draw.randrange(1, 300), "call", of_generate):
                self.model(**inputs)
        except KeyboardInterrupt:
            pass

    def run(self) -> Counter[str]:
        told: Counter[str] = Counter()
        with tokenprune.pruned(self.model, compact_early=self.early, **self.settings):
            talk = self.begin(self.rows, self.cache())
            actions = (self.step, self.step, self.turn, self.deep_copy, self.crop, self.move_rows)
            for _ in range(self.draw.randrange(3, 8)):
                action = self.draw.choice((*actions, self.other_prompt, self.interrupt))
                talk.done.append(action.__name__)
                try:
                    action(talk)
                except tokenprune.UnsupportedModeError as error:
                    told[str(error)[:60]] += 1
                    break
                told[action.__name__] += 1
        return told


@pytest.mark.filterwarnings("ignore::tokenprune.NothingPrunedWarning")
@pytest.mark.parametrize("block", range(BLOCKS))
def test_programs(block: int) -> None:
    told: Counter[str] = Counter()
    for seed in range(block, COUNT, BLOCKS):
        program = Program(seed)
        try:
            told += program.run()
        except AssertionError as error:
            raise AssertionError(f"program {seed}: {program.what}: {error}") from error
    print(dict(told))
    assert told["step"] and told["turn"]
