"""What every row of the table would compute again: prompts and visual features of the same questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPooling


class CachedProcessor:
    """A processor that remembers the batches it has made.

    Args:
        processor: the real one.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._batches: dict[tuple[Any, ...], Any] = {}
        self.features: dict[
            int, Any
        ] = {}  # by the address of a batch's pixels, which this object keeps alive

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


@contextmanager
def cached_features(model: Any, processor: CachedProcessor, *, enabled: bool = True) -> Iterator[None]:
    """Inside, the vision tower computes once per batch of `processor`, over all uses of this context.

    Pruning in the decoder cannot change what the tower returns, so the answers are the same to the bit. Only the
    tower's `forward` is replaced: hooks on the tower itself still run, those on its layers do not.

    Args:
        model: a LLaVA that reads its tower's last layer.
        processor: remembers the features with the batches.
        enabled: False for a method that looks inside the tower.
    """
    if not enabled:
        yield
        return
    tower = model.model.vision_tower
    original = tower.forward

    def remembered(pixel_values: Any, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        key = pixel_values.data_ptr()
        if key not in processor.features:
            # The pixels go with their features: the address stays theirs.
            processor.features[key] = original(pixel_values, *args, **kwargs).hidden_states[-1], pixel_values
        return BaseModelOutputWithPooling(hidden_states=(processor.features[key][0],))

    tower.forward = remembered
    try:
        yield
    finally:
        del tower.forward
