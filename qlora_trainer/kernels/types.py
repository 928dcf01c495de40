"""What the operations take beside tensors: 4-bit weights, adapters and dropout, head norms, e4m3 rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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
class Dropout:
    """LoRA dropout on the input of a group of projections: a mask of its own for each adapter.

    rate: probability that an element is dropped, met to 1e-5; one that is kept counts `scale` times.
    seed: int64 [] on the device, the micro-batch's. first: number of the group's first adapter, which
    no other group's adapters have; the second's is first + 1, …. ranks: the adapters' ranks, whose
    columns stand side by side. row0: row of the micro-batch that an activation's first row is.
    Masks are never stored: `reference.kept` makes any part of one again from these numbers.
    """

    rate: float
    seed: Tensor
    first: int
    ranks: tuple[int, ...]
    row0: int = 0

    @property
    def threshold(self) -> int:
        """An element is kept if its 16 random bits, as the upper half of an int32, are no less."""
        return (round(self.rate * (1 << 16)) - (1 << 15)) << 16

    @property
    def scale(self) -> float:
        return 1.0 / (1.0 - self.rate)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first rank column, the one after its last) of each adapter."""
        ends = [sum(self.ranks[: i + 1]) for i in range(len(self.ranks))]
        return list(zip([0, *ends], ends, strict=False))


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


@dataclass(frozen=True)
class Fp8Rows:
    """An activation in e4m3 with a scale a row: what it stands for is scales ∘ values.

    values: [M, K + R]. Who makes the activation writes its K columns and the scales; R columns are left
    for its projection on the adapters, written later at the same scales (`pack_fp8`).
    """

    values: Tensor  # float8_e4m3fn [M, K + R]
    scales: Tensor  # float32 [M, 1]

    @classmethod
    def empty(cls, m: int, columns: int, device: torch.device) -> Fp8Rows:
        """Nothing written yet."""
        return cls(
            torch.empty((m, columns), dtype=torch.float8_e4m3fn, device=device),
            torch.empty((m, 1), dtype=torch.float32, device=device),
        )

    def __getitem__(self, rows: slice) -> Fp8Rows:
        return Fp8Rows(self.values[rows], self.scales[rows])
