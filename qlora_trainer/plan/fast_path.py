"""What a layer keeps and needs on the fast path: the sums of its blocks' own accounts (`model/fused/`).

In: shape and settings. Out: `FastPath`, bytes of one micro-batch under each activation policy.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlora_trainer.model.fused.activations import POLICIES, RECOMPUTED, RECOMPUTES
from qlora_trainer.model.fused.attention import AttentionSize
from qlora_trainer.model.fused.head import CHUNK_BYTES, HeadSize
from qlora_trainer.model.fused.layer import LayerSize
from qlora_trainer.model.fused.mlp import MlpSize
from qlora_trainer.model.fused.projection import ALIGN, ProductSize
from qlora_trainer.plan.settings import Settings
from qlora_trainer.plan.shapes import ModelShape


def groups(shape: ModelShape, settings: Settings) -> dict[str, ProductSize]:
    """The four products of a layer by role."""
    assert shape.layer is not None, f"{shape.model_type} is not of the fast path"
    align = ALIGN[settings.device]
    return {
        role: ProductSize(group.n, group.k, settings.r * group.rank, align, settings.fp8)
        for role, group in shape.layer.groups.items()
    }


def head_size(shape: ModelShape, settings: Settings) -> HeadSize:
    """An LM head that makes its logits a chunk at a time."""
    return HeadSize(shape.hidden, shape.vocab, settings.dtype_bytes, CHUNK_BYTES[settings.device])


def layer_size(shape: ModelShape, settings: Settings) -> LayerSize:
    """One decoder layer of `settings.tokens`."""
    found = groups(shape, settings)
    s, sandwich = settings.dtype_bytes, shape.norms == 4
    attention = AttentionSize(
        shape.hidden, shape.q, shape.kv, shape.heads, sandwich, found["qkv"], found["o"], s
    )
    mlp = MlpSize(shape.hidden, sandwich, found["gate_up"], found["down"], s)
    return LayerSize(settings.tokens, attention, mlp, travelling=settings.device == "cuda")


class FastPath:
    """Five activation policies (`activations.py`)."""

    policies: tuple[str, ...] = POLICIES

    def __init__(self, shape: ModelShape, settings: Settings) -> None:
        self.shape, self.settings = shape, settings
        self.layer = layer_size(shape, settings)
        self._head = head_size(shape, settings)

    def kept(self, policy: str) -> int:
        """What one layer keeps on the device."""
        return self.layer.kept(policy)

    def on_host(self, policy: str) -> int:
        return self.layer.on_host(policy)

    def leaving(self, policies: Sequence[str]) -> int:
        """What is still on its way to the host after these layers' forward passes (`HostStore.put`)."""
        return sum(self.on_host(policy) for policy in policies[-2 if policies[-1:] == ("offload",) else -1 :])

    def stream(self, policies: Sequence[str]) -> int:
        """The residual stream that these layers hand on, where the last of them does not keep it."""
        if not policies or policies[-1] not in RECOMPUTED:
            return 0
        return self.settings.tokens * self.settings.dtype_bytes * self.shape.hidden

    def inputs(self) -> int:
        """There all the time: ids, positions, labels and their weights; sines and cosines; embeddings, where
        their table is on the host."""
        table = 4 * self.shape.q // self.shape.heads
        on_host = self.settings.offload in ("embeddings", "layers") and self.shape.head
        rows = self.settings.dtype_bytes * self.shape.hidden if on_host else 0
        return self.settings.tokens * (36 + table + rows)

    def repeats(self, policy: str) -> str:
        """What of a layer's forward pass runs twice."""
        return RECOMPUTES[policy]

    def forward(self, policy: str) -> int:
        """What one layer's forward pass has in hand at most, its input from the layer below apart."""
        return self.layer.forward(policy)

    def work(self, policy: str) -> int:
        """What one layer's backward pass needs beside what is kept."""
        return self.layer.backward(policy)

    def dropout_traffic(self) -> int:
        """Bytes a token that dropout moves in one layer: `add_dropped_` on gradients of adapted inputs."""
        return 2 * self.settings.dtype_bytes * sum(group.k for group in self.layer.groups if group.rank)

    def head(self, *, backward: bool) -> int:
        """What the head adds to what the last layer hands on."""
        return self._head.work(self.settings.tokens, self.settings.labelled, backward=backward)

    def evaluation(self) -> int:
        """What a layer has in hand in a forward pass that keeps nothing."""
        return self.layer.evaluation()

    def workspace(self, dequantized: int = 0) -> int:
        """Buffers of the dequantized weights in use, made when first needed.

        `dequantized`: bytes of the weights that stay in 16 bits; where all do, nothing asks for a buffer.
        """
        if self.settings.fp8 or dequantized >= self.dequantized():
            return 0
        return self.layer.workspace()

    def e4m3(self) -> int:
        """Bytes of all weights as resident e4m3 copies."""
        return self.layer.e4m3() * self.shape.layers

    def dequantized(self) -> int:
        """Bytes of all weights as resident 16-bit copies (fuse's resident_bytes)."""
        return self.layer.dequantized() * self.shape.layers
