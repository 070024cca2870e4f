"""From what lmms-eval's tasks say to what a processor takes: one user turn of pictures, videos and text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tokenprune.errors import ConfigError
from tokenprune.images import SUFFIXES, open_image
from tokenprune.optional import check_installed

Message = dict[str, Any]
_PLACEHOLDER = re.compile(r"<image(?: \d+)?>")


def user_turn(visuals: Sequence[Any] | None, text: str) -> list[Message]:
    """A conversation of one turn: where the text has as many <image> marks as there are visuals, they stand there."""
    parts = [_part(visual) for visual in _flat(visuals or [])]
    texts = _PLACEHOLDER.split(text)
    if parts and len(texts) == len(parts) + 1:
        content: list[Any] = []
        for before, part in zip(texts, [*parts, None], strict=True):
            if before.strip():
                content.append({"type": "text", "text": before.strip()})
            if part is not None:
                content.append(part)
    else:
        content = [*parts, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def from_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """lmms-eval's messages (media under "url") as a processor's (media under their own kind)."""
    turns = []
    for message in messages:
        content = message["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [part if part["type"] == "text" else _part(part.get("url"), part["type"]) for part in content]
        turns.append({"role": message["role"], "content": parts})
    return turns


def with_system(turns: list[Message], prompt: str | None) -> list[Message]:
    """The turns under a system prompt."""
    if not prompt:
        return turns
    return [{"role": "system", "content": [{"type": "text", "text": prompt}]}, *turns]


def videos_as_frames(turns: Sequence[Message], frames: int) -> list[Message]:
    """Every video replaced by frames taken from it evenly, for models that see pictures only."""
    changed = []
    for turn in turns:
        content: list[Any] = []
        for part in turn["content"]:
            if part["type"] == "video":
                content += [
                    {"type": "image", "image": frame} for frame in sample_frames(part["video"], frames)
                ]
            else:
                content.append(part)
        changed.append({**turn, "content": content})
    return changed


def sample_frames(video: Any, frames: int) -> list[Image.Image]:
    """Up to so many frames of a video: a path, or frames that were read already.

    Raises:
        ConfigError: it cannot be read.
    """
    if isinstance(video, str | Path):
        check_installed("reading a video", "av", extra="eval")
        import av

        try:
            with av.open(str(video)) as opened:
                read = [frame.to_image() for frame in opened.decode(video=0)]
        except (OSError, av.error.FFmpegError) as error:
            raise ConfigError(f"the video {str(video)!r} cannot be read: {error}") from None
    else:
        read = [frame if isinstance(frame, Image.Image) else Image.fromarray(frame) for frame in video]
    if not read:
        raise ConfigError("a video has no frames")
    count = min(frames, len(read))
    return [read[i * len(read) // count] for i in range(count)]


def _flat(visuals: Sequence[Any]) -> list[Any]:
    flat: list[Any] = []
    for visual in visuals:
        flat += _flat(visual) if isinstance(visual, list | tuple) else [visual]
    return flat


def _part(visual: Any, kind: str | None = None) -> dict[str, Any]:
    if isinstance(visual, Mapping):  # {"type": "video", "url": ...}, as some tasks have it
        kind = visual.get("type", kind or "video")
        visual = visual.get("url") or visual.get("path")
    if kind is None:
        is_picture = isinstance(visual, Image.Image) or Path(str(visual)).suffix.lower() in SUFFIXES
        kind = "image" if is_picture else "video"
    if kind == "audio":
        raise ConfigError(
            "this task has audio, which visual-token pruning has nothing to do with; choose another"
        )
    if kind == "image":
        return {
            "type": "image",
            "image": visual.convert("RGB") if isinstance(visual, Image.Image) else open_image(visual),
        }
    return {"type": "video", "video": visual}
