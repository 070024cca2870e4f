"""The report that README and quickstart show, of a model of LLaVA-1.5-7B's size.

``python -m tokenprune_eval.publish.sample``

Weights are random and all layers share one layer's, so that it takes 2 GB and half a minute on a CPU: tokens, bytes
and FLOPs are those of the real one; times are not, and are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tokenprune

IMAGE, VOCAB = 32000, 32064
TEXT = 18  # "USER: <image>\nWhat is on the table? ASSISTANT:" in LLaVA's tokens, without the picture's


def build() -> LlavaForConditionalGeneration:
    """LLaVA-1.5-7B's config; its 32 layers, and the tower's 24, have one layer's random weights each."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            vocab_size=VOCAB,
        ),
        image_token_id=IMAGE,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).to(torch.float16)
    torch.manual_seed(0)
    shared: dict[str, torch.nn.Parameter] = {}
    for name, parameter in list(model.named_parameters()):
        owner, _, last = name.rpartition(".")
        # One layer's name for all of them.
        key = ".".join("0" if part.isdigit() else part for part in name.split("."))
        if key not in shared:
            drawn = torch.randn(parameter.shape, dtype=torch.float16) * 0.02
            shared[key] = torch.nn.Parameter(drawn, requires_grad=False)
        setattr(model.get_submodule(owner), last, shared[key])
    for name, _ in list(model.named_buffers()):
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = None
    fresh = (
        LlavaForConditionalGeneration._from_config
    )  # rotary frequencies and position ids are computed, not drawn
    small = fresh(_few_layers(config))
    for name, buffer in small.named_buffers():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = buffer
    return model.eval()


def _few_layers(config: LlavaConfig) -> LlavaConfig:
    few = LlavaConfig.from_dict(config.to_dict())
    few.text_config.num_hidden_layers = few.vision_config.num_hidden_layers = 1
    few.text_config.vocab_size, few.text_config.intermediate_size = 8, 8
    few.image_token_id = 0
    return few


def main(argv: Sequence[str] | None = None) -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description="The report of a model of LLaVA-1.5-7B's size.")
    parser.add_argument("--method", default="vflowopt")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--compact-early", action="store_true", help="and the layers before the cut")
    options = parser.parse_args(argv)
    model = build()
    ids = torch.tensor([[*range(1, 6), *[IMAGE] * 576, *range(6, TEXT + 1)]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 336, 336, dtype=torch.float16)}
    given = {"keep": options.keep, "compact_early": options.compact_early}
    with tokenprune.pruned(model, options.method, **given), torch.inference_mode():
        model(**inputs, use_cache=True, logits_to_keep=1)
        report = tokenprune.report(model)
    print("\n".join(line for line in str(report).splitlines() if "scoring" not in line))


if __name__ == "__main__":
    main()
