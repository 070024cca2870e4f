"""What happened in a call: tokens in and kept, bytes, FLOPs, time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenprune.budget import average_kept
from tokenprune.runtime.outcome import Outcome, Total
from tokenprune.runtime.plan import unpool
from tokenprune.tokens import Image


@dataclass(frozen=True)
class ImageReport:
    """One image of one row.

    Attributes:
        row, image: where it is.
        kind: "image" or "video".
        grids: (frames, height, width) of its tokens, one per view.
        tokens: prunable visual tokens it came with.
        structural: placeholders of it that are never pruned (the newlines of any-resolution images).
        kept: tokens left after each cut.
        merged: tokens merged into others at each cut.
        average: mean over decoder layers of its remaining tokens.
        notes: what happened to it besides, and how often ("scores that were no numbers": 3).
        continues: whether it is one more crop of the picture that the image before it shows (Idefics3, SmolVLM).
        cell: the row and column of a crop within its picture; None where it shows all of it.
    """

    row: int
    image: int
    kind: str
    grids: tuple[tuple[int, int, int], ...]
    tokens: int
    structural: int
    kept: tuple[int, ...]
    merged: tuple[int, ...]
    average: float
    notes: dict[str, int] = field(default_factory=dict)
    continues: bool = False
    cell: tuple[int, int] | None = None


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer: sequence length in prefill, and bytes of its KV cache right after."""

    length: int
    kv_used: int
    kv_allocated: int


@dataclass(frozen=True)
class Report:
    """The last prompt of a wrapped model.

    Attributes:
        method, parameters: what ran.
        layers_cut: decoder layers the cuts enter (0 is before the LLM).
        layer_reason: where that layer came from.
        keep, budget: as asked.
        images: per row and image.
        layers: per decoder layer.
        length: columns of the input.
        flops, flops_unpruned: decoder prefill, all rows.
        seconds_scoring, seconds_compacting: spent by the method and by shortening tensors.
        pruned: whether any token was dropped.
        index: (B, L') input column of each position of the output, -1 for filler; None when nothing was cut.
        reason: why nothing was pruned although the budget asked for it, or None.
        profile: hash of the profile that was used, or None.
    """

    method: str
    parameters: dict[str, Any]
    layers_cut: tuple[int, ...]
    layer_reason: str
    keep: float | int | None
    budget: str
    images: tuple[ImageReport, ...]
    layers: tuple[LayerReport, ...]
    length: int
    flops: int
    flops_unpruned: int
    seconds_scoring: float
    seconds_compacting: float
    pruned: bool
    index: Tensor | None
    reason: str | None
    profile: str | None
    _outcome: Outcome = dataclasses.field(repr=False, compare=False)

    @property
    def keep_lists(self) -> list[list[list[list[int]]]]:
        """`keep_lists[cut][row][image]`: kept raster indices, in the form `wrap(keep_lists=...)` takes."""
        return _keep_lists(self._outcome)

    @property
    def merges(self) -> list[dict[tuple[int, int], tuple[Tensor, Tensor]]]:
        """`merges[cut][row, image]` is ((m, 2) pairs (source, slot) of raster indices, (m,) weights)."""
        return self._outcome.merged

    @property
    def biases(self) -> list[dict[tuple[int, int], tuple[Tensor, Tensor]]]:
        """`biases[cut][row, image]` is ((k,) raster indices, (k,) added to their attention logits from there on)."""
        return self._outcome.biased

    @property
    def reads_text(self) -> bool:
        """Whether text after an image could change what was kept of it."""
        return self._outcome.config.method.reads()

    @property
    def pooled(self) -> bool:
        """Whether each row's images shared one budget."""
        return self._outcome.pooled

    @property
    def tokens(self) -> int:
        """Visual tokens of all images."""
        return sum(image.tokens for image in self.images)

    @property
    def kept(self) -> int:
        """Visual tokens left after the last cut."""
        return sum(image.kept[-1] if image.kept else image.tokens for image in self.images)

    @property
    def retention_average(self) -> float:
        """Share of visual tokens kept, averaged over decoder layers (1.0 when there are none)."""
        return sum(image.average for image in self.images) / self.tokens if self.tokens else 1.0

    @property
    def retention_after_cut(self) -> float:
        """Share of visual tokens left after the last cut (1.0 when there are none)."""
        return self.kept / self.tokens if self.tokens else 1.0

    @property
    def kv_used(self) -> int:
        """Bytes of keys and values in use, all layers and rows."""
        return sum(layer.kv_used for layer in self.layers)

    @property
    def kv_allocated(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(layer.kv_allocated for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, ready for JSON."""
        fields = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("_outcome", "index")
        }
        fields["images"] = [dataclasses.asdict(i) for i in self.images]
        fields["layers"] = [dataclasses.asdict(layer) for layer in self.layers]
        fields["retention_average"] = self.retention_average
        fields["retention_after_cut"] = self.retention_after_cut
        return fields

    def to_json(self, **options: Any) -> str:
        return json.dumps(self.to_dict(), **options)

    def draw(
        self, images: Sequence[Any], row: int = 0, *, processor: Any = None, stages: bool = False
    ) -> list[Any]:
        """Draw a row's kept and merged tokens over its pictures.

        Args:
            images: PIL images in the order of the prompt; of a video, a list of its frames.
            row: of the batch.
            processor: the model's, for those that cut out the middle of a picture: only that part is drawn then.
            stages: one drawing per cut, side by side, instead of what is left after the last one.

        Returns:
            A PIL image per picture.

        Raises:
            ConfigError: the pictures are not those of the row.
        """
        from tokenprune.draw import draw_report
        from tokenprune.images import as_seen

        if processor is not None:
            cut = getattr(processor, "image_processor", processor)
            images = [
                as_seen(cut, i) if hasattr(i, "convert") else [as_seen(cut, f) for f in i] for i in images
            ]
        return draw_report(self, images, row, stages=stages)

    def __str__(self) -> str:
        if not self.images and self.reason is not None:
            return f"tokenprune: NOTHING WAS PRUNED: {self.reason}"
        if not self.images:
            return "tokenprune: the last prompt had no visual tokens; nothing to prune"
        where = (
            ", ".join(f"before layer {k}" if k else "before the LLM" for k in self.layers_cut) or "nowhere"
        )
        lines = [
            f"tokenprune: {self.method}, cut {where} ({self.layer_reason})",
            f"  {'row':>3} {'image':>5} {'grid':>9} {'tokens':>7} {'kept':>12} {'merged':>7} {'average':>8}",
        ]
        for image in self.images:
            grid = "+".join(_shape(grid) for grid in image.grids)
            tokens = f"{image.tokens}+{image.structural}" if image.structural else str(image.tokens)
            kept = " > ".join(map(str, image.kept)) or str(image.tokens)
            lines.append(
                f"  {image.row:>3} {image.image:>5} {grid:>9} {tokens:>7} {kept:>12} {sum(image.merged):>7} "
                f"{image.average:>8.1f}"
            )
            lines += [f"  {'':>9} {what} ({times})" for what, times in image.notes.items()]
        nothing = "" if self.pruned else " (NOTHING WAS PRUNED)"
        if self.reason is not None:
            nothing = f" (NOTHING WAS PRUNED: {self.reason})"
        lines.append(
            f"  visual tokens {self.retention_average:.1%} on average over layers, "
            f"{self.retention_after_cut:.1%} after the last cut{nothing}"
        )
        lines.append(
            f"  sequence {self.length} -> {self.layers[-1].length if self.layers else self.length}, "
            f"KV {self.kv_used / 1e6:,.1f} MB{_allocated(self.kv_used, self.kv_allocated)}, prefill FLOPs x "
            f"{self.flops / self.flops_unpruned:.3f}"
        )
        lines.append(
            f"  scoring {self.seconds_scoring * 1e3:.2f} ms, compacting {self.seconds_compacting * 1e3:.2f} ms"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class TotalReport:
    """Sums over the prompts of a wrapped model since it was wrapped, or since the last reset.

    Attributes:
        prompts, rows, images: how many there were.
        tokens: visual tokens they came with.
        kept: visual tokens left after the last cut.
        retention_average: share of visual tokens kept, averaged over decoder layers and weighted by tokens.
        retention_after_cut: the same after the last cut.
        kv_used, kv_allocated: bytes of keys and values right after the prompts.
        flops, flops_unpruned: decoder prefill.
        seconds_scoring, seconds_compacting: spent by the method and by shortening tensors.
    """

    prompts: int
    rows: int
    images: int
    tokens: int
    kept: int
    retention_average: float
    retention_after_cut: float
    kv_used: int
    kv_allocated: int
    flops: int
    flops_unpruned: int
    seconds_scoring: float
    seconds_compacting: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        if not self.prompts:
            return "tokenprune: no prompts yet"
        return (
            f"tokenprune: {self.prompts} prompts, {self.images} images; visual tokens {self.retention_average:.1%} on "
            f"average over layers, {self.retention_after_cut:.1%} after the last cut; KV {self.kv_used / 1e6:,.1f} MB; "
            f"prefill FLOPs x {self.flops / self.flops_unpruned:.3f}; scoring {self.seconds_scoring:.3f} s, compacting "
            f"{self.seconds_compacting:.3f} s"
        )


def make_total(total: Total) -> TotalReport:
    """Put the sums into readable form."""
    scoring, compacting = total.seconds()
    tokens = total.tokens
    return TotalReport(
        prompts=total.prompts,
        rows=total.rows,
        images=total.images,
        tokens=tokens,
        kept=total.kept,
        retention_average=total.averages / tokens if tokens else 1.0,
        retention_after_cut=total.kept / tokens if tokens else 1.0,
        kv_used=total.kv_used,
        kv_allocated=total.kv_allocated,
        flops=total.flops,
        flops_unpruned=total.flops_unpruned,
        seconds_scoring=scoring,
        seconds_compacting=compacting,
    )


def make_report(outcome: Outcome) -> Report:
    """Put the runtime's facts into readable form."""
    config = outcome.config
    num_layers = len(outcome.lengths)
    images = []
    lists = _keep_lists(outcome) if outcome.pooled else []
    notes = _notes(outcome)
    for r, row in enumerate(outcome.rows):
        for i, image in enumerate(row):
            kept = (
                tuple(counts[r, i] for counts in outcome.counts)
                if not lists
                else tuple(len(x[r][i]) for x in lists)
            )
            merged = tuple(_merged(cut[r, i][0]) if (r, i) in cut else 0 for cut in outcome.merged)
            average = average_kept(image.n, num_layers, config.cuts, kept) if kept else float(image.n)
            grids = tuple((g.frames, g.height, g.width) for g in image.grids)
            images.append(
                ImageReport(
                    r,
                    i,
                    image.kind,
                    grids,
                    image.n,
                    image.structural,
                    kept,
                    merged,
                    average,
                    notes.get((r, i), {}),
                    image.continues,
                    image.cell,
                )
            )
    used = outcome.kv_used or [0] * num_layers
    allocated = outcome.kv_allocated or [0] * num_layers
    return Report(
        method=config.method.name,
        parameters=config.method.described(),
        layers_cut=tuple(cut.layer for cut in config.cuts),
        layer_reason=config.layer_reason,
        keep=config.arguments.keep,
        budget=config.arguments.meaning,
        images=tuple(images),
        layers=tuple(map(LayerReport, outcome.lengths, used, allocated)),
        length=outcome.length,
        flops=outcome.flops,
        flops_unpruned=outcome.flops_unpruned,
        seconds_scoring=outcome.scoring.seconds,
        seconds_compacting=outcome.compacting.seconds,
        pruned=outcome.index is not None,
        index=outcome.index,
        reason=outcome.reason,
        profile=getattr(config.arguments.profile, "hash", None),
        _outcome=outcome,
    )


def _keep_lists(outcome: Outcome) -> list[list[list[list[int]]]]:
    def row_of(cut: dict[tuple[int, int], Tensor], r: int, row: list[Image]) -> list[list[int]]:
        if outcome.pooled and row:
            return unpool(cut[r, 0].tolist(), row)
        return [cut[r, i].tolist() for i in range(len(row))]

    return [[row_of(cut, r, row) for r, row in enumerate(outcome.rows)] for cut in outcome.kept]


def _merged(pairs: Tensor) -> int:
    """Tokens that were merged into others."""
    source, slot = pairs.unbind(1)
    return len(source[source != slot].unique())


def _notes(outcome: Outcome) -> dict[tuple[int, int], dict[str, int]]:
    """What was told of each image, summed over the cuts, in one copy from the device."""
    told = [
        (key, what, times)
        for key, notes in outcome.notes.items()
        for note in notes
        for what, times in note.items()
    ]
    away = [times for _, _, times in told if isinstance(times, Tensor)]
    counts = iter(torch.stack([t.to(away[0].device, torch.long) for t in away]).tolist() if away else [])
    summed: dict[tuple[int, int], dict[str, int]] = {}
    for key, what, times in told:
        count = next(counts) if isinstance(times, Tensor) else times
        if count:
            own = summed.setdefault(key, {})
            own[what] = own.get(what, 0) + count
    return summed


def _allocated(used: int, allocated: int) -> str:
    """Of a static cache, which holds places for tokens to come."""
    return "" if used == allocated else f" ({allocated / 1e6:,.1f} MB allocated)"


def _shape(grid: tuple[int, int, int]) -> str:
    return "x".join(str(n) for n in grid if n > 1) or "1"
