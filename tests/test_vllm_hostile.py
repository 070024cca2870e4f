"""A vLLM server that nobody can poison: whatever is sent between, clean requests are answered as before.

Run by `make test-vllm`, in an environment of its own; elsewhere skipped. TOKENPRUNE_HOSTILE sets how many are sent.
"""

from __future__ import annotations

import vllm_engine  # noqa: F401  # sets what vLLM reads when it is imported

# isort: split

import http.client
import json
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from tokenprune_eval.checkpoints import write_old_layout
from tokenprune_eval.qwen_checkpoint import write_qwen
from tokenprune_eval.server import NAME, serving
from tokenprune_testbed.loading import model_folder
from vllm_requests import budget, counters, picture, post, words

pytestmark = pytest.mark.timeout(1500)
COUNT = int(os.environ.get("TOKENPRUNE_HOSTILE", "500"))
CLEAN = 40
PICTURES = 40  # at most in a prompt
MODELS = ("llava", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module", params=MODELS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llava":
        folder = write_old_layout(Path(model_folder("small")), folder / "model")
    else:
        write_qwen(request.param, folder, context=2048)
    setting = {"method": "vflowopt", "keep": 0.05, "keep_max": 0.5}
    text = ["--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "8"]
    text += ["--trust-request-mm-kwargs", "--limit-mm-per-prompt", json.dumps({"image": PICTURES})]
    text += ["--enable-prompt-tokens-details", "--additional-config", json.dumps({"tokenprune": setting})]
    with serving(folder, *text, VLLM_ENABLE_V1_MULTIPROCESSING="1") as url:
        yield url


def image(rng: random.Random) -> Image.Image:
    own = np.random.default_rng(rng.randrange(1 << 30))
    height, width = own.integers(30, 400, 2)
    return Image.fromarray(own.integers(0, 255, (5, 6, 3), dtype=np.uint8)).resize((int(width), int(height)))


def answers(url: str) -> list[tuple[str, int]]:
    """Of clean requests: what is said, and the prompt's length."""
    rng = random.Random(7)
    asked = [
        [picture(image(rng)), words("what is it ?")] if i % 5 else [words("how many ?")] for i in range(CLEAN)
    ]
    found = []
    with ThreadPoolExecutor(4) as pool:
        for status, body in pool.map(lambda content: post(url, content, ignore_eos=True), asked):
            assert status == 200, body
            found.append((body["choices"][0]["message"]["content"], body["usage"]["prompt_tokens"]))
    return found


def cancelled(url: str, content: list[Any]) -> int:
    """Go away while the answer is made."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 200,
        "stream": True,
    }
    connection.request(
        "POST",
        "/v1/chat/completions",
        json.dumps({**body, "ignore_eos": True}),
        {"Content-Type": "application/json"},
    )
    connection.getresponse().read(20)
    connection.close()
    return 200


KEEPS: tuple[Any, ...] = (
    1.0,
    0.5,
    1,
    0,
    -3,
    2.5,
    1e9,
    10**9,
    True,
    "20%",
    "much",
    1e-300,
    [0.1],
    {"a": 1},
    "nan",
)
KWARGS: tuple[dict[str, Any], ...] = (
    {"size": {"height": 28, "width": 28}},
    {"size": {"shortest_edge": 9}},
    {"size": {"shortest_edge": 3136, "longest_edge": 10**7}},
    {"max_pixels": 28 * 28 * 4},
    {"min_pixels": 10**6, "max_pixels": 10**6},
    {"patch_size": 7},
    {"merge_size": 1},
    {"temporal_patch_size": 1},
    {"do_resize": False},
    {"do_rescale": False},
    {"crop_size": 3},
    {"nonsense": [1, 2]},
    {"images_kwargs": {"tokenprune_keep": 0.1}},
    {"images_kwargs": 3},
)


def hostile(rng: random.Random) -> Callable[[str], int]:
    """One request that somebody would rather not get; calling it gives its status."""
    one, asked = image(rng), words("what is it ?")
    kind = rng.randrange(8)
    if kind == 0:  # too long unpruned, however few tokens it keeps
        content: list[Any] = [
            picture(one) if rng.random() < 0.5 else picture(image(rng))
            for _ in range(rng.randint(10, PICTURES))
        ]
        return lambda url: post(url, [*content, asked])[0]
    if kind == 1:  # too long in words, or just so
        long = words("what " * rng.choice([1500, 2030, 2040, 2500]))
        return lambda url: post(url, [picture(one), long])[0]
    if kind == 2:
        keep = rng.choice(KEEPS)
        return lambda url: post(url, [picture(one), asked], **budget(keep))[0]
    if kind == 3:
        kwargs = rng.choice(KWARGS)
        return lambda url: post(url, [picture(one), asked], mm_processor_kwargs=kwargs)[0]
    if kind == 4:  # broken and huge pictures
        whole = picture(one)["image_url"]["url"]
        broken: list[Any] = [
            *(
                picture(b"no picture at all"),
                {"type": "image_url", "image_url": {"url": whole[: len(whole) // 2]}},
            ),
            *(picture(Image.new("RGB", size)) for size in ((1, 1), (1, 500), (2000, 2), (4000, 3000))),
            {"type": "image_url", "image_url": None, "uuid": "never sent"},
        ]
        own = rng.choice(broken)
        return lambda url: post(url, [own, asked])[0]
    if kind == 5:  # the end of the prompt, and places without pictures
        ends = rng.choice(
            ["<image>", "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", "<|video_pad|>"]
        )
        return lambda url: post(url, [picture(one), words(f"what {ends}")])[0]
    if kind == 6:
        return lambda url: cancelled(url, [picture(one), asked])
    tokens = rng.choice([1, 300, 1900])  # decoding beyond the model's own positions, and to the end
    return lambda url: post(url, [picture(one), picture(one), asked], max_tokens=tokens, ignore_eos=True)[0]


def test_clean_requests_are_answered_as_before(server: str) -> None:
    before = answers(server)
    assert len({said for said, _ in before}) > 4  # they differ, so that a mix-up would be seen
    rng = random.Random(0)
    jobs = [hostile(rng) for _ in range(COUNT)]
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda job: job(server), jobs))
    print({status: statuses.count(status) for status in set(statuses)})
    assert set(statuses) <= {200, 400, 422, 500}
    assert statuses.count(500) < COUNT / 20  # vLLM's own, of arguments its processors cannot take
    assert statuses.count(400) > COUNT / 5
    assert answers(server) == before


def test_what_was_spared_can_be_seen(server: str) -> None:
    """At /metrics, and in the usage of a response; the start's dummy is in neither."""
    before = counters(server)
    status, body = post(server, [picture(image(random.Random(1))), words("what is it ?")])
    assert status == 200
    after = counters(server)
    seen, kept = (
        after[name] - before.get(name, 0.0)
        for name in (f'tokenprune:image_tokens_{what}_total{{kind="image"}}' for what in ("seen", "kept"))
    )
    assert kept == max(1, int(0.05 * seen)) and seen > 20
    assert body["usage"]["prompt_tokens_details"]["multimodal_tokens"] == {"image": kept}
