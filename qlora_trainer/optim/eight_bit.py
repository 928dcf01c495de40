"""Adam's moments in 8 bits: blockwise dynamic quantization (Dettmers et al. 2021, arXiv:2110.02861).

Every block of 256 elements keeps its largest magnitude (`absmax`, float32) and 256 codes of
bitsandbytes' dynamic map: 1.016 bytes for each moment and element instead of 4. The update itself
runs in float32; bitsandbytes' one-call 8-bit optimizer is not used because it takes the step number
and the clipping factor as host values, and a step must not wait for the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

BLOCK = 256  # elements


class EightBitMoments:
    """Between a page's 8-bit fields and the float32 moments of its update.

    The fields are `exp_avg` and `exp_avg_sq`, uint8 [n], and their `_absmax`, float32 [n/256].
    """

    def __init__(self, device: torch.device) -> None:
        # The second moment is never negative: its map has no sign and twice the resolution.
        self.codes = {
            name: bnb.create_dynamic_map(signed=signed).to(device)
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False))
        }

    def decode(self, page: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The two moments, float32 [n] each."""
        exp_avg, exp_avg_sq = (
            torch.ops.bitsandbytes.dequantize_blockwise(
                page[name], page[f"{name}_absmax"], code, BLOCK, torch.float32
            )
            for name, code in self.codes.items()
        )
        return exp_avg, exp_avg_sq

    def encode(
        self, page: Mapping[str, Tensor], exp_avg: Tensor, exp_avg_sq: Tensor, *, keep: Tensor
    ) -> None:
        """Write the moments into the page's fields, or leave them where `keep` (bool []) is set.

        Decoding and encoding again is not the identity (the signed map has no -1), so a skipped step
        must keep the old codes themselves.
        """
        for (name, code), values in zip(self.codes.items(), (exp_avg, exp_avg_sq), strict=True):
            new, new_absmax = torch.ops.bitsandbytes.quantize_blockwise(values, code, BLOCK)
            for field, value in ((page[name], new), (page[f"{name}_absmax"], new_absmax)):
                torch.where(keep, field, value, out=field)
