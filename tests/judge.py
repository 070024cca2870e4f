"""Compare a wrapped model with the masked oracle, using nothing of the runtime but its report."""

from __future__ import annotations

from typing import Any

import torch

import oracle
import tiny
import tokenprune

TOLERANCE = 1e-4  # contract 7, fp32
ROWS = (
    ["text:5", "image", "text:3", "image", "text:4"],
    ["text:7"],
    ["text:2", "image", "image", "text:9"],
    ["image", "text:3"],
)


def tolerance(model: Any) -> float:
    """Of hybrids it is wider: where tokens stand in its chunks of 64 already moves the delta rule (test_hybrids.py)."""
    return 5 * TOLERANCE if any(hasattr(module, "linear_attn") for module in model.modules()) else TOLERANCE


def offered(model: Any, cut: dict[str, Any]) -> dict[str, Any]:
    """A cut by what the model's decoder has: latent attention's queries and keys cannot be scored."""
    latent = model.config.model_type == "kimi_k25" and cut["method"] == "entropyprune"
    return {**cut, "source": "hidden"} if latent else cut


def holds_keys(layer: Any) -> bool:
    """Whether a layer of a cache holds entries, and no recurrent state instead."""
    return getattr(layer, "keys", None) is not None


def cuts_of(report: tokenprune.Report) -> list[tuple[int, Any]]:
    return list(zip(report.layers_cut, report.keep_lists, strict=True))


def merges_of(report: tokenprune.Report, positions: oracle.Positions) -> Any:
    return [
        [[cut.get((r, i)) for i in range(len(row))] for r, row in enumerate(positions)]
        for cut in report.merges
    ]


def biases_of(report: tokenprune.Report, positions: oracle.Positions) -> Any:
    return [
        [[cut.get((r, i)) for i in range(len(row))] for r, row in enumerate(positions)]
        for cut in report.biases
    ]


def prefill_difference(model: Any, inputs: dict[str, Any], **arguments: Any) -> float:
    """Largest difference at kept positions between a pruned prefill and the oracle (NaN counts as infinite)."""
    with tokenprune.pruned(model, **arguments), torch.no_grad():
        logits = model(**inputs).logits
        report = tokenprune.report(model)
    positions = tiny.visual_positions(model, inputs)
    wanted = oracle.masked_forward(
        model,
        inputs,
        cuts_of(report),
        positions,
        merges_of(report, positions),
        biases=biases_of(report, positions),
    ).logits
    assert report.index is not None
    return difference_at(report.index, logits, wanted, inputs.get("attention_mask"))


def difference_at(
    index: torch.Tensor, logits: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor | None
) -> float:
    """index (B, L') names the column of each of logits' positions; padding and filler do not count."""
    columns = index.clamp(min=0)
    real = index >= 0
    if mask is not None:
        real &= mask.gather(1, columns).bool()
    wanted = wanted.gather(1, columns[..., None].expand(-1, -1, wanted.shape[-1]))
    return float((logits - wanted).abs().amax(-1)[real].nan_to_num(float("inf")).max())


def generate_difference(
    model: Any, inputs: dict[str, Any], options: dict[str, Any], times: int = 1, **arguments: Any
) -> tuple[float, torch.Tensor, tokenprune.Report]:
    """Largest difference of the logits generate() chose from, against the oracle teacher-forced on its output.

    Args:
        model, inputs: unwrapped model and what it is called with.
        options: of generate().
        times: hypotheses per row (beams or returned sequences).
        arguments: of wrap().
    """
    with tokenprune.pruned(model, **arguments):
        out = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)
        report = tokenprune.report(model)
    assert report.pruned
    positions = tiny.visual_positions(model, inputs)
    prompt = inputs["input_ids"].shape[1]
    if times > 1:
        inputs = oracle.expand(inputs, times, positions)
        positions = oracle.expand_rows(positions, times)
    judged = oracle.masked_forward(
        model,
        inputs,
        cuts_of(report),
        positions,
        merges_of(report, positions),
        generated=out.sequences[:, prompt:],
        biases=biases_of(report, positions),
        positions="generate",
        early=[[prompt] * len(row) for row in positions] if arguments.get("compact_early") else None,
    ).steps()
    if getattr(out, "beam_indices", None) is not None:
        return judged_beams(out, judged), out.sequences, report
    logits = torch.stack(out.logits, dim=1)
    return float((logits - judged[:, : logits.shape[1]]).abs().max()), out.sequences, report


def judged_beams(out: Any, judged: torch.Tensor) -> float:
    """Follow each returned hypothesis through the beams it lived in."""
    worst = 0.0
    for row, path in enumerate(out.beam_indices.tolist()):
        for step, beam in enumerate(path):
            if beam >= 0:
                worst = max(worst, float((out.logits[step][beam] - judged[row, step]).abs().max()))
    return worst
