"""A group of frozen projections of one activation, and the adapters on them, as one product.

Comes in: members (q, k, v · gate, up · …) with frozen weights [n_i, K] and LoRA pairs. Goes out: y,
the gradient of x, and the adapters' gradients. The adapters are folded into the product by
extending its inner dimension (R: all members' ranks, padded):

    forward    y  = [x | x·Aᵀ] · [W | s·B]ᵀ
    backward   dx = [dy | dy·s·B] · [W ; A]          no gradient of W is ever formed

so every activation that enters a product lives in a buffer with R spare columns (`Widened`), and the
extended weight is one [N+R, K+R] matrix holding W, A below it and s·B beside it. It is written
from the 4-bit codes into a workspace shared by all layers, or stays resident when memory is
plentiful: the same numbers either way.

LoRA dropout hides parts of x from the adapters and not from W. Forward, only the border changes, to
scale·(mask ∘ x)·Aᵀ. Backward, no inner dimension can carry scale·mask ∘ (dy·s·B·A): the product leaves
the border out and that is added to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from qlora_trainer.kernels import Adapter, Dropout, Fp8Rows, Operations, QuantizedWeight, Target

from .adapter_columns import Widened
from .workspace import Workspace

# The inner dimension of a matrix-unit tile: a narrower border would cost the same time.
ALIGN = {"cuda": 64, "cpu": 1}


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


@dataclass(frozen=True)
class ProductSize:
    """The product of a group in elements, for what holds weights and for what plans: n outputs, k inputs.

    rank: all members' ranks. align: what the border is rounded up to. e4m3: operands are e4m3 copies.
    """

    n: int
    k: int
    rank: int
    align: int
    e4m3: bool = False

    @property
    def pad(self) -> int:
        """The ranks, rounded up to a tile."""
        return -(-self.rank // self.align) * self.align

    @property
    def border(self) -> int:
        """Spare columns of a widened activation: none where the product's operand is an e4m3 copy anyway."""
        return 0 if self.e4m3 else self.pad

    @property
    def extended(self) -> int:
        """Elements of the weight with its border."""
        return (self.n + self.pad) * (self.k + self.pad)

    @property
    def e4m3_input(self) -> int:
        """Bytes a token of what enters the product, in e4m3."""
        return self.k + self.pad if self.e4m3 else 0

    @property
    def e4m3_output(self) -> int:
        """Bytes a token of its gradient in e4m3."""
        return self.n + self.pad if self.e4m3 else 0


class Projection:
    """The products of one group. Shapes: x [M, K], y [M, N], each in a buffer `size.border` columns wider."""

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
        self.size = ProductSize(self.n, self.k, rank, ALIGN.get(workspace.device.type, 1))
        self.rank, self.pad = rank, self.size.pad
        self.ranks = tuple(m.lora_A.shape[0] for m, _, _ in self._adapters if m.lora_A is not None)
        rates = {m.dropout.p if m.dropout is not None else 0.0 for m, _, _ in self._adapters}
        assert len(rates) <= 1, f"{name}: one rate of dropout a group"
        self.rate = max(rates, default=0.0)
        self.first_adapter = workspace.adapters
        workspace.adapters += len(self._adapters)
        self._resident: Tensor | None = None
        self._packed_in = -1
        workspace.reserve(role, self.size.extended)

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
        return self.size.extended * self.workspace.dtype.itemsize

    def make_resident(self) -> None:
        """Keeps the dequantized weight for good."""
        self._resident = self.workspace.empty(self.n + self.pad, self.k + self.pad)
        self._write_base(self._resident)

    def _write_base(self, extended: Tensor) -> None:
        row = 0
        for member in self.members:
            out = extended[row : row + member.shape[0], : self.k]
            if isinstance(member.weight, QuantizedWeight):
                self.operations.dequantize(self.workspace.store.codes(member.weight), out)
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

    def input(self, m: int) -> Widened:
        """An empty x [m, K]: what feeds `forward` writes its values, and its e4m3 where it has one."""
        return Widened(self.workspace.empty(m, self.k + self.size.border), self.k, self.e4m3_input(m))

    def output(self, m: int) -> Widened:
        """An empty dy [m, N]: what feeds `backward` writes its values."""
        return Widened(self.workspace.empty(m, self.n + self.size.border), self.n)

    def e4m3_input(self, m: int) -> Fp8Rows | None:
        """Where what feeds `forward` writes its e4m3 beside; None if the product doesn't run in it."""
        return None

    def e4m3_output(self, m: int) -> Fp8Rows | None:
        """The same for what feeds `backward`."""
        return None

    def project(self, x: Widened, dropout: Dropout | None = None) -> Tensor:
        """x·Aᵀ [M, pad], in x's spare columns; of what `dropout` leaves of x, times its scale."""
        u = x.columns
        if self.rank:
            a = self.extended()[self.n :, : self.k]
            if dropout is None:
                torch.mm(x.values, a.T, out=u)
            else:
                self.operations.project_dropped(x.values, a, dropout, u)
        return u

    def project_back(self, dy: Widened) -> Tensor:
        """dy·s·B [M, pad], in dy's spare columns."""
        v = dy.columns
        if self.rank:
            torch.mm(dy.values, self.extended()[: self.n, self.k :], out=v)
        return v

    def forward(self, x: Widened, u: Tensor | None, out: Tensor | None = None) -> Tensor:
        """y [M, N] of x and its projection on the adapters; without one, the base's alone."""
        weight, operand = self.extended()[: self.n], x.buffer
        if u is None:
            weight, operand = weight[:, : self.k], x.values
        return torch.mm(operand, weight.T) if out is None else torch.mm(operand, weight.T, out=out)

    def backward(
        self, dy: Widened, v: Tensor, out: Tensor | None = None, dropout: Dropout | None = None
    ) -> Tensor:
        """dx [M, K] of dy and its projection."""
        weight = self.extended()[:, : self.k]
        if dropout is None:
            return torch.mm(dy.buffer, weight) if out is None else torch.mm(dy.buffer, weight, out=out)
        base = weight[: self.n]
        dx = torch.mm(dy.values, base) if out is None else torch.mm(dy.values, base, out=out)
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
            self.operations.adapter_grad(v[:, : self.rank], x, row_scale, column_scale, of_a, dropout)
        if of_b:
            self.operations.adapter_grad(u[:, : self.rank], dy, None, None, of_b)
