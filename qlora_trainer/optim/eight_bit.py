"""Adam's moments in 8 bits: blockwise dynamic quantization (Dettmers et al. 2021, arXiv:2110.02861).

Every block of 256 elements keeps its largest magnitude (`absmax`, float32) and 256 codes of
bitsandbytes' dynamic map: 1.016 bytes for each moment and element instead of 4. The update itself
runs in float32: in one kernel on a GPU (`kernels/adamw_8bit.py`), on a CPU composed of PyTorch's update
between bitsandbytes' decoding and encoding, which is also the kernel's specification. bitsandbytes' own
8-bit optimizer takes the step number and the clipping factor from the host; a step here never waits.
"""

from __future__ import annotations

from collections.abc import Mapping

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from qlora_trainer.optim.update import Update, adamw_

BLOCK = 256  # elements
MOMENTS = ("exp_avg", "exp_avg_sq")


class EightBitUpdate:
    """AdamW on pages whose moments are uint8 [n] with a float32 [n/256] field `<moment>_absmax`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # The second moment is never negative: its map has no sign and twice the resolution.
        self.codes = {name: bnb.create_dynamic_map(signed=name == "exp_avg").to(device) for name in MOMENTS}
        if device.type == "cuda":
            from qlora_trainer.kernels import adamw_8bit  # imports Triton

            self._kernel = adamw_8bit.adamw_8bit_
            self._tables = {name: (code, adamw_8bit.borders(code)) for name, code in self.codes.items()}

    def __call__(self, page: Mapping[str, Tensor], gradient: Tensor, update: Update) -> None:
        """Master and moments of one page, in place; no bit changes where the step is skipped."""
        if self.device.type == "cuda":
            scalars = (update.divisor, update.skip, update.bias)
            self._kernel(
                page,
                gradient,
                self._tables,
                scalars,
                update.lr,
                update.betas,
                update.eps,
                update.weight_decay,
            )
        else:
            self.composed(page, gradient, update)

    def composed(self, page: Mapping[str, Tensor], gradient: Tensor, update: Update) -> None:
        """The same, one operation after the other."""
        exp_avg, exp_avg_sq = (
            torch.ops.bitsandbytes.dequantize_blockwise(
                page[name], page[f"{name}_absmax"], self.codes[name], BLOCK, torch.float32
            )
            for name in MOMENTS
        )
        adamw_(page["master"], gradient, exp_avg, exp_avg_sq, update)
        # Decoding and encoding again is not the identity (the signed map has no -1), so a skipped step
        # must keep the old codes themselves.
        keep = update.skip.bool()
        for name, values in zip(MOMENTS, (exp_avg, exp_avg_sq), strict=True):
            new, absmax = torch.ops.bitsandbytes.quantize_blockwise(values, self.codes[name], BLOCK)
            for field, value in ((page[name], new), (page[f"{name}_absmax"], absmax)):
                torch.where(keep, field, value, out=field)
