"""The three models as the library finds them, by entry points: see `tokenprune.testbeds`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenprune_testbed.questions import Sample


@dataclass(frozen=True)
class Entry:
    """Implements `tokenprune.testbeds.Testbed`; nothing is imported before it is needed."""

    name: str

    def load(self, dtype: Any = None) -> tuple[Any, Any]:
        """See `tokenprune_testbed.load`."""
        from tokenprune_testbed.loading import load

        return load(self.name, dtype)

    def words(self, question: str) -> str:
        """Words that the small models know; "smol" reads everything."""
        from tokenprune_testbed.pages import page_vocabulary
        from tokenprune_testbed.questions import known_words

        if self.name == "smol":
            return question
        return known_words(question, page_vocabulary() if self.name == "pages" else ())

    def questions(self, count: int, seed: int, *, training: bool = False) -> Sequence[Sample]:
        """About scenes; to "pages" about pages. Training questions are about one picture each."""
        from tokenprune_testbed.pages import evaluation_pages
        from tokenprune_testbed.questions import evaluation_set

        if self.name == "pages":
            return evaluation_pages(count, seed, split="train" if training else "test")
        if not training:
            return evaluation_set(count, seed)
        drawn = evaluation_set(2 * count + 14, seed, split="train", per_scene=1)
        single = [sample for sample in drawn if len(sample.images) == 1]
        return single[:: max(1, len(single) // count)][:count]


small, smol, pages = Entry("small"), Entry("smol"), Entry("pages")
