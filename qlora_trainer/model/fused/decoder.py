"""The whole model as one callable: embedding, decoder layers, head.

Comes in: a `Batch`. Goes out: the cross-entropy of each supervised token, differentiable in the adapters.
Layers that the fast path declines run as the modules they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_trainer.data.batch import Batch
from qlora_trainer.kernels.attention import Layout

from ..forward import ReferenceForward, TokenNll
from .activations import HostStore
from .call import Call
from .head import FusedHead, ModuleHead
from .inputs import Buckets, Inputs, busy_tokens, prepare
from .layer import FusedLayer
from .rotary import Rotary
from .workspace import Workspace


class ModuleLayer:
    """A decoder layer as transformers and PEFT run it, for a layer that cannot be fused."""

    def __init__(
        self, module: nn.Module, layer_type: str | None, window: int | None, recompute: bool
    ) -> None:
        self.module, self.layer_type, self.window, self.recompute = module, layer_type, window, recompute

    def __call__(self, x: Tensor, delta: Tensor | None, call: Call) -> tuple[Tensor, None]:
        layout = call.layout
        stream = (x if delta is None else x + delta).unflatten(0, (layout.batch, layout.length))
        # an explicit mask means the same to every attention implementation that takes one
        everywhere = Layout(layout.batch, layout.length, None, call.document_ids)
        mask = everywhere.mask(self.window, stream.dtype, stream.device)
        if mask is None:
            mask = causal_mask(layout.length, stream.dtype, stream.device)
        cos, sin = (
            torch.cat((t, t), dim=-1).unflatten(0, stream.shape[:2]) for t in call.rotary[self.layer_type]
        )

        def run(hidden: Tensor) -> Tensor:
            result = self.module(
                hidden,
                attention_mask=mask,
                position_ids=call.position_ids,
                position_embeddings=(cos.to(hidden.dtype), sin.to(hidden.dtype)),
                use_cache=False,
            )
            return result[0] if isinstance(result, tuple) else result

        hidden = (
            checkpoint(run, stream, use_reentrant=False) if self.recompute and call.training else run(stream)
        )
        return hidden.flatten(0, 1), None


def causal_mask(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive [1, 1, length, length]."""
    blocked = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    return torch.zeros(length, length, dtype=dtype, device=device).masked_fill(blocked, float("-inf"))[
        None, None
    ]


class FusedForward:
    """Callable `batch -> TokenNll`; see `prepare` and `run` for what a captured graph needs apart.

    embed: int64 ids -> embeddings. reference: the same model's modules, which declined layers share.
    `capturable`: whether `run` may be recorded as a CUDA graph; `busy`: tokens of a micro-batch from which
    that gains nothing.
    """

    def __init__(
        self,
        workspace: Workspace,
        embed: nn.Module,
        embeddings_on_host: Tensor | None,
        rotary: Rotary,
        layers: Sequence[FusedLayer | ModuleLayer],
        head: FusedHead | ModuleHead,
        host: HostStore | None,
        reference: ReferenceForward,
    ) -> None:
        self.device, self.workspace, self.embed, self.rotary = workspace.device, workspace, embed, rotary
        self.embeddings_on_host, self.layers, self.head = embeddings_on_host, list(layers), head
        self.host, self.reference = host, reference
        fused = [layer for layer in layers if isinstance(layer, FusedLayer)]
        members = [member for layer in fused for group in layer.projections for member in group.members]
        self._dropouts = [member.dropout for member in members if member.dropout is not None]
        self.capturable = not rotary.asks_the_host
        widest = max((sum(g.n * g.k for g in layer.projections) for layer in fused), default=0)
        self.busy = busy_tokens(widest)

    def prepare(self, batch: Batch, buckets: Buckets | None = None) -> Inputs:
        """The batch on the device; give it while it is still on the host.

        LoRA dropout is on where PEFT's modules would have it on: in training mode. `buckets` as in
        `inputs.prepare`.
        """
        dropout = any(module.training for module in self._dropouts)
        return prepare(batch, self.device, self.embeddings_on_host, dropout, buckets)

    def __call__(self, batch: Batch, adapters: bool = True) -> TokenNll:
        """adapters=False: of the base alone, without gradients."""
        if adapters:
            return self.run(self.prepare(batch))
        if self.reference.begins_in_weights:  # what the adapters took out of the base is in no border
            return self.reference(batch.to(self.device), adapters=False)
        with torch.no_grad(), self.reference.base_alone():
            return self.run(self.prepare(batch), adapters=False)

    def run(self, inputs: Inputs, adapters: bool = True) -> TokenNll:
        """The pass itself: launches only, no question to the device."""
        self.workspace.generation += 1
        if self.host is not None:
            self.host.reset()
        call = Call(
            inputs.layout,
            self.rotary(inputs.position_ids),
            torch.is_grad_enabled(),
            adapters,
            inputs.position_ids,
            inputs.document_ids,
            inputs.seed,
            torch.empty(0, device=self.device, requires_grad=True),
        )
        x: Tensor = (self.embed(inputs.input_ids) if inputs.hidden is None else inputs.hidden).flatten(0, 1)
        delta: Tensor | None = None
        for layer in self.layers:
            x, delta = layer(x, delta, call)
        supervised = inputs.supervised
        return TokenNll(self.head(x, delta, supervised, call), supervised.weights, supervised.rows)
