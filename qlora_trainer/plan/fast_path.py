"""What a layer keeps and needs on the fast path: mirrors `qlora_trainer/model/fused/`.

Kept tensors are those of `keep.Saved` under each policy; work follows `layer.FusedLayer`'s backward
passes line by line; the head is `head.FusedHead`; weights are extended by a border for the adapters
(`projection.py`). A change there is a change here: tests/gpu/test_plan_gpu.py compares the bytes.

Legend, in features: h hidden, q queries, kv keys (or values), f MLP width; s bytes of an activation;
M tokens of the micro-batch. All results are bytes of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlora_trainer.plan.settings import Settings
from qlora_trainer.plan.shapes import ModelShape

BORDER = {"cuda": 64, "cpu": 1}  # columns that a group's ranks are rounded up to (projection._ALIGN)
MLP_ROWS = 4096  # tokens of the MLP in flight where it is recomputed (fuse's mlp_rows)
LOGITS_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}  # of a chunk of logits (fuse's logits_bytes)
ACCUMULATED = 1 << 29  # bytes of float32 gradient of attention at once (kernels/attention.py)
INT32 = 1 << 31  # elements that attention takes as they are; of more it gets copies, some heads at a time
LABELS_STEP = 256  # supervised positions are rounded up to it (inputs.supervised_positions)
GROUPS = {
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "qkv_proj": "qkv", "o_proj": "o",
    "gate_proj": "gate_up", "up_proj": "gate_up", "gate_up_proj": "gate_up", "down_proj": "down",
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Projections of one input, as one product: n outputs, k inputs, the adapters' ranks together."""

    n: int
    k: int
    rank: int
    align: int
    fp8: bool

    @property
    def pad(self) -> int:
        """The ranks, rounded up to a tile."""
        return -(-self.rank // self.align) * self.align

    @property
    def border(self) -> int:
        """Spare columns of a wide activation: none where the operand of a product is an e4m3 copy anyway."""
        return 0 if self.fp8 else self.pad

    @property
    def e4m3_input(self) -> int:
        """Bytes a token of what enters the product, in e4m3 (`Projection.fp8_input`)."""
        return self.k + self.pad if self.fp8 else 0

    @property
    def e4m3_output(self) -> int:
        """Bytes a token of its gradient in e4m3 (`Projection.fp8_output`)."""
        return self.n + self.pad if self.fp8 else 0

    @property
    def extended(self) -> int:
        """Elements of the weight with its border."""
        return (self.n + self.pad) * (self.k + self.pad)

    def e4m3(self, dtype_bytes: int) -> int:
        """Bytes of `projection_fp8.Fp8Projection.make_resident`: both orientations with a border and a scale
        a row, and the adapters packed in the compute dtype."""
        copies = self.n * (self.k + self.pad) + self.k * (self.n + self.pad)
        return copies + 4 * (self.n + self.k) + dtype_bytes * self.pad * (self.n + self.k)


def groups(shape: ModelShape, settings: Settings) -> dict[str, Group]:
    """The four products of a layer by role."""
    targets = {x.name for x in shape.targets(settings.target_modules)}
    found: dict[str, Group] = {}
    for x in shape.linears:
        if x.layer == 0 and x.name in GROUPS:
            role = GROUPS[x.name]
            before = found.get(role, Group(0, x.in_features, 0, BORDER[settings.device], settings.fp8))
            rank = settings.r if x.name in targets else 0
            found[role] = replace(before, n=before.n + x.out_features, rank=before.rank + rank)
    return found


class FastPath:
    """Five activation policies (`keep.py`)."""

    policies: tuple[str, ...] = ("none", "mlp", "full", "offload", "full_offload")

    def __init__(self, shape: ModelShape, settings: Settings) -> None:
        self.shape, self.settings = shape, settings
        self.groups = groups(shape, settings)
        assert set(self.groups) == {"qkv", "o", "gate_up", "down"}, (
            f"{shape.model_type} is not of the fast path"
        )

    def kept(self, policy: str) -> int:
        """What one layer keeps on the device (`keep.Saved`, `keep.keep_only`)."""
        s, h, q = self.settings.dtype_bytes, self.shape.hidden, self.shape.q
        g = self.groups
        sandwich = self.shape.norms == 4
        full = s * h + s * g["down"].rank + (s * h + 4 if sandwich else 0)  # x, u_down, y_mlp
        rest = s * g["qkv"].n + s * q + s * h  # qkv, attention's output, x2
        rest += s * (g["qkv"].rank + g["o"].rank) + 8 + 4 * self.shape.heads  # u_qkv, u_o, 1/rms, log-sum-exp
        rest += s * h + 4 if sandwich else 0  # y_attention
        gate_up = s * (g["gate_up"].n + g["gate_up"].border + g["gate_up"].rank)
        per_token = {
            "none": full + rest + gate_up,
            "mlp": full + rest,
            "full": full,
            "offload": full + rest - self._travels("offload"),
            "full_offload": full - self._travels("full_offload"),
        }
        return self.settings.tokens * per_token[policy]

    def _travels(self, policy: str) -> int:
        """Bytes a token that go to the host and come back (`keep._WIDE`)."""
        if self.settings.device == "cpu" or policy not in ("offload", "full_offload"):
            return 0  # on a CPU they are there
        s, h, sandwich = self.settings.dtype_bytes, self.shape.hidden, self.shape.norms == 4
        streams = 2 if sandwich else 1  # x, and the MLP's output before its norm
        if policy == "full_offload":
            return s * streams * h
        return s * (2 * streams * h + self.groups["qkv"].n + self.shape.q)  # x2, attention's before its norm

    def on_host(self, policy: str) -> int:
        return self.settings.tokens * self._travels(policy)

    def leaving(self, policies: Sequence[str]) -> int:
        """What is still on its way to the host after these layers' forward passes (`HostStore.put`)."""
        return sum(self.on_host(policy) for policy in policies[-2 if policies[-1:] == ("offload",) else -1 :])

    def stream(self, policies: Sequence[str]) -> int:
        """The residual stream that these layers hand on, where the last of them does not keep it."""
        if policies[-1:] not in (("full",), ("full_offload",)):
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
        """What of a layer's forward pass runs twice; the down projection never does."""
        if policy == "none":
            return "nothing"
        return "gate_up" if policy in ("mlp", "offload") else "all but down"

    def _mlp_rows(self) -> int:
        """The MLP's inner tensors where they are made for some rows at a time."""
        s, g = self.settings.dtype_bytes, self.groups
        inner = g["gate_up"].n + g["gate_up"].border + g["down"].k + g["down"].border
        return min(self.settings.tokens, MLP_ROWS) * (s * inner + g["down"].e4m3_input)

    def forward(self, policy: str) -> int:
        """What one layer's forward pass has in hand at most, its input from the layer below apart."""
        s, h, q, tokens = self.settings.dtype_bytes, self.shape.hidden, self.shape.q, self.settings.tokens
        g = self.groups
        between = tokens * s * (h + h + g["o"].border)  # attention's output, and the next product's input
        inside = tokens * s * (h + g["qkv"].n + q) + between  # x, then all up to x2
        outside = tokens * s * (h + h) + between + self._mlp_rows()  # x, the MLP's output
        if policy == "none":
            outside = self.kept("none") + tokens * s * (2 * h + g["down"].k + g["down"].border)
            outside += tokens * g["down"].e4m3_input
        outside += tokens * g["gate_up"].e4m3_input
        if policy in ("mlp", "offload"):
            outside += tokens * s * (g["qkv"].n + q)
        return max(inside, outside)

    def work(self, policy: str) -> int:
        """What one layer's backward pass needs beside what is kept: the wider of its two halves."""
        s, h, tokens = self.settings.dtype_bytes, self.shape.hidden, self.settings.tokens
        g = self.groups
        f = g["down"].k
        again = 2 * self.on_host(policy)  # back on the device: this layer's tensors, and the next one's
        if policy in ("full", "full_offload"):  # FusedLayer.recompute: all of `mlp`'s tensors, from x
            again += self.kept("mlp") - self.kept("full")
        incoming = tokens * s * (h + g["down"].border)  # gradient of the stream, overwritten on the way
        e4m3_down = g["down"].n + g["down"].pad if g["down"].fp8 else 0  # operands of the two products
        e4m3_up = g["gate_up"].n + (1 + s) * g["gate_up"].pad if g["gate_up"].fp8 else 0
        if policy == "none":
            # gradients of the normed input and of the inner activation
            mlp = tokens * (s * h + max(s * f + e4m3_down, e4m3_up))
            freed = tokens * s * (g["gate_up"].n + g["gate_up"].border)
        else:
            rows = min(tokens, MLP_ROWS)
            wide = s * (g["gate_up"].n + g["gate_up"].border)  # beside it first its input, then d_act
            mlp = tokens * s * h + rows * (wide + max(s * (h + g["gate_up"].border), s * f + e4m3_down))
            freed = 0
        freed += tokens * s * h  # x2
        return again + incoming + max(mlp, self._attention_work() - freed)

    def _attention_work(self) -> int:
        """`attend_backward`: d_attended, dq, dk, dv, and what the operation sums up in."""
        s, q, kv, tokens = self.settings.dtype_bytes, self.shape.q, self.shape.kv, self.settings.tokens
        given = self.groups["o"].e4m3_output  # what the MLP's half hands on in e4m3 lives on
        heads, most = max(1, kv * self.shape.heads // q), ACCUMULATED  # heads of the keys
        divisors = (n for n in range(1, heads + 1) if heads % n == 0)
        parts = next((n for n in divisors if 4 * tokens * q <= n * most), heads)
        sums = 4 * q + (2 * s * q if kv < q else 0)  # float32 dq; dk and dv of every query head
        found = s * (q + 2 * kv)
        if parts == 1:
            return tokens * (given + s * q + found + sums)
        copied = found if tokens * self.groups["qkv"].n >= INT32 else 0
        copied += 2 * s * q if tokens * q >= INT32 else 0
        # dq takes the place of d_attended
        return tokens * (given + found + (found + sums + copied) // parts)

    def dropout_traffic(self) -> int:
        """Bytes a token that dropout moves in one layer: `add_dropped_` on gradients of adapted inputs."""
        return 2 * self.settings.dtype_bytes * sum(group.k for group in self.groups.values() if group.rank)

    def head(self, *, backward: bool) -> int:
        """FusedHead.loss: what the last layer adds to the stream; of a chunk its logits, and rows gathered
        (stream and addition) and normed; trained, the gradient of all rows."""
        n = -(-self.settings.labelled // LABELS_STEP) * LABELS_STEP
        s, h, v = self.settings.dtype_bytes, self.shape.hidden, self.shape.vocab
        rows = max(1, LOGITS_BYTES[self.settings.device] // (v * s))
        rows = min(n, rows // 256 * 256 or rows)
        streams = 1 if backward else 2  # trained, x is `stream`'s
        return (
            rows * s * (v + 3 * h) + (n * h * s if backward else 0) + streams * self.settings.tokens * h * s
        )

    def evaluation(self) -> int:
        """FusedLayer's forward pass, at the MLP."""
        s, h, tokens = self.settings.dtype_bytes, self.shape.hidden, self.settings.tokens
        g = self.groups
        stream = 5 * h  # the layer's input, x, x2, normed, output
        return tokens * s * (stream + g["gate_up"].n + g["gate_up"].border + g["down"].k + g["down"].border)

    def workspace(self, dequantized: int = 0) -> int:
        """Workspace: one buffer for gate and up, one for the largest of the others; made when first needed.

        `dequantized`: bytes of the weights that stay in 16 bits; where all do, nothing asks for a buffer.
        """
        if self.settings.fp8 or dequantized >= self.dequantized():
            return 0
        sizes = {role: group.extended * self.settings.dtype_bytes for role, group in self.groups.items()}
        return sizes.pop("gate_up") + max(sizes.values())

    def e4m3(self) -> int:
        """Bytes of all weights as resident e4m3 copies."""
        each = sum(group.e4m3(self.settings.dtype_bytes) for group in self.groups.values())
        return each * self.shape.layers

    def dequantized(self) -> int:
        """Bytes of all weights as resident 16-bit copies (fuse's resident_bytes)."""
        per_layer = sum(group.extended for group in self.groups.values())
        return per_layer * self.settings.dtype_bytes * self.shape.layers
