"""Counters at the server's `/metrics`, beside vLLM's own: what pruning has spared it."""

from __future__ import annotations

from prometheus_client import Counter

_SEEN = Counter(
    "tokenprune:image_tokens_seen",
    "Tokens of pictures and videos in prompts as they would be unpruned.",
    ["kind"],
)
_KEPT = Counter("tokenprune:image_tokens_kept", "Those of them that were kept.", ["kind"])


def count(kind: str, seen: int, kept: int) -> None:
    """Add a request's picture ("image") or video ("video")."""
    _SEEN.labels(kind).inc(seen)
    _KEPT.labels(kind).inc(kept)
