"""What a method is shown of an image: nothing that is the runtime's or the model's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenprune.config import Beside, PruneConfig
from tokenprune.hashing import digest, mix
from tokenprune.methods.seen import ImageTokens, Needs, Text
from tokenprune.models.base import Family
from tokenprune.runtime.layer_states import LayerStates, last_row, picked
from tokenprune.runtime.plan import Key
from tokenprune.runtime.stages import Stages
from tokenprune.runtime.vision import VisionFacts
from tokenprune.tokens import Image, IntArray, State

#: Most tokens of several images that are shown as one: beyond it a launch per image costs nothing that shows.
JOINED_TOKENS = 8192


class Sight:
    """Makes the views of one prompt's images.

    Args:
        family: of the model whose prompt it is.
        config: what is wanted at each cut.
        num_heads: attention heads of the decoder.
        facts: what the vision tower's hook noted, by kind of image; it may fill up until layer 0 is entered.
        prompts: by image, a hash of the prompt; empty where the method wants none.

    Attributes:
        embeds: (B, L, D) what enters layer 0, kept only for methods that want features or words.
    """

    def __init__(
        self,
        family: Family,
        config: PruneConfig,
        num_heads: int,
        facts: Mapping[str, VisionFacts],
        prompts: Mapping[Key, Tensor],
    ) -> None:
        self.family, self.config, self.num_heads = family, config, num_heads
        self.facts, self.prompts = facts, prompts
        self.alike = family.decoder().turns_heads_alike(family.text_model())
        self.embeds: Tensor | None = None
        # By row and cut: shared by a row's images.
        self._texts: dict[tuple[int, int], Text] = {}
        self._rows: dict[tuple[int, int], dict[Key, Tensor]] = {}

    def of(
        self, stages: Stages, key: Key, *, hidden: Tensor | None = None, caught: LayerStates | None = None
    ) -> ImageTokens:
        """An image as it is before the next cut.

        Args:
            stages: what is left.
            key: (row, image).
            hidden: (B, L', D) states entering the cut's layer; None before layer 0.
            caught: states of the layer before it, if any are wanted.
        """
        needs = self.config.needs_at(len(stages.done))
        image, raster = stages.images[key], stages.raster[key].clone()
        sizes = stages.sizes.get(key)
        shown = self._states(needs.states, needs, hidden, caught, partial(stages.take, key=key))
        if sizes is not None:
            shown["merged_sizes"] = sizes.clone()
        if needs.vision is not None:
            shown["vision"] = self._noted("vision", image, raster)
        if needs.pixels is not None:
            shown["pixels"] = self._own_pixels(self._noted("pixels", image, raster))
        if self.embeds is not None and needs.features:
            shown["features"] = self.features(stages, key)
        if needs.last_row and caught is not None:
            shown["last_row"] = self._last_row(stages, key, caught)
        if key in stages.plan.ends_row:  # its last token stays anyway: the method is not shown it
            raster = raster[:-1]
            shown = {
                name: own if own is None else own[..., :-1] if name == "last_row" else own[:-1]
                for name, own in shown.items()
            }
        return ImageTokens(
            n=len(raster),
            raster=raster,
            grids=image.grids,
            num_heads=self.num_heads,
            digest=self._digest(image, key, raster.device) if needs.digest else None,
            frame_floor=stages.plan.config.arguments.frame_floor,
            cut=len(stages.done),
            starts=tuple(accumulate((part.n for part in image.parts[:-1]), initial=0)),
            prompt=self._text(stages, key[0], needs, hidden, caught),
            **shown,
        )

    def looked(self, stages: Stages, key: Key) -> Tensor:
        """What budgets read of an image's pixels before layer 0, see `Beside`: (n, c)."""
        own = self._noted("pixels", stages.images[key], stages.raster[key])
        assert own is not None
        return own

    def features(self, stages: Stages, key: Key) -> Tensor:
        """The projected features (n, D) of an image's remaining tokens."""
        assert self.embeds is not None
        columns = stages.column_of(key).to(self.embeds.device)
        return self.embeds[key[0]].index_select(0, columns)

    def joined(
        self,
        stages: Stages,
        keys: Sequence[Key],
        *,
        hidden: Tensor | None = None,
        caught: LayerStates | None = None,
    ) -> ImageTokens | None:
        """The tokens of several images one after the other, for methods that look at each token alone.

        None where they cannot be shown so, or are too many to be held at once.
        """
        needs, rasters = self.config.needs_at(len(stages.done)), [stages.raster[key] for key in keys]
        one_by_one = (
            needs.ahead is not None
            or stages.plan.config.arguments.frame_floor
            or stages.plan.ends_row.intersection(keys)
            or sum(map(len, rasters)) > JOINED_TOKENS
        )
        if one_by_one:
            return None
        slots = torch.cat([stages.slots(key) for key in keys])

        def pick(x: Tensor) -> Tensor:
            if len(x) == 1:
                return x[0].index_select(0, slots.to(x.device))
            rows = torch.cat([stages.slots(key) + key[0] * x.shape[1] for key in keys])
            return x.reshape(-1, *x.shape[2:]).index_select(0, rows.to(x.device))

        shown: dict[str, Any] = dict(self._states(needs.states, needs, hidden, caught, pick))
        starts = tuple(accumulate(map(len, rasters[:-1]), initial=0))
        return ImageTokens(
            n=len(slots),
            raster=torch.cat(rasters),
            grids=(),
            num_heads=self.num_heads,
            starts=starts,
            **shown,
        )

    def _states(
        self,
        names: tuple[State, ...],
        needs: Needs,
        hidden: Tensor | None,
        caught: LayerStates | None,
        pick: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor | None]:
        """Those of the states named that there are: before layer 0 there are none."""
        shown: dict[str, Tensor | None] = {}
        for name in names:
            if name == "hidden" and hidden is not None:
                shown[name] = _apart(pick(hidden), hidden)
            elif name != "hidden" and caught is not None:
                shown[name] = _apart(caught.of(name, pick, needs.rotary or not self.alike), caught.raw[name])
        return shown

    def _text(
        self, stages: Stages, row: int, needs: Needs, hidden: Tensor | None, caught: LayerStates | None
    ) -> Text | None:
        """The row's text at this cut; none where the method wants nothing of it."""
        if not (needs.prompt or needs.words):
            return None
        at = (row, len(stages.done) if hidden is not None or caught is not None else -1)
        if at not in self._texts:
            own = stages.plan.prompt(row)
            columns = _to_device(own, next(iter(stages.raster.values())).device)
            slots = stages.text_slots(columns, row)
            shown = self._states(needs.prompt, needs, hidden, caught, picked(row, slots))
            if self.embeds is not None and needs.words:
                shown["words"] = picked(row, columns)(self.embeds)
            behind = int((own > max(image.columns[-1] for image in stages.plan.rows[row])).sum())
            scale = 1.0 if caught is None else float(caught.module.scaling)  # type: ignore[arg-type]
            self._texts = {where: text for where, text in self._texts.items() if where[1] == at[1]}
            self._texts[at] = Text(columns, **shown, behind=behind, scale=scale)
        return self._texts[at]

    def _last_row(self, stages: Stages, key: Key, caught: LayerStates) -> Tensor:
        """(heads, n) attention of the row's last token over the image's remaining tokens, of all the row's."""
        at = (key[0], len(stages.done))
        if at not in self._rows:
            row, device = key[0], next(iter(caught.raw.values())).device
            text = _to_device(stages.plan.prompt(row), device)
            visual = [own for own in stages.images if own[0] == row]
            places = [stages.text_slots(text, row), *(stages.slots(own).to(device) for own in visual)]
            columns = torch.cat([text, *(stages.column_of(own).to(device) for own in visual)])
            weights = last_row(caught, row, torch.cat(places), columns)
            parts = weights.split([len(own) for own in places], dim=1)
            self._rows = {at: dict(zip(visual, parts[1:], strict=True))}  # of the row that is being looked at
        return self._rows[at][key].clone()

    def _own_pixels(self, noted: Tensor | None) -> Tensor | None:
        """What the method itself asked for: what budgets read is no business of it."""
        reader = self.config.needs.pixels
        return reader.for_method(noted) if isinstance(reader, Beside) and noted is not None else noted

    def _noted(self, what: str, image: Image, raster: Tensor) -> Tensor | None:
        """What the vision tower's hook noted of an image's patches, token by token."""
        parts = []
        for part in image.parts or (image,):
            facts = self.facts.get(part.kind)
            pictures = [] if facts is None else getattr(facts, what)[slice(*part.items)]
            if not pictures:
                return None
            whole = torch.stack([p if p.ndim == 2 else p[:, None] for p in pictures])
            tokens = self.family.to_tokens(whole, part)
            parts.append(tokens if pictures[0].ndim == 2 else tokens[:, 0])
        noted = torch.cat([part.to(raster.device) for part in parts])
        return noted if len(raster) == image.n else noted.index_select(0, raster)

    def _digest(self, image: Image, key: Key, device: torch.device) -> Tensor | None:
        hashes = []
        for part in image.parts or (image,):
            facts = self.facts.get(part.kind)
            if facts is None or facts.digests is None:
                return None
            hashes.append(_combined(facts.digests[slice(*part.items)]))
        return mix(_combined(torch.stack(hashes)).to(device) + self.prompts[key].to(device))


class Shown(Sequence[ImageTokens]):
    """The images of a cut, made one by one as they are looked at, so that not all their states are held at once."""

    def __init__(
        self,
        make: Callable[[Key], ImageTokens],
        keys: Sequence[Key],
        join: Callable[[Sequence[Key]], ImageTokens | None],
    ) -> None:
        self._make, self._keys, self._join = make, keys, join

    def joined(self) -> ImageTokens | None:
        """All of them as one; see `Sight.joined`."""
        return self._join(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, i: int) -> ImageTokens: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[ImageTokens]: ...
    def __getitem__(self, i: int | slice) -> ImageTokens | Sequence[ImageTokens]:
        return (
            Shown(self._make, self._keys[i], self._join)
            if isinstance(i, slice)
            else self._make(self._keys[i])
        )


def _to_device(columns: IntArray, device: torch.device) -> Tensor:
    """A copy that nothing waits for."""
    return torch.from_numpy(columns).to(device, non_blocking=True)


def _apart(own: Tensor, source: Tensor) -> Tensor:
    """Never a view of the model's own states: a method that writes into what it is shown changes nothing else."""
    return own.clone() if own.untyped_storage().data_ptr() == source.untyped_storage().data_ptr() else own


def _combined(digests: Tensor) -> Tensor:
    """One hash of the hashes (m,) of the pictures an image consists of."""
    if len(digests) == 1:
        return digests[0]
    return mix(digests + torch.arange(len(digests), device=digests.device)).sum()


def prompt_digests(ids: Tensor, mask: NDArray[np.bool_] | None, rows: list[list[Image]]) -> dict[Key, Tensor]:
    """A hash per image of its row's ids up to the row's last image (left padding left out) and its place in it."""
    prompts: dict[Key, Tensor] = {}
    for r, row in enumerate(rows):
        if not row:
            continue
        end = max(int(image.columns[-1]) for image in row) + 1
        first = 0 if mask is None else int(mask[r].argmax())
        prompt = mix(digest(ids[r : r + 1, first:end])[0])
        for i in range(len(row)):
            prompts[r, i] = prompt + i
    return prompts
