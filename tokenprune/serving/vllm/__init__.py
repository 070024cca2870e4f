"""Images pruned inside vLLM, before the LLM; found by vLLM through the entry-point group ``vllm.general_plugins``.

    vllm serve MODEL --additional-config '{"tokenprune": {"method": "vflowopt", "keep": 0.25}}'

Without that setting nothing of vLLM is changed. With it, the architecture is replaced by its pruned one before any
processor or model is made: an image has as few placeholders, KV entries and prefill tokens as are kept, at their
original positions.
"""

from __future__ import annotations

from typing import Any

SETTING = "tokenprune"
# By vLLM's architecture: where its pruned one is.
ARCHITECTURES = {
    "LlavaForConditionalGeneration": "tokenprune.serving.vllm.llava:PrunedLlava",
    "LlavaNextForConditionalGeneration": "tokenprune.serving.vllm.llava_next:PrunedLlavaNext",
    "InternVLForConditionalGeneration": "tokenprune.serving.vllm.internvl:PrunedInternVL",
}


def register() -> None:
    """What vLLM calls once in every process."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for name, path in ARCHITECTURES.items():
        ModelRegistry.register_model(pruned_name(name), path)
        if not issubclass(MODELS_CONFIG_MAP.get(name, object), _Configured):
            MODELS_CONFIG_MAP[name] = _configured(MODELS_CONFIG_MAP.get(name))


def pruned_name(architecture: str) -> str:
    """Under which a pruned architecture is registered."""
    return f"Tokenprune{architecture}"


class _Configured:
    """Marks our class in vLLM's table of things to do to a config."""


def _configured(before: Any) -> Any:
    """vLLM's hook on a config of an architecture: what was there before, then the setting, if there is one."""
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    class Configured(before or VerifyAndUpdateConfig, _Configured):  # type: ignore[misc]
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            if before is not None:
                before.verify_and_update_config(vllm_config)
            configure(vllm_config)

    return Configured


def configure(vllm_config: Any) -> None:
    """Turn a config with the setting into one of the pruned architecture; without it nothing happens.

    Raises:
        ConfigError: a wrong setting.
    """
    given = (vllm_config.additional_config or {}).get(SETTING)
    if given is None:
        return
    from tokenprune.serving.vllm.settings import read_settings

    model_config = vllm_config.model_config
    config = model_config.hf_config
    settings = read_settings(given)
    config.tokenprune = settings.to_dict()
    config.architectures = [pruned_name(name) for name in config.architectures]
    # Three equal axes of positions: the runner then takes positions with gaps, and asks the model for them again once
    # the encoder has told which tokens are kept. The decoder itself has one axis, see `llava.py`.
    config.mrope_section = [1, 1, 1]
    model_config.multimodal_config.video_pruning_rate = 1e-9
    model_config.__dict__.pop("uses_mrope", None)
