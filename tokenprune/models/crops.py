"""What most families share: a tower that is given square crops (N, 3, H, W) and makes a fixed grid of each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.hashing import digest
from tokenprune.models.base import Family, Layout, VisionCall, VisionTap
from tokenprune.tokens import Grid, IntArray, VisionAttention


class Crops(Family):
    """Every crop of (H, W) pixels gives (H / patch / merge) x (W / patch / merge) tokens."""

    @abstractmethod
    def merge(self) -> int:
        """Patches per side that are merged into one token."""

    def vision_tower(self) -> nn.Module:
        return self.base().vision_tower  # type: ignore[return-value]

    def tower_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        pixels = args[0] if args else kwargs["pixel_values"]
        return pixels, crop_sizes(pixels)

    def sizes(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        pixels = inputs.get("pixel_values")
        return {} if pixels is None else {"image": crop_sizes(pixels)}

    def grid(self, height: int, width: int) -> Grid:
        """The tokens of one crop of so many pixels."""
        patch, merge = side(self.config.vision_config.patch_size), self.merge()
        return Grid(1, height // patch // merge, width // patch // merge, merge)

    def layouts(self, kind: str, sizes: IntArray) -> list[Layout]:
        return [Layout((self.grid(int(h), int(w)),)) for h, w in sizes]

    def digests(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        return digest(pixels)

    def vision_tap(self) -> VisionTap:
        tower = self.vision_tower()
        feature = feature_layer(self.config)
        try:
            attentions = self.vision_attentions(tower)
            # hidden_states[i] is the output of layer i - 1; entry 0 is the embedding.
            index = (feature if feature >= 0 else len(attentions) + 1 + feature) - 1
            if index < 0:
                raise UnsupportedModelError(
                    "vision_feature_layer=0 reads the embeddings: there is no attention to use"
                )
            sources = self.vision_sources(attentions[index])
        except AttributeError as error:
            raise UnsupportedModelError(
                f"the vision attention of {self.name} models with a {type(tower).__name__} is not available; use a "
                f"method that does not need it"
            ) from error
        read = partial(self.attend, attentions[index], has_cls(tower))
        return VisionTap(attentions[index], sources, read)

    def pixel_scale(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """As the tower's own processors have it: CLIP's of OpenAI, 0.5 of SigLIP."""
        kind = self.config.vision_config.model_type
        if kind not in SCALES:
            raise UnsupportedModelError(
                f"how {kind!r} towers normalise pixels is not known; use a method that does not need them"
            )
        return SCALES[kind]

    def patches(self, pixels: Tensor, sizes: IntArray | None) -> list[Tensor]:
        p = side(self.config.vision_config.patch_size)
        crops = pixels.flatten(0, -4)
        height, width = crops.shape[-2] // p, crops.shape[-1] // p
        cut = crops[..., : height * p, : width * p].unflatten(-1, (width, p)).unflatten(-3, (height, p))
        return list(cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2))

    def vision_attentions(self, tower: nn.Module) -> list[nn.Module]:
        """The attention module of each of the tower's layers."""
        inner: Any = getattr(tower, "vision_model", tower)
        return [layer.self_attn for layer in inner.encoder.layers]

    def vision_sources(self, attention: Any) -> tuple[nn.Module, nn.Module]:
        """The modules whose outputs (crops, m, heads * head_dim) are the queries and keys."""
        return attention.q_proj, attention.k_proj

    def attend(self, attention: Any, cls: bool, call: VisionCall) -> list[list[VisionAttention]]:
        """The attention of each crop."""
        query, key = (by_head(x, attention.num_heads) for x in call.outputs)
        return [[VisionAttention(q, k, attention.scale, cls)] for q, k in zip(query, key, strict=True)]


_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Mean and standard deviation of pixels, by type of tower.
SCALES = {
    "clip_vision_model": _CLIP,
    "siglip_vision_model": _HALF,
    "internvl_vision": _IMAGENET,
    "idefics3_vision": _HALF,
    "smolvlm_vision": _HALF,
    "llama4_vision_model": _HALF,
}


def crop_sizes(pixels: Tensor) -> Tensor:
    """(N, 2) height and width of (..., 3, H, W) crops."""
    height, width = pixels.shape[-2:]
    return torch.tensor([[height, width]]).expand(pixels.shape[:-3].numel(), -1)


def side(size: Any) -> int:
    """A patch or image size that configs give as an int or as two equal ones."""
    return int(size if isinstance(size, int) else size[0])


def by_head(x: Tensor, heads: int) -> Tensor:
    """(crops, m, heads * d) -> (crops, heads, m, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def feature_layer(config: Any) -> int:
    """The entry of the tower's hidden states that becomes the features; of several, the last listed one."""
    names = ("vision_feature_layer", "vision_feature_layers")  # the second of VipLLaVA in older releases
    feature = next((getattr(config, name) for name in names if hasattr(config, name)), -1)
    return int(feature if isinstance(feature, int) else feature[-1])


def has_cls(tower: nn.Module) -> bool:
    return any(name.endswith(("class_embedding", "cls_token")) for name, _ in tower.named_parameters())
