"""What the operations take beside tensors: a 4-bit weight, an adapter in its group, a head norm."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class NestedScales:
    """Second level of double quantization: absmax = code[level1] * absmax[block // blocksize] + offset."""

    code: Tensor  # float32 [256]
    absmax: Tensor  # float32 [blocks / blocksize]
    offset: Tensor  # float32 []
    blocksize: int


@dataclass(frozen=True)
class QuantizedWeight:
    """A frozen [N, K] weight in NF4 or FP4, in bitsandbytes' layout."""

    packed: Tensor  # uint8 [N*K/2, 1], high nibble first
    code: Tensor  # float32 [16]
    absmax: Tensor  # float32 [N*K/blocksize], or uint8 of the same shape when nested
    nested: NestedScales | None
    blocksize: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class Adapter:
    """LoRA matrices of one member of a group of projections (Hu et al. 2021).

    row0 and rank0: the member's first output row, and first rank column, within the group.
    """

    A: Tensor  # [r, K]
    B: Tensor  # [n, r]
    scaling: float
    row0: int
    rank0: int


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm over each head of q or k; the factor is weight + offset."""

    weight: Tensor  # [D]
    eps: float
    offset: float


@dataclass(frozen=True)
class Target:
    """Where a part of a thin product is added: out += alpha · part, float32.

    out is [r, c], rows row0… and columns column0… of the product; or its transpose [c, r].
    """

    out: Tensor
    row0: int
    column0: int
    alpha: float
    transposed: bool
