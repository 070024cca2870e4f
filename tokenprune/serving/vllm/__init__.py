"""Images pruned inside vLLM, before the LLM; found by vLLM through the entry-point group ``vllm.general_plugins``.

    vllm serve MODEL --additional-config '{"tokenprune": {"method": "vflowopt", "keep": 0.25}}'

Without that setting nothing of vLLM is changed. With it, the architecture is replaced by its pruned one before any
processor or model is made: an image has as few placeholders, KV entries and prefill tokens as are kept, at their
original positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from tokenprune.errors import ConfigError
from tokenprune.serving.vllm.names import ANY_VERSION, PER_REQUEST, SETTING

TESTED = ((0, 32), (0, 33))  # of vLLM, the oldest and the newest
# By vLLM's architecture: where its pruned one is.
ARCHITECTURES = {
    "LlavaForConditionalGeneration": "tokenprune.serving.vllm.llava:PrunedLlava",
    "LlavaNextForConditionalGeneration": "tokenprune.serving.vllm.llava_next:PrunedLlavaNext",
    "InternVLForConditionalGeneration": "tokenprune.serving.vllm.internvl:PrunedInternVL",
    "Qwen2VLForConditionalGeneration": "tokenprune.serving.vllm.qwen2_vl:PrunedQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "tokenprune.serving.vllm.qwen2_5_vl:PrunedQwen25VL",
    "Qwen3VLForConditionalGeneration": "tokenprune.serving.vllm.qwen3_vl:PrunedQwen3VL",
}


def register() -> None:
    """What vLLM calls once in every process."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for name, path in ARCHITECTURES.items():
        ModelRegistry.register_model(pruned_name(name), path)
        if not issubclass(MODELS_CONFIG_MAP.get(name, object), _Configured):
            MODELS_CONFIG_MAP[name] = _configured(MODELS_CONFIG_MAP.get(name), configure)
    for name in set(ModelRegistry.get_supported_archs()) - ARCHITECTURES.keys():
        ours = name.startswith(pruned_name("")) or issubclass(
            MODELS_CONFIG_MAP.get(name, object), _Configured
        )
        if not ours:
            MODELS_CONFIG_MAP[name] = _configured(MODELS_CONFIG_MAP.get(name), refuse)
    _refuse_leftovers()


def _refuse_leftovers() -> None:
    """Have a request's budget that nobody takes refused, where vLLM would drop it and answer unpruned.

    A pruned model's processor takes it out; it is left over on a server without the setting, and inside of
    `images_kwargs`.
    """
    from vllm.multimodal.processing.context import InputProcessingContext

    own = InputProcessingContext.call_hf_processor
    if hasattr(own, SETTING):
        return

    @functools.wraps(own)
    def call_hf_processor(self: Any, hf_processor: Any, data: Any, kwargs: Mapping[str, object] = {}) -> Any:
        if PER_REQUEST in kwargs:
            raise ValueError(
                f"{PER_REQUEST}: this server prunes no images; start it with the setting {SETTING!r}, or leave the "
                f"budget out"
            )
        for name, inner in kwargs.items():
            if isinstance(inner, Mapping) and PER_REQUEST in inner:
                raise ValueError(f"{PER_REQUEST} belongs beside {name}, not in it")
        return own(self, hf_processor, data, kwargs)

    setattr(call_hf_processor, SETTING, True)
    InputProcessingContext.call_hf_processor = call_hf_processor


def pruned_name(architecture: str) -> str:
    """Under which a pruned architecture is registered."""
    return f"Tokenprune{architecture}"


class _Configured:
    """Marks our class in vLLM's table of things to do to a config."""


def _configured(before: Any, then: Callable[[Any], None]) -> Any:
    """vLLM's hook on a config of an architecture: what was there before, then ours."""
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    class Configured(before or VerifyAndUpdateConfig, _Configured):  # type: ignore[misc]
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            if before is not None:
                before.verify_and_update_config(vllm_config)
            then(vllm_config)

    return Configured


def refuse(vllm_config: Any) -> None:
    """The setting on a model that is not served pruned, whatever it says.

    Raises:
        ConfigError: names those that are.
    """
    if (vllm_config.additional_config or {}).get(SETTING) is not None:
        raise ConfigError(
            f"{', '.join(vllm_config.model_config.hf_config.architectures)} is not served pruned; served are "
            f"{', '.join(ARCHITECTURES)}: leave the setting {SETTING!r} out, or serve one of these"
        )


def configure(vllm_config: Any) -> None:
    """Turn a config with the setting into one of the pruned architecture; without it nothing happens.

    Raises:
        ConfigError: a wrong setting, or one that cannot be served here.
    """
    given = (vllm_config.additional_config or {}).get(SETTING)
    if given is None:
        return
    from vllm.logger import init_logger

    from tokenprune import __version__
    from tokenprune.serving.vllm.settings import read_settings

    if isinstance(given, Mapping):
        given = dict(given)
        _check_version(given.pop(ANY_VERSION, False))
    if vllm_config.speculative_config is not None:
        raise ConfigError(
            "pruned images are not served with speculative decoding: its drafter takes no positions with gaps"
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ConfigError(
            "pruned images are not served with pipeline_parallel_size > 1; use tensor parallelism"
        )
    model_config = vllm_config.model_config
    config = model_config.hf_config
    settings = read_settings(given)
    config.tokenprune = settings.to_dict()
    served = ", ".join(config.architectures)
    config.architectures = [pruned_name(name) for name in config.architectures]
    # The runner asks the model for positions again, once the encoder has told which tokens are kept, where videos are
    # pruned; by a rate of so little that 1 - rate is 1, none is.
    model_config.multimodal_config.video_pruning_rate = 1e-300
    config.tokenprune_context = config.get_text_config().max_position_embeddings
    if not model_config.uses_mrope:
        _lengthen(config, model_config.max_model_len)
        # Three equal axes of positions: the runner then takes positions with gaps. The decoder itself has one axis, see
        # `crops.py`.
        config.mrope_section = [1, 1, 1]
        model_config.__dict__.pop("uses_mrope", None)
    init_logger("vllm.tokenprune").info(
        "tokenprune %s prunes the images of %s: %s, keep %s",
        __version__,
        served,
        settings.method.name,
        settings.keep,
    )


def _check_version(any_version: object) -> None:
    """Refuse a vLLM that nobody here has run, unless the setting says otherwise.

    Raises:
        ConfigError: says which were run.
    """
    import vllm

    from tokenprune.releases import major_minor

    if any_version is not True and not TESTED[0] <= major_minor(vllm.__version__) <= TESTED[1]:
        low, high = (".".join(map(str, version)) for version in TESTED)
        raise ConfigError(
            f"vLLM {vllm.__version__} was never tried with pruned images (only {low} to {high}); install one of these, "
            f"or set {ANY_VERSION!r}: true in the setting"
        )


def _lengthen(config: Any, generated: int) -> None:
    """Make room for original positions: vLLM checks the pruned length only, and reads its table beyond the end.

    The unpruned prompt may have as many positions as the model has, which the processor sees to; decoding adds to that.
    Tables of models with positions on three axes are four times longer where videos are pruned.

    Args:
        config: of the model.
        generated: tokens that decoding may add at most.

    Raises:
        ConfigError: rotary embeddings that a longer table would change.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("dynamic", "longrope"):
        raise ConfigError(
            f"rotary embeddings of type {kind!r} change with their length; it is not served pruned"
        )
    text.max_position_embeddings += generated
