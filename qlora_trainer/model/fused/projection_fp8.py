"""A group's products in e4m3, one scale a row of each operand (opt-in; Hopper and Ada).

Both orientations of the frozen weight are quantized once and stay resident (2 bytes a weight, as
much as a bfloat16 copy). The adapters ride in the same product as in `projection.py`, in e4m3 too;
their own gradients are made from the bfloat16 activations. A value of the border saturates where it
leaves e4m3's range at its row's scale. Beside weights of the usual spread (0.02) the factors below
leave room for |s·B| from 6e-6 to 0.15 and |A| to 0.08; x·Aᵀ is about as large as x.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qlora_trainer.kernels import Dropout, Fp8Rows

from .adapter_columns import Widened
from .projection import ProductSize, Projection

_FORWARD = 0.5  # s·B is multiplied, u divided
_BACKWARD = 1.0  # A is multiplied, v divided


class Fp8Projection(Projection):
    """As `Projection`; bfloat16 until `make_resident`."""

    _weight: Tensor | None = None  # e4m3 [N, K+pad]
    _weight_back: Tensor | None = None  # e4m3 [K, N+pad]

    def make_resident(self) -> None:
        """Quantizes the base in both orientations, a scale for each output and each input column."""
        device, dtype = self.workspace.device, self.workspace.dtype
        self.size = replace(self.size, e4m3=True)
        base = torch.empty((self.n, self.k), dtype=dtype, device=device)
        self._write_base(base)
        self._weight, self._scale = self._quantized(base)
        self._weight_back, self._scale_back = self._quantized(base.T.contiguous())
        self._a = torch.zeros((self.pad, self.k), dtype=dtype, device=device)
        self._b = torch.zeros((self.n, self.pad), dtype=dtype, device=device)

    def _quantized(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        rows = Fp8Rows.empty(weight.shape[0], weight.shape[1] + self.pad, weight.device)
        self.operations.quantize_fp8(weight, rows)
        return rows.values, rows.scales

    def _refresh(self) -> None:
        """This pass's adapters: in bfloat16, and at the weights' scales."""
        if self._packed_in == self.workspace.generation or not self.rank:
            return
        assert self._weight is not None and self._weight_back is not None
        self._pack(self._a, self._b)
        self.operations.pack_fp8(self._b, self._scale, _FORWARD, self._weight[:, self.k :])
        self.operations.pack_fp8(self._a.T, self._scale_back, _BACKWARD, self._weight_back[:, self.n :])
        self._packed_in = self.workspace.generation

    def e4m3_input(self, m: int) -> Fp8Rows | None:
        return None if self._weight is None else Fp8Rows.empty(m, self.k + self.pad, self._weight.device)

    def e4m3_output(self, m: int) -> Fp8Rows | None:
        return None if self._weight is None else Fp8Rows.empty(m, self.n + self.pad, self._weight.device)

    def project(self, x: Widened, dropout: Dropout | None = None) -> Tensor:
        if self._weight is None:
            return super().project(x, dropout)
        self._refresh()
        if dropout is None:
            return x.values @ self._a.T
        u = self.workspace.empty(len(x.values), self.pad)
        self.operations.project_dropped(x.values, self._a, dropout, u)
        return u

    def project_back(self, dy: Widened) -> Tensor:
        if self._weight is None:
            return super().project_back(dy)
        self._refresh()
        return dy.values @ self._b

    def _product(
        self, x: Widened, u: Tensor, factor: float, weight: Tensor, scale: Tensor, out: Tensor | None
    ) -> Tensor:
        rows = self._rows(x.values) if x.e4m3 is None else x.e4m3
        if self.rank:
            self.operations.pack_fp8(u, rows.scales, factor, rows.values[:, x.width :])
        if out is None:
            out = self.workspace.empty(len(x.values), weight.shape[0])
        self.operations.fp8_product(rows.values, rows.scales, weight, scale, out)
        return out

    def _rows(self, x: Tensor) -> Fp8Rows:
        """An activation whose maker wrote no e4m3."""
        rows = Fp8Rows.empty(x.shape[0], x.shape[1] + self.pad, x.device)
        self.operations.quantize_fp8(x, rows)
        return rows

    def forward(self, x: Widened, u: Tensor | None, out: Tensor | None = None) -> Tensor:
        if self._weight is None:
            return super().forward(x, u, out)
        self._refresh()
        border = self.workspace.empty(len(x.values), self.pad).zero_() if u is None else u
        return self._product(x, border, 1.0 / _FORWARD, self._weight, self._scale, out)

    def backward(
        self, dy: Widened, v: Tensor, out: Tensor | None = None, dropout: Dropout | None = None
    ) -> Tensor:
        if self._weight is None or self._weight_back is None:
            return super().backward(dy, v, out, dropout)
        self._refresh()
        border = v if dropout is None else torch.zeros_like(v)  # A stays beside the weight, unused
        dx = self._product(dy, border, 1.0 / _BACKWARD, self._weight_back, self._scale_back, out)
        if dropout is not None:
            self.operations.add_dropped_(dx, v, self._a, dropout)
        return dx


def e4m3_bytes(size: ProductSize, dtype_bytes: int) -> int:
    """Bytes that `make_resident` keeps: both orientations with a border and a scale a row, and the adapters
    packed in the compute dtype."""
    copies = size.n * (size.k + size.pad) + size.k * (size.n + size.pad)
    return copies + 4 * (size.n + size.k) + dtype_bytes * size.pad * (size.n + size.k)
