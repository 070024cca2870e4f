"""What users write: the setting, and a request's own budget."""

from __future__ import annotations

SETTING = "tokenprune"  # in vLLM's additional config
ANY_VERSION = "any_vllm"  # in it: true takes a vLLM that nobody here has run
PER_REQUEST = "tokenprune_keep"  # in a request's mm_processor_kwargs: its own budget
