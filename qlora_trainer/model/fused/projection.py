"""A group of frozen projections of one activation, and the adapters on them, as one product.

Comes in: members (q, k, v · gate, up · …) with frozen weights [n_i, K] and LoRA pairs. Goes out: y,
the gradient of x, and the adapters' gradients. The adapters are folded into the product by
extending its inner dimension (R: all members' ranks, padded):

    forward    y  = [x | x·Aᵀ] · [W | s·B]ᵀ
    backward   dx = [dy | dy·s·B] · [W ; A]          no gradient of W is ever formed

so every activation that enters a product lives in a buffer with R spare columns ("wide"), and the
extended weight is one [N+R, K+R] matrix holding W, A below it and s·B beside it. It is written
from the 4-bit codes into a workspace shared by all layers, or stays resident when memory is
plentiful: the same numbers either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qlora_trainer.kernels import Adapter, Operations, QuantizedWeight

# The inner dimension of a matrix-unit tile: a narrower border would cost the same time.
_ALIGN = {"cuda": 64, "cpu": 1}


@dataclass
class Member:
    """One projection of a group: `weight` [n, K] frozen, LoRA pair or None."""

    name: str
    weight: QuantizedWeight | Tensor
    lora_A: nn.Parameter | None = None  # [r, K]
    lora_B: nn.Parameter | None = None  # [n, r]
    scaling: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.weight.shape
        return n, k


class Gradients:
    """Where adapter gradients of one backward pass go: `main_grad` if a parameter has it, else returned."""

    def __init__(self) -> None:
        self.returned: dict[nn.Parameter, Tensor] = {}

    def add(self, parameter: nn.Parameter, value: Tensor, alpha: float = 1.0) -> None:
        """Adds alpha·value (float32, any strides)."""
        if not parameter.requires_grad:
            return
        main = getattr(parameter, "main_grad", None)
        if main is not None:
            main.add_(value, alpha=alpha)
        elif parameter in self.returned:
            self.returned[parameter].add_(value, alpha=alpha)
        else:
            self.returned[parameter] = value * alpha

    def collect(self, parameters: Sequence[nn.Parameter]) -> tuple[Tensor | None, ...]:
        """Gradients for autograd, in the parameters' dtype; None where `main_grad` took them."""
        found = (self.returned.get(p) for p in parameters)
        return tuple(None if g is None else g.to(p.dtype) for g, p in zip(found, parameters, strict=True))


@dataclass
class Workspace:
    """Buffers that hold the extended weight in use, one a role, each as large as its largest tenant.

    `generation` counts passes over the model: adapters may have changed between two of them.
    """

    device: torch.device
    dtype: torch.dtype
    generation: int = 0
    _buffers: dict[str, Tensor] = field(default_factory=dict)
    _tenants: dict[str, tuple[int, int]] = field(default_factory=dict)
    _sizes: dict[str, int] = field(default_factory=dict)

    def reserve(self, role: str, numel: int) -> None:
        """Announces a tenant of `numel` elements; buffers are made on first use."""
        self._sizes[role] = max(self._sizes.get(role, 0), numel)

    def claim(self, role: str, tenant: int, rows: int, columns: int) -> tuple[Tensor, bool]:
        """The buffer as [rows, columns], and whether it already holds this tenant's weight."""
        if role not in self._buffers:
            self._buffers[role] = torch.empty(self._sizes[role], dtype=self.dtype, device=self.device)
        holds = self._tenants.get(role) == (tenant, self.generation)
        self._tenants[role] = (tenant, self.generation)
        return self._buffers[role][: rows * columns].view(rows, columns), holds

    @property
    def nbytes(self) -> int:
        return sum(self._sizes.values()) * self.dtype.itemsize


class Projection:
    """The products of one group. Shapes: x [M, K], y [M, N], wide x [M, K+R], wide dy [M, N+R]."""

    def __init__(
        self, name: str, members: Sequence[Member], operations: Operations, workspace: Workspace, role: str
    ) -> None:
        self.name, self.members, self.operations, self.workspace, self.role = (
            name, list(members), operations, workspace, role,
        )  # fmt: skip
        self.k = members[0].shape[1]
        self.n = sum(m.shape[0] for m in members)
        self._adapters: list[tuple[Member, int, int]] = []  # member, first output row, first rank column
        row = rank = 0
        for member in members:
            if member.lora_A is not None:
                self._adapters.append((member, row, rank))
                rank += member.lora_A.shape[0]
            row += member.shape[0]
        align = _ALIGN.get(workspace.device.type, 1)
        self.rank = rank
        self.border = -(-rank // align) * align
        self._resident: Tensor | None = None
        self._packed_in = -1
        workspace.reserve(role, (self.n + self.border) * (self.k + self.border))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The adapters' parameters, A before B, in the members' order."""
        return [p for m, _, _ in self._adapters for p in (m.lora_A, m.lora_B) if p is not None]

    @property
    def resident_nbytes(self) -> int:
        """Bytes that a resident copy takes."""
        return (self.n + self.border) * (self.k + self.border) * self.workspace.dtype.itemsize

    def make_resident(self) -> None:
        """Keeps the dequantized weight for good."""
        shape = (self.n + self.border, self.k + self.border)
        self._resident = torch.empty(shape, dtype=self.workspace.dtype, device=self.workspace.device)
        self._write_base(self._resident)

    def _write_base(self, extended: Tensor) -> None:
        row = 0
        for member in self.members:
            out = extended[row : row + member.shape[0], : self.k]
            if isinstance(member.weight, QuantizedWeight):
                self.operations.dequantize(member.weight, out)
            else:
                out.copy_(member.weight)
            row += member.shape[0]

    def _pack(self, extended: Tensor) -> None:
        if self._adapters:
            packed = [
                Adapter(m.lora_A.detach(), m.lora_B.detach(), m.scaling, row, rank)
                for m, row, rank in self._adapters
                if m.lora_A is not None and m.lora_B is not None
            ]
            self.operations.pack_adapters(packed, extended, self.n, self.k)

    def extended(self) -> Tensor:
        """[N+R, K+R] with this pass's adapters in its border."""
        if self._resident is not None:
            if self._packed_in != self.workspace.generation:
                self._pack(self._resident)
                self._packed_in = self.workspace.generation
            return self._resident
        rows, columns = self.n + self.border, self.k + self.border
        buffer, holds = self.workspace.claim(self.role, id(self), rows, columns)
        if not holds:
            self._write_base(buffer)
            self._pack(buffer)
        return buffer

    def wide_input(self, m: int) -> Tensor:
        """An empty [m, K+R]: what feeds `forward` writes its first K columns."""
        return torch.empty(
            (m, self.k + self.border), dtype=self.workspace.dtype, device=self.workspace.device
        )

    def wide_output(self, m: int) -> Tensor:
        """An empty [m, N+R]: what feeds `backward` writes its first N columns."""
        return torch.empty(
            (m, self.n + self.border), dtype=self.workspace.dtype, device=self.workspace.device
        )

    def project(self, wide: Tensor) -> Tensor:
        """Fill the border of `wide` [M, K+R] with x·Aᵀ; return it compactly, [M, rank], for the backward."""
        if self.border:
            a = self.extended()[self.n :, : self.k]
            torch.mm(wide[:, : self.k], a.T, out=wide[:, self.k :])
        return wide[:, self.k : self.k + self.rank].contiguous()

    def forward(self, wide: Tensor, out: Tensor | None = None) -> Tensor:
        """y [M, N] of a wide input whose border `project` has filled."""
        weight = self.extended()[: self.n].T
        return torch.mm(wide, weight) if out is None else torch.mm(wide, weight, out=out)

    def backward(self, wide: Tensor, out: Tensor | None = None, needs_input: bool = True) -> Tensor | None:
        """dx [M, K] of a wide dy, whose border becomes dy·s·B on the way; None if nobody needs dx."""
        if self.border:
            extended = self.extended()
            torch.mm(wide[:, : self.n], extended[: self.n, self.k :], out=wide[:, self.n :])
        if not needs_input:
            return None
        weight = self.extended()[:, : self.k]
        return torch.mm(wide, weight) if out is None else torch.mm(wide, weight, out=out)

    def adapter_gradients(
        self, x: Tensor, u: Tensor, wide: Tensor, gradients: Gradients,
        row_scale: Tensor | None = None, column_scale: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Adds dA = (dy·s·B)ᵀ·x and dB = s·dyᵀ·u, with u [M, rank] from `project`, dy wide from `backward`.

        The input of the product may be given unscaled: it is row_scale ∘ x ∘ column_scale.
        """
        if not self._adapters:
            return
        thin = self.operations.thin_gradient
        d_a = thin(wide[:, self.n : self.n + self.rank], x, row_scale)
        if column_scale is not None:
            d_a *= column_scale
        d_b = thin(u, wide[:, : self.n], None)
        for member, row, rank in self._adapters:
            assert member.lora_A is not None and member.lora_B is not None
            ranks = slice(rank, rank + member.lora_A.shape[0])
            gradients.add(member.lora_A, d_a[ranks])
            gradients.add(member.lora_B, d_b[ranks, row : row + member.shape[0]].T, member.scaling)
