"""The fast path: a PEFT model's own weights and adapters, run by hand-made functions over `kernels/`.

In: a model as `load` and `lora` left it. Out: `forward(batch) -> TokenNll` with the reference's
meaning (`forward.py`), and a report of what was fused and what was not, with the reason. Modules
are neither replaced nor patched: checkpoints and exports do not know which path ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.errors import ConfigError
from qlora_trainer.kernels import Operations, pick

from .forward import ReferenceForward
from .fused.activations import ON_HOST, POLICIES, RECOMPUTED, HostStore
from .fused.bind import bind, bind_norm
from .fused.decoder import FusedForward, ModuleLayer
from .fused.describe import describe_model, layer_type_of, window_of
from .fused.graph import GraphedMicroStep
from .fused.head import CHUNK_BYTES, FusedHead, ModuleHead
from .fused.layer import FusedLayer
from .fused.mlp import TOKENS_AT_ONCE
from .fused.projection import Projection
from .fused.projection_fp8 import Fp8Projection
from .fused.rotary import Rotary
from .fused.spec import Declined, HeadSpec, drawn_together
from .fused.workspace import Workspace
from .layers import causal_of

__all__ = ["FuseReport", "GraphedMicroStep", "fuse"]


@dataclass
class FuseReport:
    """What runs how. `modules`: name -> one line; `fused`: whether the decoder runs by hand at all."""

    kernels: str
    modules: dict[str, str] = field(default_factory=dict)
    fused: bool = True
    resident_bytes: int = 0
    workspace_bytes: int = 0
    activations: list[str] = field(default_factory=list)

    @property
    def fallbacks(self) -> dict[str, str]:
        return {name: line for name, line in self.modules.items() if line.startswith("reference")}

    def lines(self) -> list[str]:
        """For the log: equal lines of neighbouring layers are drawn together."""
        return [f"kernels: {self.kernels}", *drawn_together(self.modules)]


def _policies(activations: str | Sequence[str], n: int) -> list[str]:
    found = [activations] * n if isinstance(activations, str) else list(activations)
    if len(found) != n or any(policy not in POLICIES for policy in found):
        raise ConfigError(
            f"train.activations={activations!r}: give one of {', '.join(POLICIES)}, "
            f"or one for each of {n} layers"
        )
    return found


def fuse(
    model: nn.Module,
    *,
    activations: str | Sequence[str] = "none",
    base_gemm: str = "bf16",
    resident_bytes: int | None = None,
    embeddings: str = "device",
    tokens_at_once: int = TOKENS_AT_ONCE,
    logits_bytes: int | None = None,
) -> tuple[FusedForward | ReferenceForward, FuseReport]:
    """Builds the fast forward of `model`, in training mode.

    Args:
        activations: a policy of `fused/activations.py` for all layers, or one a layer.
        base_gemm: "bf16" (the compute dtype) or "fp8": row-scaled e4m3 products on Hopper and Ada;
            on a CPU the same numbers, slowly.
        resident_bytes: device memory for dequantized copies of the base, filled layer by layer; None
            for all of it on a CPU and nothing on a GPU. fp8 always keeps its e4m3 copies.
        embeddings: "device", or "host" to keep an untied embedding table in pinned memory.
        tokens_at_once: of the MLP, in layers that recompute it.
        logits_bytes: size of a chunk of logits; None for the device's own (`head.CHUNK_BYTES`).

    Raises:
        ConfigError: a policy or a precision this machine or model cannot follow.
    """
    causal: Any = causal_of(model)
    spec = describe_model(model)
    embed = causal.get_input_embeddings()
    device, dtype = embed.weight.device, embed.weight.dtype
    operations, reason = pick(device)
    if spec.declined is not None:
        return ReferenceForward(model), FuseReport(reason, spec.modules(str), fused=False)

    decoder = causal.model
    policies = _policies(activations, len(spec.layers))
    workspace = Workspace(device, dtype)
    if base_gemm not in ("bf16", "fp8"):
        raise ConfigError(f"train.base_gemm={base_gemm!r}: give bf16 or fp8")
    if base_gemm == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError("train.base_gemm=fp8 needs an Ada or Hopper GPU; set train.base_gemm=bf16")
    make = Fp8Projection if base_gemm == "fp8" else Projection
    host = HostStore(device) if {*policies} & {*ON_HOST} and device.type == "cuda" else None

    layers: list[FusedLayer | ModuleLayer] = []
    on_path: list[FusedLayer] = []
    layer_types: list[str | None] = []
    for i, (described, policy) in enumerate(zip(spec.layers, policies, strict=True)):
        module: Any = decoder.layers[i]
        if isinstance(described, Declined):
            layer_type = layer_type_of(module, module.self_attn)
            recompute = policy in (*RECOMPUTED, *ON_HOST)
            window = window_of(module.self_attn, causal.config)
            layers.append(ModuleLayer(module, layer_type, window, recompute))
            layer_types.append(layer_type)
            continue
        parts = bind(described, module, operations, workspace, make)
        on_path.append(FusedLayer(i, parts, operations, policy, host, tokens_at_once))
        layers.append(on_path[-1])
        layer_types.append(described.layer_type)

    def fused(i: int) -> str:
        where = " (kept where they are: no GPU)" if policies[i] in ON_HOST and host is None else ""
        return f"fused, activations {policies[i]}{where}"

    report = FuseReport(reason, spec.modules(fused), activations=policies)
    everything = base_gemm == "fp8" or (device.type == "cpu" and resident_bytes is None)
    report.resident_bytes = _make_resident(on_path, float("inf") if everything else resident_bytes or 0)
    report.workspace_bytes = workspace.nbytes
    border = on_path[-1].mlp.parts.down.size.border if on_path else 0
    chunk = logits_bytes or CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])
    head = _head(causal, spec.head, operations, chunk, border)
    on_host = _embeddings_on_host(causal, embed, embeddings, report)
    rotary = Rotary(decoder.rotary_emb, layer_types)
    modules = ReferenceForward(model)
    return FusedForward(workspace, embed, on_host, rotary, layers, head, host, modules), report


def _make_resident(layers: list[FusedLayer], left: float) -> int:
    """Dequantizes once, as far as `left` bytes go; returns the bytes taken."""
    taken = 0
    for layer in layers:
        for projection in layer.projections:
            size = projection.resident_nbytes
            if size <= left:
                projection.make_resident()
                left -= size
                taken += size
    return taken


def _head(
    causal: Any, spec: HeadSpec | Declined, operations: Operations, chunk: int, border: int
) -> FusedHead | ModuleHead:
    head = causal.get_output_embeddings()
    if isinstance(spec, Declined):
        softcap = getattr(causal.config, "final_logit_softcapping", None)
        return ModuleHead(causal.model.norm, head, softcap, causal.config.vocab_size, chunk)
    norm = bind_norm(spec.norm, causal.model)
    return FusedHead(norm, head.weight.detach(), spec.softcap, operations, chunk, border)


def _embeddings_on_host(causal: Any, embed: Any, where: str, report: FuseReport) -> Tensor | None:
    if where == "device":
        return None
    if where != "host":
        raise ConfigError(f"embeddings={where!r}: give device or host")
    head = causal.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is embed.weight
    if tied or embed.weight.requires_grad or hasattr(embed, "embed_scale"):
        report.modules["embed_tokens"] = "on the device: tied, trained or scaled"
        return None
    if embed.weight.device.type == "cuda":
        embed.weight.data = embed.weight.data.to("cpu").pin_memory()
    report.modules["embed_tokens"] = "in host memory: its rows travel with each micro-batch"
    return embed.weight.detach()
