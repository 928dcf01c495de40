"""One decoder layer: its blocks in a row, as one node of autograd, under an activation policy.

Comes in: the residual stream as (x, delta), whose sum is meant; goes out: the next (x, delta). The
addition happens inside the next norm, where both are read anyway. Backward: the gradient of the sum,
which is the gradient of both: one buffer that travels from the head to the embedding, each block adding
its branch in place. No gradient of a frozen weight exists anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.kernels import Operations

from .activations import ON_HOST, RECOMPUTED, HostStore
from .attention import AttentionBlock, AttentionSaved, AttentionSize
from .call import Call
from .mlp import TOKENS_AT_ONCE, MlpBlock, MlpSaved, MlpSize
from .parts import LayerParts
from .projection import Gradients, ProductSize, Projection
from .projection_fp8 import e4m3_bytes


@dataclass
class LayerSaved:
    """What the layer's node holds between the passes, block by block."""

    attention: AttentionSaved = field(default_factory=AttentionSaved)
    mlp: MlpSaved = field(default_factory=MlpSaved)

    @property
    def blocks(self) -> tuple[AttentionSaved, MlpSaved]:
        return self.attention, self.mlp


class FusedLayer:
    """`policy` as in `activations.py`; `tokens_at_once`: of the MLP, where it is made again."""

    def __init__(
        self,
        index: int,
        parts: LayerParts,
        operations: Operations,
        policy: str,
        host: HostStore | None,
        tokens_at_once: int = TOKENS_AT_ONCE,
    ) -> None:
        self.index, self.policy, self.host = index, policy, host
        self.layer_type = parts.attention.layer_type
        self.attention = AttentionBlock(parts.attention, operations)
        self.mlp = MlpBlock(parts.mlp, operations, policy, tokens_at_once)
        self.projections: tuple[Projection, ...] = self.attention.projections + self.mlp.projections
        self._parameters = [p for projection in self.projections for p in projection.parameters]

    def __call__(self, x: Tensor, delta: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """(x, delta), each [M, h] -> (x2, delta2)."""
        ours = [p for p in self._parameters if getattr(p, "main_grad", None) is None]
        return _LayerFunction.apply(x, delta, self, call, call.anchor, *ours)

    def forward(self, x: Tensor, delta: Tensor | None, call: Call, saved: LayerSaved) -> Tensor:
        """The MLP branch's output [M, h]; fills `saved` with what the policy keeps until then."""
        y = self.attention.forward(x, delta, call, saved.attention)
        stream = saved.attention.x
        assert stream is not None
        if not call.training or self.policy in RECOMPUTED:
            saved.attention.drop("full")
        return self.mlp.forward(stream, y, call, saved.mlp)

    def backward(
        self, grad: Tensor, saved: LayerSaved, call: Call, needs_input: bool
    ) -> tuple[Tensor | None, Gradients]:
        """d(loss)/d(x) [M, h] from that of the output sum; None if nobody needs it."""
        if self.policy in RECOMPUTED:
            self._recompute(saved, call)
        gradients, parts = Gradients(), self.attention.parts
        direct = parts.output_norm is None
        middle = self.mlp.backward(call.take(grad), saved.mlp, call, gradients, parts.o, direct)
        # the layer below feeds the result to its down projection, which has this one's border
        border = self.mlp.parts.down.size.border if needs_input else None
        found = self.attention.backward(middle, saved.attention, call, gradients, border)
        return None if found is None else call.hand(found), gradients

    def _recompute(self, saved: LayerSaved, call: Call) -> None:
        """Everything up to the MLP's input again, from x."""
        x = saved.attention.x
        assert x is not None
        y = self.attention.forward(x, None, call, saved.attention)
        self.mlp.renew_input(x, y, saved.mlp)


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        layer: FusedLayer,
        call: Call,
        anchor: Tensor,
        *ours: Tensor,
    ) -> Any:
        saved = LayerSaved()
        out = layer.forward(x, delta, call, saved)
        assert saved.mlp.x is not None
        x2 = saved.mlp.x.view_as(saved.mlp.x)  # an alias: the node must not hold its own output
        if call.training:
            for block in saved.blocks:
                block.drop(layer.policy)
            if layer.host is not None:
                layer.host.put(layer.index, saved.blocks, layer.policy)
            ctx.layer, ctx.call, ctx.saved, ctx.ours = layer, call, saved, ours
        return x2, out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_x2: Tensor, d_out: Tensor) -> Any:
        """Both outputs are only ever used as their sum: either gradient is the sum's."""
        layer, call, saved = ctx.layer, ctx.call, ctx.saved
        ctx.saved = None  # one backward a forward: the buffers are overwritten on the way
        assert saved is not None, "the backward of a fused layer ran twice"
        if layer.policy in ON_HOST and layer.host is not None:
            layer.host.get(layer.index, saved.blocks)
        needs_x, needs_delta = ctx.needs_input_grad[:2]
        dx, gradients = layer.backward(d_out, saved, call, needs_x or needs_delta)
        returned = gradients.collect(ctx.ours)
        return dx if needs_x else None, dx if needs_delta else None, None, None, None, *returned


@dataclass(frozen=True)
class LayerSize:
    """What a layer keeps and needs of `tokens`, in bytes: the sums of its blocks, for what plans."""

    tokens: int
    attention: AttentionSize
    mlp: MlpSize
    travelling: bool  # whether policies on the host move anything: not on a CPU, where all is there

    def on_host(self, policy: str) -> int:
        """What travels to the host and comes back."""
        if not self.travelling or policy not in ON_HOST:
            return 0
        return self.tokens * (self.attention.travels(policy) + self.mlp.travels(policy))

    def kept(self, policy: str) -> int:
        """On the device between the passes."""
        found = self.tokens * (self.attention.kept(policy) + self.mlp.kept(policy))
        return found - self.on_host(policy)

    def forward(self, policy: str) -> int:
        """What the forward pass has in hand at most, its input from the layer below apart."""
        after = self.mlp.forward(self.tokens, policy)
        if policy == "none":
            after += self.kept(policy)
        elif policy not in RECOMPUTED:
            after += self.tokens * self.attention.dtype_bytes * (self.attention.qkv.n + self.attention.q)
        return max(self.tokens * self.attention.forward(), after)

    def backward(self, policy: str) -> int:
        """What the backward pass needs beside what is kept: the wider of the two blocks."""
        again = 2 * self.on_host(policy)  # back on the device: this layer's tensors, and the next one's
        if policy in RECOMPUTED:
            again += self.kept("mlp") - self.kept("full")
        incoming = self.tokens * self.mlp.dtype_bytes * (self.mlp.hidden + self.mlp.down.border)
        attention = self.attention.backward(self.tokens) - self.mlp.freed(self.tokens, policy)
        return again + incoming + max(self.mlp.backward(self.tokens, policy), attention)

    def evaluation(self) -> int:
        """A forward pass that keeps nothing, at the MLP: the layer's input, x, x2, normed and the output."""
        mlp = self.mlp
        inner = mlp.gate_up.n + mlp.gate_up.border + mlp.down.k + mlp.down.border
        return self.tokens * mlp.dtype_bytes * (5 * mlp.hidden + inner)

    @property
    def groups(self) -> tuple[ProductSize, ...]:
        """The layer's products, those with buffers of their own role last."""
        return self.attention.qkv, self.attention.o, self.mlp.down, self.mlp.gate_up

    def workspace(self) -> int:
        """Of all layers together: a buffer for gate and up, and one for the largest of the others."""
        *others, gate_up = (group.extended for group in self.groups)
        return self.mlp.dtype_bytes * (gate_up + max(others))

    def dequantized(self) -> int:
        """The layer's weights as resident copies in the compute dtype."""
        return self.mlp.dtype_bytes * sum(group.extended for group in self.groups)

    def e4m3(self) -> int:
        """The layer's weights as resident e4m3 copies."""
        return sum(e4m3_bytes(group, self.mlp.dtype_bytes) for group in self.groups)
