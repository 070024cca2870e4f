"""The model's part of pruning: the encoder's rows are chosen and carry their positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.multimodal.inputs import PlaceholderRange

from tokenprune.models.base import Layout
from tokenprune.serving.vllm.choosing import choose_rows
from tokenprune.serving.vllm.cpu import mend_runner
from tokenprune.serving.vllm.layout import Pictures, structural
from tokenprune.serving.vllm.positions import expanded, true_positions, with_channels
from tokenprune.serving.vllm.processing import kept_name, whole_name
from tokenprune.serving.vllm.settings import read_settings


class PrunedModel:
    """In front of one of vLLM's models, of whose methods it overrides what vLLM's protocols are made of."""

    # vLLM's protocols by their marks, not as bases: a Protocol among them would have its own __init__ run.
    supports_mrope = True
    supports_multimodal_pruning = True
    supported_video_pruning_methods = ("evs",)
    kinds: ClassVar[tuple[str, ...]] = ("image",)
    config: Any
    pictures: Pictures

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        mend_runner()
        self.settings = read_settings(self.config.tokenprune)
        self.pictures = self.make_pictures(self.config)
        self._batch = vllm_config.scheduler_config.max_num_encoder_input_tokens
        self.check_served()
        if self.settings.method.needs().vision is not None:
            self.watch_tower()

    @staticmethod
    def make_pictures(config: Any) -> Pictures:
        """The family's arithmetic."""
        raise NotImplementedError

    def check_served(self) -> None:
        """Refuse what the method needs and this model does not offer.

        Raises:
            ConfigError: says what.
        """

    def watch_tower(self) -> None:
        """Note what the tower's attention is made of whenever it runs."""
        raise NotImplementedError

    def seen(
        self, fields: Mapping[str, Any], kind: str, layouts: Sequence[Layout], features: Sequence[Tensor]
    ) -> Iterator[dict[str, Any]]:
        """What the method wants to see of each picture, by the names of `ImageTokens`."""
        raise NotImplementedError

    # -- rows -------------------------------------------------------------------------------------------------------

    def embed_multimodal(self, **fields: Any) -> Any:
        """Rows of each picture that stay, with their channels."""
        kind = next((kind for kind in self.kinds if kept_name(kind) in fields), None)
        if kind is None:
            return super().embed_multimodal(**fields)  # type: ignore[misc]
        rows = torch.as_tensor(fields.pop(kept_name(kind))).flatten().tolist()
        fields.pop(whole_name(kind))
        found: list[Tensor] = []
        for part, layouts in self._batches(fields, kind):
            # Behind the embedding there may be deep-stack features, and behind them channels of vLLM's own.
            width = self._width * (1 + self._levels)
            made = [own[:, :width] for own in super().embed_multimodal(**part)]  # type: ignore[misc]
            offsets = self.seconds(part, kind, len(layouts))
            shown = self.seen(part, kind, layouts, [own[:, : self._width] for own in made])
            for own, layout, told, seconds in zip(made, layouts, shown, offsets, strict=True):
                parts = list(self._parts(kind, layout, own, told))
                each = rows[len(found)] // len(parts)
                found.append(torch.cat([self._pruned(*part, each, seconds) for part in parts]))
        return tuple(found)

    def _batches(self, fields: Mapping[str, Any], kind: str) -> Iterator[tuple[dict[str, Any], list[Layout]]]:
        """The pictures in parts no larger than those that stock vLLM would give the tower.

        vLLM counts them in the tokens that are kept, by which a request could have any number of them in one batch.
        """
        layouts = self.pictures.layouts(kind, self.pictures.sizes(fields)[kind])
        crops = self.pictures.crops(kind, layouts)
        first, total = 0, 0
        for i, layout in enumerate(layouts):
            if i > first and total + layout.columns > self._batch:
                yield _part(fields, crops, first, i), layouts[first:i]
                first, total = i, 0
            total += layout.columns
        yield _part(fields, crops, first, len(layouts)), layouts[first:]

    def _parts(
        self, kind: str, layout: Layout, features: Tensor, shown: Mapping[str, Tensor]
    ) -> Iterator[tuple[Layout, Tensor, dict[str, Tensor]]]:
        """An image's parts that have budgets of their own, with what belongs to each."""
        parts = self.pictures.parts(kind, layout)
        shares = {name: whole.chunk(len(parts)) for name, whole in shown.items()}
        for i, (part, own) in enumerate(zip(parts, features.chunk(len(parts)), strict=True)):
            yield part, own, {name: share[i] for name, share in shares.items()}

    def _pruned(
        self, layout: Layout, features: Tensor, shown: Mapping[str, Any], count: int, seconds: float
    ) -> Tensor:
        """The rows (count, D) of an image that stay, with their channels."""
        stays = structural(layout, features.device)
        always = stays.nonzero()[:, 0]
        rows, kept = choose_rows(
            self.settings.method,
            features[~stays],
            count - len(always),
            layout.grids,
            shown,
            self.config.get_text_config().num_attention_heads,
            self._width,
        )
        columns, order = torch.cat([(~stays).nonzero()[:, 0].index_select(0, kept), always]).sort()
        rows = torch.cat([rows, features[stays]])[order]
        return with_channels(rows, self.places(layout, columns, seconds), layout.columns)

    def of_tokens(self, layout: Layout, told: Sequence[Tensor]) -> Tensor:
        """What was told of the patches of each of an image's crops, a number or several each, for its tokens."""
        whole = torch.stack([own if own.ndim == 2 else own[:, None] for own in told])
        tokens = self.pictures.to_tokens(layout, whole)
        return tokens if told[0].ndim == 2 else tokens[:, 0]

    def places(self, layout: Layout, columns: Tensor, seconds: float) -> Tensor:
        """(k, 3) positions of an image's tokens behind its own first, on three axes; here all alike."""
        return columns[:, None].expand(-1, 3)

    def seconds(self, fields: Mapping[str, Any], kind: str, count: int) -> list[float]:
        """By how many positions the frames of each video are apart."""
        return [1.0] * count

    @property
    def _width(self) -> int:
        return int(self.config.get_text_config().hidden_size)

    @property
    def _levels(self) -> int:
        """Of deep-stack features behind each embedding."""
        return len(getattr(self.config.vision_config, "deepstack_visual_indexes", None) or ())

    # -- positions --------------------------------------------------------------------------------------------------

    def whole_positions(self, tokens: list[int], features: Any) -> tuple[Tensor, int]:
        """Of the unpruned prompt (3, N), and by how much the next one is ahead of N; here one axis, thrice."""
        return torch.arange(len(tokens)).expand(3, -1), 0

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
        """Those of the unpruned prompt; of each image for now its first ones."""
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        images = []
        for feature in features:
            runs = _runs(feature.mm_position)
            whole = int(feature.data[whole_name(feature.modality)].data) // len(runs)
            images += [(*run, whole) for run in runs]
        tokens, columns = expanded(input_tokens, images)
        moved = [
            replace(feature, mm_position=PlaceholderRange(columns[feature.mm_position.offset], 1))
            for feature in features
        ]
        positions, ahead = self.whole_positions(tokens, moved)
        return positions[:, columns].clone(), ahead + len(tokens) - len(input_tokens)

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        ahead = int(mrope_positions[0, -1]) + 1 - len(input_ids)  # the last token is text
        if not multimodal_embeddings:  # decoding, and chunks without images: all is known already
            return multimodal_embeddings, mrope_positions, ahead
        tokens = torch.as_tensor(input_ids)
        is_image = torch.zeros(len(tokens), dtype=torch.bool)
        for kind in self.kinds:
            is_image |= tokens == getattr(self.config, f"{kind}_token_id")
        rows, positions = true_positions(
            is_image, multimodal_embeddings, mrope_positions, num_computed_tokens
        )
        return rows, positions, ahead


def _runs(place: Any) -> list[tuple[int, int]]:
    """Where rows stand at a place that may have text of its own: offset and length of each run of them."""
    if place.is_embed is None:
        return [(place.offset, place.length)]
    edges = torch.nn.functional.pad(place.is_embed.long(), (1, 1)).diff()
    starts, ends = ((edges == sign).nonzero()[:, 0].tolist() for sign in (1, -1))
    return [(place.offset + start, end - start) for start, end in zip(starts, ends, strict=True)]


def _part(fields: Mapping[str, Any], crops: Sequence[int], first: int, end: int) -> dict[str, Any]:
    """Pictures `first` to `end` - 1 of fields that hold one entry per picture, or one per crop."""
    if first == 0 and end == len(crops):
        return dict(fields)
    low, high = sum(crops[:first]), sum(crops[:end])
    return {
        name: value[first:end] if len(value) == len(crops) else value[low:high]
        for name, value in fields.items()
    }
