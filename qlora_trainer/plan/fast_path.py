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
    """Four activation policies, from the fastest to the smallest."""

    policies: tuple[str, ...] = ("none", "mlp", "full", "offload")

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
            "offload": full + rest - self._wide(),
        }
        return self.settings.tokens * per_token[policy]

    def _wide(self) -> int:
        """Bytes a token that travel to the host under `offload` (`keep._WIDE`)."""
        if self.settings.device == "cpu":
            return 0  # they are there
        s, h = self.settings.dtype_bytes, self.shape.hidden
        streams = 4 if self.shape.norms == 4 else 2  # x, x2, and the branches' outputs before their norms
        return s * (streams * h + self.groups["qkv"].n + self.shape.q)

    def on_host(self, policy: str) -> int:
        return self.settings.tokens * self._wide() if policy == "offload" else 0

    def in_flight(self, policies: Sequence[str]) -> int:
        """What still leaves for the host when the head runs: the last two layers (`HostStore.put`)."""
        return sum(self.on_host(policy) for policy in policies[-2:])

    def repeats(self, policy: str) -> str:
        """What of a layer's forward pass runs twice; the down projection never does."""
        return {"none": "nothing", "mlp": "gate_up", "offload": "gate_up", "full": "all but down"}[policy]

    def work(self, policy: str) -> int:
        """What one layer's backward pass needs beside what is kept: the wider of its two halves."""
        s, h, q, tokens = self.settings.dtype_bytes, self.shape.hidden, self.shape.q, self.settings.tokens
        g = self.groups
        f, qkv = g["down"].k, g["qkv"].n
        again = 0
        if policy == "full":  # FusedLayer.recompute: all of `mlp`'s tensors, from x
            again = self.kept("mlp") - self.kept("full")
        elif policy == "offload":  # this layer's tensors back on the device, and those of the one below
            again = 2 * tokens * self._wide()
        incoming = tokens * s * (h + g["down"].border)  # gradient of the layer's output
        e4m3_down = g["down"].n + g["down"].pad if g["down"].fp8 else 0  # operands of the two products
        e4m3_up = g["gate_up"].n + (1 + s) * g["gate_up"].pad if g["gate_up"].fp8 else 0
        if policy == "none":
            # gradients of the normed input and of the inner activation
            mlp = tokens * (s * h + max(s * f + e4m3_down, e4m3_up))
            freed = tokens * s * (g["gate_up"].n + g["gate_up"].border)
        else:
            rows = min(tokens, MLP_ROWS)
            inner = (h + g["gate_up"].border) + (g["gate_up"].n + g["gate_up"].border) + f
            mlp = tokens * s * h + rows * (s * inner + e4m3_down)
            freed = 0
        # d_x2, d_attended, dq dk dv, and cuDNN's float32 dq
        attention = tokens * (s * (h + g["o"].border + q + qkv) + 4 * q) - freed
        return again + incoming + max(mlp, attention)

    def head(self, *, backward: bool) -> int:
        """FusedHead.losses: a chunk of logits; rows gathered, summed, normed and, trained, the gradient."""
        n = -(-self.settings.labelled // LABELS_STEP) * LABELS_STEP
        s, h, v = self.settings.dtype_bytes, self.shape.hidden, self.shape.vocab
        rows = min(n, max(1, LOGITS_BYTES[self.settings.device] // (v * s)))
        return rows * v * s + (5 if backward else 4) * n * h * s + self.settings.tokens * h * s

    def evaluation(self) -> int:
        """FusedLayer's forward pass: all of `Saved` until the layer returns, and the MLP's inner tensors."""
        s, h, tokens = self.settings.dtype_bytes, self.shape.hidden, self.settings.tokens
        g = self.groups
        stream = 6 * h + g["qkv"].n + self.shape.q  # x, delta, x2, y, normed, output
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
