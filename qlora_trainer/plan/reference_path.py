"""What a layer keeps and needs on the reference path: transformers, PEFT and bitsandbytes as they are.

Legend, in features: h hidden, q queries, kv keys (or values), f MLP width; s bytes of an activation.
What is kept is what autograd saves, counted tensor by tensor (tests/plan/test_paths.py counts
again). All results are bytes of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlora_trainer.plan.fast_path import head_size
from qlora_trainer.plan.settings import Settings
from qlora_trainer.plan.shapes import ModelShape


class ReferencePath:
    """Two activation policies: `none`, and `full` (transformers' gradient checkpointing)."""

    policies: tuple[str, ...] = ("none", "full")

    def __init__(self, shape: ModelShape, settings: Settings) -> None:
        self.shape, self.settings = shape, settings

    def kept(self, policy: str) -> int:
        """What one layer keeps on the device from its forward to its backward pass."""
        if policy == "none":
            return self.settings.tokens * self._saved_by_autograd()
        return self.settings.tokens * self.settings.dtype_bytes * self.shape.hidden

    def on_host(self, policy: str) -> int:
        return 0

    def leaving(self, policies: Sequence[str]) -> int:
        return 0

    def stream(self, policies: Sequence[str]) -> int:
        return 0

    def inputs(self) -> int:
        return 0

    def forward(self, policy: str) -> int:
        """No more than the backward pass needs."""
        return 0

    def repeats(self, policy: str) -> str:
        """What of a layer's forward pass runs twice."""
        return "nothing" if policy == "none" else "layer"

    def _saved_by_autograd(self) -> int:
        """Bytes a token, nothing recomputed."""
        shape, settings = self.shape, self.settings
        s, h, q, kv, f = settings.dtype_bytes, shape.hidden, shape.q, shape.kv, shape.intermediate
        targets = shape.targets
        # RMSNorm works on a float32 copy of its input and keeps it, LayerNorm keeps the input itself.
        kept = shape.norms * (4 * h + 4 if shape.norm == "rms" else s * h + 2 * s)
        kept += s * (2 * q + 2 * kv) + 4 * shape.heads  # attention: q, k, v, output, log-sum-exp
        if shape.head_norms:
            kept += 4 * (q + kv) + 4 * (shape.heads + shape.heads * kv // q)
        if shape.fused_qkv:
            kept += s * (2 * q + kv)  # v keeps all of qkv alive; attention's output is copied
        # act(gate) and its two factors; a ReLU keeps its output only, which the next LoRA shares.
        kept += s * f * (3 if shape.gated else 1 if shape.relu else 2)
        if any(x.in_features == f for x in targets) and not shape.relu:
            kept += s * f  # the input of the down projection, for the gradient of its A
        inputs = {_input_of(x.name) for x in targets if x.in_features == h}
        kept += s * h * len(inputs & {"attention", "mlp"})  # outputs of the two norms, for theirs
        return kept + s * settings.r * len(targets)  # x·Aᵀ, for the gradient of B

    def work(self, policy: str) -> int:
        """What the backward pass of one layer needs beside what is kept.

        The gradients of the layer's output, of the MLP's inner activations and of its input are alive
        together; that is the widest point. Under `full` the layer's own forward pass is there again.
        """
        shape, settings = self.shape, self.settings
        inner = 3 if shape.gated else 2
        gradients = settings.tokens * settings.dtype_bytes * (3 * shape.hidden + inner * shape.intermediate)
        return gradients + (self.kept("none") if policy == "full" else 0)

    def head(self, *, backward: bool) -> int:
        """Peak of the LM head and the loss: whole logits, where any row of the batch has a label; or a chunk
        of them, where the decoder is run by hand though its layers are not."""
        if self.settings.chunked:
            head = head_size(self.shape, self.settings)
            return head.work(self.settings.tokens, self.settings.labelled, backward=backward)
        settings, v, s = self.settings, self.shape.vocab, self.settings.dtype_bytes
        n = round(settings.tokens * (1 - (1 - settings.supervised) ** settings.rows))
        if backward:  # log-probabilities, their gradient, and that of the float32 logits
            return 3 * 4 * n * v
        return s * n * v + 4 * n * v * (2 if s == 2 else 1)

    def evaluation(self) -> int:
        """What one layer has in hand in a forward pass that saves nothing."""
        s, h, f = self.settings.dtype_bytes, self.shape.hidden, self.shape.intermediate
        return self.settings.tokens * (s * (3 * h + 3 * f) + 4 * h)

    def workspace(self, dequantized: int = 0) -> int:
        """One weight, dequantized: its scales in float32 first, then its 16-bit values."""
        if self.settings.method not in ("nf4", "fp4"):
            return 0
        largest = max((x.numel for x in self.shape.linears), default=0)
        return largest * self.settings.dtype_bytes + 4 * (largest // 64)


def _input_of(name: str) -> str:
    if name in ("o_proj", "out_proj", "dense"):
        return "attention output"  # kept by attention already
    return (
        "attention" if any(mark in name for mark in ("q_", "k_", "v_", "qkv", "query", "c_attn")) else "mlp"
    )
