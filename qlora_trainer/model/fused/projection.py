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

LoRA dropout hides parts of x from the adapters and not from W. Forward, only the border changes, to
scale·(mask ∘ x)·Aᵀ. Backward, no inner dimension can carry scale·mask ∘ (dy·s·B·A): the product leaves
the border out and that is added to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from qlora_trainer.kernels import Adapter, Dropout, Fp8Rows, Operations, QuantizedWeight, Target

# The inner dimension of a matrix-unit tile: a narrower border would cost the same time.
_ALIGN = {"cuda": 64, "cpu": 1}


@dataclass
class Member:
    """One projection of a group: `weight` [n, K] frozen, LoRA pair or None, PEFT's own dropout module."""

    name: str
    weight: QuantizedWeight | Tensor
    lora_A: nn.Parameter | None = None  # [r, K]
    lora_B: nn.Parameter | None = None  # [n, r]
    scaling: float = 1.0
    dropout: nn.Dropout | None = None

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.weight.shape
        return n, k


class Gradients:
    """Where adapter gradients of one backward pass go: `main_grad` if a parameter has it, else returned."""

    def __init__(self) -> None:
        self.returned: dict[nn.Parameter, Tensor] = {}

    def of(self, parameter: nn.Parameter) -> Tensor:
        """The float32 tensor to add to."""
        main: Tensor | None = getattr(parameter, "main_grad", None)
        if main is not None:
            return main
        if parameter not in self.returned:
            self.returned[parameter] = torch.zeros_like(parameter, dtype=torch.float32)
        return self.returned[parameter]

    def collect(self, parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Gradients for autograd, in the parameters' dtype."""
        found = cast("dict[Tensor, Tensor]", self.returned)
        return tuple(found[p].to(p.dtype) if p in found else None for p in parameters)


@dataclass
class Workspace:
    """Buffers that hold the extended weight in use, one a role, each as large as its largest tenant.

    `generation` counts passes over the model: adapters may have changed between two of them.
    `adapters` counts those of all groups made so far: an adapter's number is its masks' for good.
    """

    device: torch.device
    dtype: torch.dtype
    generation: int = 0
    adapters: int = 0
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
    """The products of one group. Shapes: x [M, K], y [M, N], wide x [M, K+border], wide dy [M, N+border].

    `rank`: all members' ranks; `pad`: the same, rounded up to a tile; `border`: spare columns of wide
    activations, here `pad`.
    """

    def __init__(
        self, name: str, members: Sequence[Member], operations: Operations, workspace: Workspace, role: str
    ) -> None:
        self.name, self.members, self.operations = name, list(members), operations
        self.workspace, self.role = workspace, role
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
        self.ranks = tuple(m.lora_A.shape[0] for m, _, _ in self._adapters if m.lora_A is not None)
        rates = {m.dropout.p if m.dropout is not None else 0.0 for m, _, _ in self._adapters}
        assert len(rates) <= 1, f"{name}: one rate of dropout a group"
        self.rate = max(rates, default=0.0)
        self.first_adapter = workspace.adapters
        workspace.adapters += len(self._adapters)
        self.pad = -(-rank // align) * align
        self.border = self.pad
        self._resident: Tensor | None = None
        self._packed_in = -1
        workspace.reserve(role, self._numel)

    @property
    def _numel(self) -> int:
        return (self.n + self.pad) * (self.k + self.pad)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The adapters' parameters, A before B, in the members' order."""
        return [p for m, _, _ in self._adapters for p in (m.lora_A, m.lora_B) if p is not None]

    @property
    def rank_spans(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(first rank column, columns) of the first and the last half of the outputs: gate's and up's."""
        spans = {row: (rank, m.lora_A.shape[0]) for m, row, rank in self._adapters if m.lora_A is not None}
        if len(self.members) == 1:
            return spans.get(0, (0, 0)), spans.get(0, (0, 0))
        return spans.get(0, (0, 0)), spans.get(self.members[0].shape[0], (0, 0))

    def dropout(self, seed: Tensor | None, row0: int = 0) -> Dropout | None:
        """The masks of a micro-batch for rows from `row0` on; None where nothing is dropped."""
        if seed is None or not self.rate:
            return None
        return Dropout(self.rate, seed, self.first_adapter, self.ranks, row0)

    # -- the weight ------------------------------------------------------------------------------

    @property
    def resident_nbytes(self) -> int:
        """Bytes that a resident copy takes."""
        return self._numel * self.workspace.dtype.itemsize

    def make_resident(self) -> None:
        """Keeps the dequantized weight for good."""
        shape = (self.n + self.pad, self.k + self.pad)
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

    def _pack(self, a: Tensor, b: Tensor) -> None:
        """This pass's adapters into a [pad, K] and b [N, pad]."""
        packed = [
            Adapter(m.lora_A.detach(), m.lora_B.detach(), m.scaling, row, rank)
            for m, row, rank in self._adapters
            if m.lora_A is not None and m.lora_B is not None
        ]
        if packed:
            self.operations.pack_adapters(packed, a, b)

    def extended(self) -> Tensor:
        """[N+pad, K+pad] with this pass's adapters in its border."""
        if self._resident is not None:
            if self._packed_in != self.workspace.generation:
                self._pack(self._resident[self.n :, : self.k], self._resident[: self.n, self.k :])
                self._packed_in = self.workspace.generation
            return self._resident
        buffer, holds = self.workspace.claim(self.role, id(self), self.n + self.pad, self.k + self.pad)
        if not holds:
            self._write_base(buffer)
            self._pack(buffer[self.n :, : self.k], buffer[: self.n, self.k :])
        return buffer

    # -- activations -----------------------------------------------------------------------------

    def wide_input(self, m: int) -> Tensor:
        """An empty [m, K+border]: what feeds `forward` writes its first K columns."""
        return torch.empty(
            (m, self.k + self.border), dtype=self.workspace.dtype, device=self.workspace.device
        )

    def wide_output(self, m: int) -> Tensor:
        """An empty [m, N+border]: what feeds `backward` writes its first N columns."""
        return torch.empty(
            (m, self.n + self.border), dtype=self.workspace.dtype, device=self.workspace.device
        )

    def fp8_input(self, m: int) -> Fp8Rows | None:
        """Where what feeds `forward` writes its e4m3 beside; None if the product doesn't run in it."""
        return None

    def fp8_output(self, m: int) -> Fp8Rows | None:
        """The same for what feeds `backward`."""
        return None

    def room(self, wide: Tensor) -> Tensor:
        """Where the projection of a wide activation on the adapters goes: [M, pad]."""
        return wide[:, wide.shape[1] - self.pad :]

    def project(self, wide: Tensor, dropout: Dropout | None = None) -> Tensor:
        """x·Aᵀ of a wide input, in its `room`; of what `dropout` leaves of x, times its scale."""
        u = self.room(wide)
        if self.rank:
            x, a = wide[:, : self.k], self.extended()[self.n :, : self.k]
            if dropout is None:
                torch.mm(x, a.T, out=u)
            else:
                self.operations.project_dropped(x, a, dropout, u)
        return u

    def project_back(self, wide: Tensor) -> Tensor:
        """dy·s·B of a wide dy, in its `room`."""
        v = self.room(wide)
        if self.rank:
            torch.mm(wide[:, : self.n], self.extended()[: self.n, self.k :], out=v)
        return v

    def forward(
        self, wide: Tensor, u: Tensor, out: Tensor | None = None, rows: Fp8Rows | None = None
    ) -> Tensor:
        """y [M, N] of a wide input and its projection; `rows` from `fp8_input`, already written."""
        weight = self.extended()[: self.n].T
        return torch.mm(wide, weight) if out is None else torch.mm(wide, weight, out=out)

    def backward(
        self, wide: Tensor, v: Tensor, out: Tensor | None = None, rows: Fp8Rows | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:  # fmt: skip
        """dx [M, K] of a wide dy and its projection; `rows` from `fp8_output`, already written."""
        weight = self.extended()[:, : self.k]
        if dropout is None:
            return torch.mm(wide, weight) if out is None else torch.mm(wide, weight, out=out)
        dy, base = wide[:, : self.n], weight[: self.n]
        dx = torch.mm(dy, base) if out is None else torch.mm(dy, base, out=out)
        self.operations.add_dropped_(dx, v, weight[self.n :], dropout)
        return dx

    def targets(self, gradients: Gradients) -> tuple[list[Target], list[Target]]:
        """Where the products for dA (rank x K) and for dB (rank x N) belong."""
        of_a, of_b = [], []
        for member, row, rank in self._adapters:
            assert member.lora_A is not None and member.lora_B is not None
            if member.lora_A.requires_grad:
                of_a.append(Target(gradients.of(member.lora_A), rank, 0, 1.0, False))
            if member.lora_B.requires_grad:
                of_b.append(Target(gradients.of(member.lora_B), rank, row, member.scaling, True))
        return of_a, of_b

    def halved_targets(self, gradients: Gradients) -> tuple[list[Target], list[Target]]:
        """Targets of dB for the first and the last half of the outputs (gate's and up's), each on its own."""
        halves: tuple[list[Target], list[Target]] = ([], [])
        middle = self.n // 2
        for t in self.targets(gradients)[1]:
            rows = t.out.shape[0]
            for half, start in enumerate((0, middle)):
                first, last = max(t.column0, start), min(t.column0 + rows, start + middle)
                if first < last:
                    part = t.out[first - t.column0 : last - t.column0]
                    halves[half].append(Target(part, 0, first - start, t.alpha, True))
        return halves

    def adapter_gradients(
        self, x: Tensor, u: Tensor, dy: Tensor, v: Tensor, gradients: Gradients,
        row_scale: Tensor | None = None, column_scale: Tensor | None = None, dropout: Dropout | None = None,
    ) -> None:  # fmt: skip
        """Adds dA = (dy·s·B)ᵀ·x and dB = s·dyᵀ·u; u and v from the projections, [M, ≥ rank].

        The input of the product may be given unscaled: it is row_scale ∘ x ∘ column_scale.
        Under `dropout` an adapter's x is scale · mask ∘ x.
        """
        of_a, of_b = self.targets(gradients)
        if of_a:
            self.operations.thin_gradient(v[:, : self.rank], x, row_scale, column_scale, of_a, dropout)
        if of_b:
            self.operations.thin_gradient(u[:, : self.rank], dy, None, None, of_b)
