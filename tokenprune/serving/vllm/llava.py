"""LLaVA-1.5 inside vLLM: a CLIP or SigLIP tower, a fixed number of tokens per image, one axis of positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModalPruning
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptReplacement, PromptUpdate

from tokenprune.arguments import read_keep
from tokenprune.budget import Keep, check_keep
from tokenprune.errors import ConfigError
from tokenprune.serving.vllm.ahead import check_decoder, decoder_states
from tokenprune.serving.vllm.choosing import choose_rows
from tokenprune.serving.vllm.cpu import mend_runner
from tokenprune.serving.vllm.positions import first_positions, true_positions, with_channels
from tokenprune.serving.vllm.settings import PER_REQUEST, Settings, read_settings
from tokenprune.tokens import Grid, VisionAttention

KEPT = "tokenprune_kept"  # how many rows an image has, among what the encoder is given


class PrunedLlavaProcessor(LlavaMultiModalProcessor):
    """Puts as many placeholders as tokens are kept."""

    def _settings(self) -> Settings:
        return read_settings(self.info.get_hf_config().tokenprune)

    def _kept(self, kwargs: Mapping[str, object]) -> int:
        whole = self.info.get_max_image_tokens()
        return self._settings().count(whole, _keep_of(kwargs))

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        own = {name: value for name, value in hf_kwargs.items() if name != PER_REQUEST}
        found = super()._apply_hf_processor_main(mm_items, own)
        if "pixel_values" in found:
            found[KEPT] = torch.full((len(found["pixel_values"]),), self._kept(hf_kwargs))
        elif "image_embeds" in found:
            raise ValueError("tokenprune: images have to come as pictures, not as embeddings")
        return found

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**fields, KEPT: MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        token = self.info.get_hf_config().image_token_index
        return [
            PromptReplacement(
                modality="image", target=[token], replacement=[token] * self._kept(hf_processor_mm_kwargs)
            )
        ]


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class PrunedLlava(LlavaForConditionalGeneration, SupportsMRoPE, SupportsMultiModalPruning):
    """vLLM's own model; an image's embeddings are pruned as the encoder puts them out."""

    supports_mrope = True
    supports_multimodal_pruning = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        mend_runner()
        self.settings = read_settings(self.config.tokenprune)
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        if self.config.vision_feature_select_strategy != "default" and self._has_cls:
            raise ConfigError(
                "vision_feature_select_strategy='full' keeps the CLS token; it is not served pruned"
            )
        self.grid = Grid(1, side, side)
        self.whole = side * side
        self._seen: list[Tensor] = []
        needs = self.settings.method.needs()
        if needs.ahead is not None:
            check_decoder(self.language_model.model)
            if needs.ahead > len(self.language_model.model.layers):
                raise ConfigError(
                    f"the decoder has fewer than the {needs.ahead} layers that are looked ahead"
                )
        if needs.vision is not None:
            attention = self._tower_layers[-1].self_attn
            attention.qkv_proj.register_forward_hook(
                lambda _module, _args, output: self._seen.append(output[0])
            )

    # -- pictures ---------------------------------------------------------------------------------------------------

    def embed_multimodal(self, **kwargs: object) -> Any:
        kept: Any = kwargs.pop(KEPT, None)
        pixels: Any = kwargs.get("pixel_values")
        self._seen.clear()
        features = super().embed_multimodal(**kwargs)
        if kept is None:
            return features
        found = []
        for i, count in enumerate(torch.as_tensor(kept).flatten().tolist()):
            attention = self._attention(i) if self._seen else None
            patches = None if self.settings.method.needs().pixels is None else self._patches(pixels[i])
            rows, own = choose_rows(
                self.settings.method,
                features[i],
                count,
                self.grid,
                attention,
                patches,
                partial(self._ahead, features[i]),
                self.config.text_config.num_attention_heads,
            )
            found.append(with_channels(rows, own))
        self._seen.clear()
        return tuple(found)

    def _ahead(self, features: Tensor) -> dict[str, Tensor]:
        needs = self.settings.method.needs()
        assert needs.ahead is not None
        return decoder_states(self.language_model.model, features, needs.ahead, needs.states)

    @property
    def _has_cls(self) -> bool:
        return bool(self.config.vision_config.model_type == "clip_vision_model")

    @property
    def _tower_layers(self) -> Any:
        tower: Any = self.vision_tower
        return getattr(tower, "vision_model", tower).encoder.layers

    def _attention(self, i: int) -> VisionAttention:
        module = self._tower_layers[-1].self_attn
        query, key, _ = self._seen[-1][i].chunk(3, dim=-1)
        heads = module.num_heads_per_partition
        query, key = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in (query, key))
        return VisionAttention(query, key, module.scale, self._has_cls)

    def _patches(self, pixels: Tensor) -> Tensor:
        """8-bit patches (n, 3, p, p) of a normalised picture, by CLIP's or SigLIP's usual mean and deviation."""
        mean, deviation = _SCALES[self._has_cls]
        own = (pixels.float() * pixels.new_tensor(deviation)[:, None, None].float()) + pixels.new_tensor(
            mean
        )[:, None, None]
        size = self.config.vision_config.patch_size
        whole = (own * 255).round().clamp(0, 255).to(torch.uint8)
        cut = whole.unfold(1, size, size).unfold(2, size, size)
        return cut.permute(1, 2, 0, 3, 4).flatten(0, 1)

    # -- positions --------------------------------------------------------------------------------------------------

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
        images = [(f.mm_position.offset, f.mm_position.length) for f in mm_features]
        return first_positions(input_tokens, sorted(images), self.whole)

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        tokens = torch.as_tensor(input_ids)
        rows, positions = true_positions(
            tokens,
            self.config.image_token_index,
            multimodal_embeddings,
            mrope_positions,
            num_computed_tokens,
            self.whole,
        )
        return rows, positions, int(positions[0, -1]) + 1 - len(tokens)

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The decoder has one axis; the three are equal."""
        return super().forward(input_ids, positions[0] if positions.ndim == 2 else positions, *args, **kwargs)


_SCALES = {
    True: ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    False: ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def _keep_of(kwargs: Mapping[str, object]) -> Keep | None:
    """What a request asks for.

    Raises:
        ValueError: it is no budget; the request is refused.
    """
    given: Any = kwargs.get(PER_REQUEST)
    if given is None:
        return None
    try:
        return read_keep(given) if isinstance(given, str) else check_keep(given)
    except ConfigError as error:
        raise ValueError(f"{PER_REQUEST}: {error}") from None
