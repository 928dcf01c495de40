"""Activations with spare columns beside them, where their projection on the adapters goes.

Whatever feeds a product writes into such a buffer from the start (`Projection.wide_input`); here is what
finds it again, and makes one where something else wrote the activation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_border(x: Tensor, border: int) -> Tensor | None:
    """The buffer of `x` [M, K] with `border` spare columns, where it has them."""
    m, k = x.shape
    start, width = x.storage_offset(), k + border
    room = x.untyped_storage().nbytes() // x.element_size() - start
    if x.stride() == (width, 1) and start == 0 and room >= m * width:
        return x.as_strided((m, width), (width, 1))
    return None


def widen(x: Tensor, border: int) -> Tensor:
    """`x` [M, K] with `border` spare columns: its own buffer where it has them, else a copy."""
    m, k = x.shape
    if (own := with_border(x, border)) is not None:
        return own
    wide = torch.empty((m, k + border), dtype=x.dtype, device=x.device)
    _copy_rows(x, wide[:, :k])
    return wide


def _copy_rows(x: Tensor, out: Tensor) -> None:
    """PyTorch copies strided rows an element at a time: of 16 bytes it does so at the memory's speed."""
    each = 16 // x.element_size()
    fits = x.shape[1] % each == 0 and all(
        t.stride(0) % each == 0 and t.stride(1) == 1 and t.storage_offset() % each == 0 for t in (x, out)
    )
    if fits:
        x, out = x.view(torch.complex128), out.view(torch.complex128)
    out.copy_(x)
