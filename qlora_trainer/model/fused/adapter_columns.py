"""Activations with spare columns beside them, where their projection on the adapters goes.

A product reads [x | x·Aᵀ] as one matrix, so whatever makes x writes it into the first columns of such a
buffer. The type travels through a layer, and from a layer's backward pass to that of the layer below
(`call.Call`); a plain tensor of somebody else's is copied into one (`Widened.of`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_trainer.kernels import Fp8Rows


@dataclass(frozen=True)
class Widened:
    """`buffer` [M, width + border]; the activation is its first `width` columns.

    e4m3: the same rows in e4m3, where the product that reads them runs in it.
    """

    buffer: Tensor
    width: int
    e4m3: Fp8Rows | None = None

    @classmethod
    def empty(cls, rows: int, width: int, border: int, like: Tensor) -> Widened:
        """Nothing written yet; dtype and device are those of `like`."""
        return cls(torch.empty((rows, width + border), dtype=like.dtype, device=like.device), width)

    @classmethod
    def of(cls, x: Tensor, border: int) -> Widened:
        """A copy of `x` [M, K] with `border` spare columns; `x` itself where none are wanted."""
        if not border and x.is_contiguous():
            return cls(x, x.shape[1])
        wide = cls.empty(x.shape[0], x.shape[1], border, x)
        _copy_rows(x, wide.values)
        return wide

    @property
    def values(self) -> Tensor:
        """The activation [M, width]."""
        return self.buffer[:, : self.width]

    @property
    def columns(self) -> Tensor:
        """The spare columns [M, border]."""
        return self.buffer[:, self.width :]

    @property
    def border(self) -> int:
        return self.buffer.shape[1] - self.width

    def __getitem__(self, rows: slice) -> Widened:
        return Widened(self.buffer[rows], self.width, None if self.e4m3 is None else self.e4m3[rows])

    def with_border(self, border: int) -> Widened:
        """The same activation beside `border` columns: this one, or a copy."""
        return self if self.border == border else Widened.of(self.values, border)

    def with_e4m3(self, rows: Fp8Rows | None) -> Widened:
        return replace(self, e4m3=rows)


def _copy_rows(x: Tensor, out: Tensor) -> None:
    """PyTorch copies strided rows an element at a time: of 16 bytes it does so at the memory's speed."""
    each = 16 // x.element_size()
    fits = x.shape[1] % each == 0 and all(
        t.stride(0) % each == 0 and t.stride(1) == 1 and t.storage_offset() % each == 0 for t in (x, out)
    )
    if fits:
        x, out = x.view(torch.complex128), out.view(torch.complex128)
    out.copy_(x)
