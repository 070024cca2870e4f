"""A pruned model in lmms-eval's two slots: tasks that hand over messages (chat), and older ones (simple)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.utils import handle_arg_string
from loguru import logger
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

import tokenprune
from tokenprune.analysis.memory import Memory, last_state
from tokenprune.api import runtime_of
from tokenprune.arguments import AUTO, Arguments
from tokenprune.cli.loading import load_model
from tokenprune.errors import ConfigError
from tokenprune.images import limit_pixels
from tokenprune.lmms.conversation import Message, from_messages, user_turn, videos_as_frames, with_system
from tokenprune.lmms.meter import Meter
from tokenprune.models import stock_model
from tokenprune.reporting import Report
from tokenprune.timing import FirstToken, now
from tokenprune.tune.drift import cosine_of

Made = TypeVar("Made")
_MOST_NEW_TOKENS = 1024  # where a task does not say


class Tokenprune(lmms):
    """Model arguments of ``--model tokenprune``; those not named here are `wrap`'s and the method's.

    Args:
        pretrained: a hub id, a folder, or the testbed's "small" or "smol".
        device, batch_size, max_batch_size: from lmms-eval's command line; batch_size "auto" begins with max_batch_size
            (64 on a GPU, 8 on a CPU) and is halved as often as memory runs out.
        dtype: of the weights.
        attn_implementation: "sdpa", "eager" or "flash_attention_2".
        max_num_frames: taken from a video.
        system_prompt: text, or a file that holds it.
        use_cache: of generate.
        drift: prompts whose drift is measured, each at the cost of an unpruned prefill; 0: none.
        profile: a path, or "auto" for the one known for the model.
        profile_hash: the profile's hash, checked; it makes lmms-eval's response cache, which goes by these arguments,
            notice another profile under the same path. The first digits do.
        min_pixels, max_pixels: of a picture, for processors that take them (Qwen-VL).

    Raises:
        ConfigError: a wrong argument.
        UnsupportedModelError: see `wrap`.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        max_num_frames: int = 8,
        system_prompt: str | None = None,
        use_cache: bool = True,
        drift: int = 16,
        profile_hash: str | float | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **pruning: Any,
    ) -> None:
        super().__init__()
        if not pretrained:
            raise ConfigError(
                "say which model: --model_args pretrained=MODEL, a hub id, a folder, or 'small' or 'smol'"
            )
        asked = read_arguments(pruning)
        _check_hash(asked.profile, profile_hash)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 and device != "cpu" and torch.cuda.is_available():
            device = f"cuda:{self.accelerator.local_process_index}"
        self.halves = str(batch_size).startswith("auto")
        self.batch_size_per_gpu = _batch_size(batch_size, max_batch_size)
        model, self.processor = load_model(str(pretrained), str(dtype), device, attn_implementation)
        limit_pixels(self.processor, min_pixels, max_pixels)
        if getattr(self.processor, "tokenizer", None) is not None:
            self.processor.tokenizer.padding_side = "left"
        self._model = tokenprune.wrap(model, **asked.given())
        self._inner: Any = stock_model(model)
        self.memory = Memory()
        self.max_num_frames, self.use_cache, self.drift = max_num_frames, use_cache, drift
        self.system_prompt = self._resolve_system_prompt(system_prompt) if system_prompt else None
        # Of all that a model says of itself lmms-eval writes its class's name into the results file, nothing else.
        cls = type(self)
        self.__class__ = type(f"{cls.__name__}[{self.described()}]", (cls,), {"__module__": cls.__module__})

    def described(self) -> str:
        """What is run, on one line: method, parameters, cuts, budget, profile, version."""
        runtime = runtime_of(self._model)
        assert runtime is not None
        config = runtime.config
        parameters = "".join(f", {name}={value}" for name, value in config.method.described().items())
        return f"{config.described()}{parameters}; tokenprune {tokenprune.__version__}"

    # -- what lmms-eval reads ---------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        return self._model

    @property
    def config(self) -> Any:
        return self._inner.config

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        return torch.device(self._inner.device)

    @property
    def batch_size(self) -> int:
        return self.batch_size_per_gpu

    @property
    def max_length(self) -> int:
        return int(getattr(self.config.get_text_config(), "max_position_embeddings", 2048))

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    # -- requests ---------------------------------------------------------------------------------------------------

    def conversation(self, arguments: tuple[Any, ...]) -> tuple[list[Message], dict[str, Any]]:
        """A request's turns, and how to generate."""
        raise NotImplementedError

    def next_turns(
        self, arguments: tuple[Any, ...], number: int, said: list[str], info: Any
    ) -> tuple[list[Message] | None, Any]:
        """The turns of a later round (None: there is none), and what the task wants to be handed on."""
        raise NotImplementedError

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answers in the order of the requests; those that are generated alike share batches."""
        asked = [self.conversation(request.args) for request in requests]
        answers: list[Any] = [None] * len(asked)
        meter = Meter()

        def generate(numbers: list[int]) -> list[GenerationResult]:
            return self._generate([asked[i][0] for i in numbers], asked[numbers[0]][1], meter)

        for numbers, texts in self._batches([_alike(kwargs) for _, kwargs in asked], generate):
            for i, answer in zip(numbers, texts, strict=True):
                answers[i] = answer
                self.cache_hook.add_partial("generate_until", (requests[i].args[0], asked[i][1]), answer.text)
        meter.log()
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """For each request what was said round by round, until the task has enough."""
        meter, all_said = Meter(), []
        for request in requests:
            turns: list[Message] | None
            turns, kwargs = self.conversation(request.args)
            said: list[str] = []
            info = None
            while turns is not None:
                said.append(self._generate([turns], kwargs, meter)[0].text)
                turns, info = self.next_turns(request.args, len(said), said, info)
            all_said.append(said)
        meter.log()
        return all_said

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Of continuations: the sum of their tokens' log-probabilities, and whether greedy decoding would say them.

        The prompt alone is pruned; the continuation's tokens are forced one by one, as if they were generated.
        """
        found: list[tuple[float, bool]] = []
        meter = Meter()

        def score(numbers: list[int]) -> list[tuple[float, bool]]:
            turns, targets = [], []
            for i in numbers:
                context, target, visual, number, task, split = requests[i].args
                document = self.task_dict[task][split][number]
                turns.append(user_turn(visual(document) if callable(visual) else visual, context))
                targets.append(str(target(document) if callable(target) else target))
            return self._score(turns, targets, meter)

        for _, scores in self._batches([""] * len(requests), score):
            found += scores
        meter.log()
        # lmms-eval 0.7.3 makes a text of a bare pair, which its own tasks cannot read; inside this it is left alone.
        return [GenerationResult(text=pair) for pair in found]

    def _batches(
        self, kinds: Sequence[str], run: Callable[[list[int]], list[Made]]
    ) -> Iterator[tuple[list[int], list[Made]]]:
        """What is made of requests of one kind, batch by batch; of an automatic size halved where memory runs out."""
        for kind in dict.fromkeys(kinds):
            left = [i for i, other in enumerate(kinds) if other == kind]
            while left:
                numbers = left[: self.batch_size]
                try:
                    made = run(numbers)
                except torch.OutOfMemoryError:
                    if not self.halves or len(numbers) == 1:
                        raise
                    self.batch_size_per_gpu = max(1, len(numbers) // 2)
                    logger.info(
                        f"tokenprune: out of memory; batches of {self.batch_size_per_gpu} from here on"
                    )
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                    continue
                yield numbers, made
                left = left[len(numbers) :]

    def _generate(
        self, conversations: Sequence[list[Message]], kwargs: dict[str, Any], meter: Meter
    ) -> list[GenerationResult]:
        inputs = self._inputs(conversations)
        new, _ = self._run(inputs, generation_options(kwargs), meter)
        kept = kept_by_row(tokenprune.report(self._model), len(new))
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        until = kwargs.get("until") or []
        stops = [until] if isinstance(until, str) else until
        pad = self._pad()
        counts = [int((row != pad).sum()) for row in new]
        return [
            GenerationResult(text=_cut(text, stops), token_counts=PrunedCounts(None, count, None, *own))
            for text, count, own in zip(texts, counts, kept, strict=True)
        ]

    def _run(self, inputs: Any, options: dict[str, Any], meter: Meter) -> tuple[Tensor, Any]:
        """New tokens (B, n) and generate's whole output."""
        first = FirstToken(self.device)
        began = now(self.device)
        with torch.inference_mode():
            output = self._model.generate(
                **inputs,
                **options,
                use_cache=self.use_cache,
                stopping_criteria=[first],
                pad_token_id=self._pad(),
                return_dict_in_generate=True,
            )
        ended = now(self.device)
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        tokens = int((new != self._pad()).sum())
        meter.add(
            tokenprune.report(self._model), len(new), tokens, began, first.at or ended, ended, new.shape[1]
        )
        self._note_drift(inputs, meter)
        return new, output

    def _note_drift(self, inputs: Any, meter: Meter) -> None:
        if len(meter.drift) < self.drift:
            whole = self.memory.reference(self._model, inputs).state
            found = cosine_of(last_state(self._inner, inputs).state, whole)
            meter.drift += found.tolist()[: self.drift - len(meter.drift)]

    def _score(
        self, conversations: Sequence[list[Message]], targets: Sequence[str], meter: Meter
    ) -> list[tuple[float, bool]]:
        wanted = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in targets]
        if not all(wanted):
            raise ConfigError("a continuation has no tokens; its log-likelihood cannot be asked")
        longest = max(map(len, wanted))
        rows = torch.tensor(
            [own + [self._pad()] * (longest - len(own)) for own in wanted], device=self.device
        )
        inputs = self._inputs(conversations)
        options = {
            "do_sample": False,
            "max_new_tokens": longest,
            "min_new_tokens": longest,
            "logits_processor": [_Forced(rows)],
            "output_logits": True,
        }
        _, output = self._run(inputs, options, meter)
        logs = torch.stack(output.logits, 1).float().log_softmax(-1)  # (B, n, V), as the model gave them
        found = []
        for r, own in enumerate(wanted):
            ids = torch.tensor(own, device=logs.device)
            each = logs[r, : len(own)]
            found.append((float(each.gather(1, ids[:, None]).sum()), bool((each.argmax(-1) == ids).all())))
        return found

    def _inputs(self, conversations: Sequence[list[Message]]) -> Any:
        turns = [with_system(turns, self.system_prompt) for turns in conversations]
        options: dict[str, Any] = {}
        if _has_video(turns):
            if getattr(self.processor, "video_processor", None) is None:
                turns = [videos_as_frames(own, self.max_num_frames) for own in turns]
            else:
                options["num_frames"] = self.max_num_frames
        if getattr(self.processor, "chat_template", None) is None:
            raise ConfigError("this model's processor has no chat template, so prompts cannot be made")
        inputs = self.processor.apply_chat_template(
            turns,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            **options,
        )
        return inputs.to(self.device, dtype=self._inner.dtype)

    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)


@dataclass
class PrunedCounts(TokenCounts):
    """A sample's tokens, as lmms-eval logs them: visual ones, those left after the last cut, their mean over layers."""

    visual_tokens: int = 0
    kept_tokens: int = 0
    average_tokens: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("visual_tokens", "kept_tokens", "average_tokens")}
        return {**super().to_dict(), **own}


def kept_by_row(report: Report, rows: int) -> list[tuple[int, int, float]]:
    """Of each row its visual tokens, those left after the last cut, and their mean over layers."""
    found = []
    for r in range(rows):
        own = [image for image in report.images if image.row == r]
        kept = sum(image.kept[-1] if image.kept else image.tokens for image in own)
        found.append((sum(i.tokens for i in own), kept, round(sum(i.average for i in own), 2)))
    return found


class Chat(Tokenprune):
    """For tasks that hand over messages."""

    is_simple = False

    def conversation(self, arguments: tuple[Any, ...]) -> tuple[list[Message], dict[str, Any]]:
        _, to_messages, kwargs, number, task, split = arguments
        return from_messages(to_messages(self.task_dict[task][split][number])), kwargs

    def next_turns(
        self, arguments: tuple[Any, ...], number: int, said: list[str], info: Any
    ) -> tuple[list[Message] | None, Any]:
        _, to_messages, _, document, task, split = arguments
        told = to_messages(
            self.task_dict[task][split][document],
            round_idx=number,
            previous_output=list(said),
            previous_round_info=info,
        )
        if not isinstance(told, tuple) or len(told) != 4 or told[1]:
            return None, None
        return from_messages(told[0]), told[3]


class Simple(Tokenprune):
    """For tasks that hand over a text and visuals."""

    is_simple = True

    def conversation(self, arguments: tuple[Any, ...]) -> tuple[list[Message], dict[str, Any]]:
        context, kwargs, to_visual, *_, number, task, split = arguments
        return user_turn(to_visual(self.task_dict[task][split][number]), context), kwargs

    def next_turns(
        self, arguments: tuple[Any, ...], number: int, said: list[str], info: Any
    ) -> tuple[list[Message] | None, Any]:
        _, _, _, to_text, document, task, split = arguments
        told = to_text(
            self.task_dict[task][split][document],
            previous_output=list(said),
            round_idx=number,
            previous_round_info=info,
        )
        if not isinstance(told, tuple) or len(told) != 5 or told[2]:
            return None, None
        return user_turn(told[0], told[1]), told[4]


class _Forced(LogitsProcessor):
    """Lets one token through at each step."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wanted = self.tokens[:, self.step, None]
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)


def read_arguments(given: dict[str, Any]) -> Arguments:
    """`Arguments` from model arguments, which lmms-eval has read as numbers and booleans already.

    Raises:
        ConfigError: see `Arguments`.
    """
    texts = {name: str(value) for name, value in given.items() if value is not None}
    if texts.get("profile") == AUTO:
        texts.pop("profile")
    return Arguments.from_text(texts)


def generation_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a task says of generation, as `generate` takes it; greedy unless it asks for a temperature."""
    known = GenerationConfig()
    options = {name: value for name, value in kwargs.items() if hasattr(known, name)}
    if other := sorted(kwargs.keys() - options.keys() - {"until"}):
        logger.debug(f"tokenprune: left out, for generate knows nothing of it: {', '.join(other)}")
    options.setdefault("max_new_tokens", _MOST_NEW_TOKENS)
    temperature = options.get("temperature") or 0
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise ConfigError(f"temperature takes a number, not {temperature!r}")
    sample = bool(options.pop("do_sample", True)) and temperature > 0
    if not sample:
        for name in ("temperature", "top_p", "top_k"):
            options.pop(name, None)
    return {"do_sample": sample, **{name: value for name, value in options.items() if value is not None}}


def _check_hash(profile: Any, expected: str | float | None) -> None:
    if profile is None:
        if expected is not None:
            raise ConfigError("profile_hash goes with profile=PATH")
        return
    if expected is None:
        logger.warning(
            f"tokenprune: add profile_hash={profile.hash} to --model_args, so that cached responses of another profile "
            f"under this path are not taken for this one's"
        )
    # lmms-eval makes a number of digits, and of 12e3, too.
    elif not any(handle_arg_string(profile.hash[:n]) == expected for n in range(1, len(profile.hash) + 1)):
        raise ConfigError(f"the profile's hash is {profile.hash}, not {expected}")


def _batch_size(given: int | str, most: int | None = None) -> int:
    if str(given).startswith("auto"):
        given = most or (64 if torch.cuda.is_available() else 8)
    try:
        size = int(given)
    except ValueError:
        raise ConfigError(f"batch_size takes a number or auto, not {given!r}") from None
    if size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {size}")
    return size


def _alike(kwargs: dict[str, Any]) -> str:
    return json.dumps(kwargs, sort_keys=True, default=str)


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop."""
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text


def _has_video(conversations: Sequence[Sequence[Message]]) -> bool:
    return any(
        part["type"] == "video" for turns in conversations for turn in turns for part in turn["content"]
    )


__all__ = ["Chat", "Simple", "generation_options", "read_arguments"]
