"""VipLLaVA: LLaVA-1.5 with the features of several vision layers."""

from __future__ import annotations

from tokenprune.models.llava import Llava


class VipLlava(Llava):
    """As LLaVA-1.5; the attention of the last one in its list of feature layers stands for the tower's."""

    name = "vipllava"
    model_types = ("vipllava",)
    examples = ("llava-hf/vip-llava-7b-hf",)
