"""Where a frozen weight's codes come from, and where they stand while a product reads them.

`WeightStore` is the one source of 4-bit codes: `Resident` has them on the device for good,
`offload.StreamedWeights` brings them from the host. `Workspace` holds the dequantized weights in use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from qlora_trainer.kernels import QuantizedWeight


class WeightStore(Protocol):
    """Gives a layer's weights with their codes on the device."""

    def codes(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The same weight, its `packed` on the device until those of two other layers were asked for."""
        ...


class Resident:
    """Codes that stay on the device."""

    def codes(self, weight: QuantizedWeight) -> QuantizedWeight:
        return weight


@dataclass
class Workspace:
    """Buffers that hold the extended weight in use, one a role, each as large as its largest tenant.

    `generation` counts passes over the model: adapters may have changed between two of them.
    `adapters` counts those of all groups made so far: an adapter's number is its masks' for good.
    """

    device: torch.device
    dtype: torch.dtype
    store: WeightStore = field(default_factory=Resident)
    generation: int = 0
    adapters: int = 0
    _buffers: dict[str, Tensor] = field(default_factory=dict)
    _tenants: dict[str, tuple[int, int]] = field(default_factory=dict)
    _sizes: dict[str, int] = field(default_factory=dict)

    def empty(self, *shape: int) -> Tensor:
        """Nothing written yet, in the compute dtype."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def reserve(self, role: str, numel: int) -> None:
        """Announces a tenant of `numel` elements; buffers are made on first use."""
        self._sizes[role] = max(self._sizes.get(role, 0), numel)

    def claim(self, role: str, tenant: int, rows: int, columns: int) -> tuple[Tensor, bool]:
        """The buffer as [rows, columns], and whether it already holds this tenant's weight."""
        if role not in self._buffers:
            self._buffers[role] = self.empty(self._sizes[role])
        holds = self._tenants.get(role) == (tenant, self.generation)
        self._tenants[role] = (tenant, self.generation)
        return self._buffers[role][: rows * columns].view(rows, columns), holds

    @property
    def nbytes(self) -> int:
        return sum(self._sizes.values()) * self.dtype.itemsize
