"""Requests to a vLLM server, as its users send them."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from typing import Any

import numpy as np
from PIL import Image

from tokenprune_eval.server import NAME


def post(url: str, content: list[Any], **more: Any) -> tuple[int, dict[str, Any]]:
    """Status and body of a chat of one message."""
    body = {
        "model": NAME,
        "temperature": 0,
        "max_tokens": 5,
        "messages": [{"role": "user", "content": content}],
        **more,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def words(asked: str) -> dict[str, Any]:
    return {"type": "text", "text": asked}


def picture(image: Any, **more: Any) -> dict[str, Any]:
    """Of a PIL image, an array, or the bytes of a file, whatever they are."""
    if not isinstance(image, bytes):
        held = io.BytesIO()
        (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(held, "PNG")
        image = held.getvalue()
    data = "data:image/png;base64," + base64.b64encode(image).decode()
    return {"type": "image_url", "image_url": {"url": data}, **more}


def budget(keep: Any, **more: Any) -> dict[str, Any]:
    return {"mm_processor_kwargs": {"tokenprune_keep": keep, **more}}


def counters(url: str) -> dict[str, float]:
    """Ours, of the server's /metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line.startswith("tokenprune:")]
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines)
        if "_created" not in name
    }
