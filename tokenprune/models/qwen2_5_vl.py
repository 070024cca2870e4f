"""Qwen2.5-VL: Qwen2-VL with windows in its vision tower, and videos timed in seconds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenprune.errors import UnsupportedModelError
from tokenprune.models.base import VisionCall
from tokenprune.models.qwen2_vl import Qwen2VL
from tokenprune.tokens import IntArray, VisionAttention


class Qwen25VL(Qwen2VL):
    """Inside its vision tower tokens stand window by window."""

    name = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    examples = ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct")

    def vision_layer(self, tower: Any) -> int:
        """The last one that attends to whole frames (the last of all in released models).

        Within windows a patch is compared with its neighbours only, and each window hands out equal amounts.
        """
        if not tower.fullatt_block_indexes:
            raise UnsupportedModelError(
                f"the vision attention of this {self.name} model is not available: all its layers attend within windows"
            )
        return int(max(tower.fullatt_block_indexes))

    def attend(self, tower: Any, attention: Any, call: VisionCall) -> list[list[VisionAttention]]:
        assert call.sizes is not None
        merge = tower.spatial_merge_size
        side = tower.window_size // merge // tower.patch_size
        places = torch.from_numpy(places_by_window(call.sizes // [1, merge, merge], side))
        places = places.to(call.outputs[0].device, non_blocking=True)

        def restored(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, merge**2)).index_select(0, places.to(x.device)).flatten(0, 1)

        rope = tuple(restored(x) for x in call.attention["position_embeddings"])
        outputs = [restored(x) for x in call.outputs]
        restored_call = replace(call, outputs=outputs, attention={"position_embeddings": rope})
        return super().attend(tower, attention, restored_call)


def places_by_window(sizes: IntArray, side: int) -> IntArray:
    """Where each token of images of (t, h, w) tokens stands when they are sorted by windows of side x side."""
    orders, start = [], 0
    for size in sizes.tolist():
        frame, row, column = np.indices(size).reshape(3, -1)
        orders.append(
            start + np.lexsort((column // side, row // side, frame))
        )  # stable: in order within a window
        start += len(frame)
    return np.concatenate(orders).argsort()
