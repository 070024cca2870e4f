"""Asking the method: what an image keeps at a cut, and before layer 0 how much."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tokenprune.config import Beside
from tokenprune.errors import TokenPruneError
from tokenprune.printed import is_print
from tokenprune.runtime.call import Call
from tokenprune.runtime.layer_states import LayerStates
from tokenprune.runtime.selections import check_selection
from tokenprune.runtime.sight import Shown
from tokenprune.tensors import as_written
from tokenprune.tokens import Selection


def choose(call: Call, cut: int, *, hidden: Tensor | None = None, caught: LayerStates | None = None) -> None:
    """Fill in the cut's selections where they are missing.

    Args:
        call: under way.
        cut: its number.
        hidden: (B, L', D) states entering the cut's layer.
        caught: states of the layer before it.
    """
    stages, method = call.stages, call.config.method.at(cut)
    assert stages is not None and call.sight is not None
    if call.config.arguments.keep_lists is not None:
        stages.force(cut)
        return
    wanted = stages.missing(cut)
    if not wanted:
        return
    sight = call.sight
    source = hidden if hidden is not None else next(iter(caught.raw.values()))  # type: ignore[union-attr]
    with as_written(source.device), call.scoring.running(source.device):
        counts = {key: stages.plan.to_choose(cut, key) for key in wanted}
        asked = [key for key, k in counts.items() if k]
        images = Shown(
            partial(sight.of, stages, hidden=hidden, caught=caught),
            asked,
            partial(sight.joined, stages, hidden=hidden, caught=caught),
        )
        chosen = method.select_all(images, [counts[key] for key in asked])
        if len(chosen) != len(asked):
            raise TokenPruneError(
                f"method {method.name!r} returned {len(chosen)} selections for {len(asked)} images"
            )
        found = dict(zip(asked, chosen, strict=True))
        for key, k in counts.items():
            selection = found.get(key, Selection(stages.raster[key][:0]))
            check_selection(method.name, selection, stages.shown(key), k, call.config.needs_at(cut).bias)
            stages.store(cut, key, selection)


def enter_prompt(call: Call, embeds: Tensor, num_layers: int) -> None:
    """Before layer 0: what methods may want of the embeddings, and what they say of the counts."""
    stages, sight, method = call.stages, call.sight, call.config.method.at(0)
    assert stages is not None and sight is not None
    if call.config.arguments.keep_lists is not None:
        return
    needs = call.config.needs
    if needs.features or needs.words:
        sight.embeds = embeds
    if call.config.arguments.settles_per_picture:
        with as_written(embeds.device), call.scoring.running(embeds.device):
            told = [_budget(call, key).to(embeds.device) for key in stages.images]
            found = torch.stack(told).tolist()  # the one copy more that such budgets cost
        stages.plan = stages.plan.with_shares(dict(zip(stages.images, found, strict=True)), num_layers)
        stages.notes = {key: [own] for key, own in stages.plan.notes.items()}
    if not needs.counts:
        return
    with as_written(embeds.device), call.scoring.running(embeds.device):
        told = []
        for key in stages.images:
            planned = tuple(cut[key] for cut in stages.plan.counts)
            own = method.count(sight.of(stages, key), planned)
            if not isinstance(own, Tensor) or own.shape != (len(planned),) or own.is_floating_point():
                raise TokenPruneError(
                    f"method {method.name!r} returned {own!r:.80} as counts where {len(planned)} whole numbers "
                    f"were asked for"
                )
            told.append(own.to(embeds.device, torch.long))
        counts = torch.stack(told).tolist()  # the one copy more that such methods cost
    stages.plan = stages.plan.with_counts(dict(zip(stages.images, counts, strict=True)))


def _budget(call: Call, key: tuple[int, int]) -> Tensor:
    """(2,) the share that an adaptive budget comes to (NaN where there is none), and how surely it is print."""
    arguments, stages, sight = call.config.arguments, call.stages, call.sight
    assert stages is not None and sight is not None
    looked = sight.looked(stages, key) if arguments.reads_pixels else None
    adaptive = arguments.adaptive_keep
    if adaptive is None:
        share = torch.tensor(float("nan"))
    elif adaptive.reads_pixels:
        assert looked is not None
        share = adaptive.share(Beside.grey(looked))
    else:
        share = adaptive.share(sight.features(stages, key))
    sure = is_print(Beside.looked(looked)) if looked is not None else torch.zeros(())
    return torch.stack([share.float(), sure.float().to(share.device)])
