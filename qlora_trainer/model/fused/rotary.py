"""Position ids -> sines and cosines, by the model's own module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Rotary:
    """position ids [B, T] -> layer type -> float32 (cos, sin) [B*T, half], by the model's own module."""

    def __init__(self, module: Any, layer_types: Sequence[str | None]) -> None:
        self.module, self.layer_types = module, list(dict.fromkeys(layer_types))
        self.by_type = hasattr(module, "layer_types")
        kinds = module.rope_type.values() if isinstance(module.rope_type, dict) else (module.rope_type,)
        # these look at the positions' values on the host, which no captured graph can
        self.asks_the_host = any(kind in ("dynamic", "longrope") for kind in kinds)

    def __call__(self, position_ids: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        like = torch.empty(
            0, dtype=torch.float32, device=position_ids.device
        )  # the table's dtype, not its values
        tables: dict[str | None, tuple[Tensor, Tensor]] = {}
        shared: tuple[Tensor, Tensor] | None = None
        for layer_type in self.layer_types:
            if self.by_type:
                tables[layer_type] = self._half(*self.module(like, position_ids, layer_type))
            else:
                if shared is None:
                    shared = self._half(*self.module(like, position_ids))
                tables[layer_type] = shared
        return tables

    @staticmethod
    def _half(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves of the module's tables are equal."""
        half = cos.shape[-1] // 2
        return cos[..., :half].flatten(0, 1).contiguous(), sin[..., :half].flatten(0, 1).contiguous()
