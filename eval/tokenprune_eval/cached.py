"""What every row of the table would compute again: the prompts of the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class CachedProcessor:
    """A processor that remembers the batches it has made.

    Args:
        processor: the real one.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._batches: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *, images: Sequence[Any], text: Sequence[str], **options: Any) -> Any:
        key = (tuple(text), tuple(map(id, images)), tuple(sorted(options.items())))
        if key not in self._batches:
            # The images go with the batch: while they live, no other image can have their id.
            self._batches[key] = (
                self._processor(images=list(images), text=list(text), **options),
                list(images),
            )
        return self._batches[key][0]

    def apply_chat_template(self, *args: Any, **options: Any) -> Any:
        return self._processor.apply_chat_template(*args, **options)

    def batch_decode(self, *args: Any, **options: Any) -> Any:
        return self._processor.batch_decode(*args, **options)
