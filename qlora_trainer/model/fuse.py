"""The fast path: a PEFT model's own weights and adapters, run by hand-made functions over `kernels/`.

In: a model as `load` and `lora` left it. Out: `forward(batch) -> loss sum` with the reference's
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
from qlora_trainer.kernels import pick

from .forward import ReferenceForward
from .fused.decoder import FusedForward, ModuleLayer
from .fused.graph import GraphedMicroStep
from .fused.head import FusedHead, ModuleHead
from .fused.keep import ON_HOST, POLICIES, RECOMPUTED, HostStore
from .fused.layer import FusedLayer
from .fused.parts import LayerParts
from .fused.projection import Projection, Workspace
from .fused.projection_fp8 import Fp8Projection
from .fused.recognise import FAMILIES, Declined, Rotary, layer_type_of, norm_of, recognise, window_of

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
        result, last, first, previous = [f"kernels: {self.kernels}"], "", "", ""
        for name, line in [*self.modules.items(), ("", "")]:
            if line != last:
                if last:
                    result.append(
                        f"{first}: {last}" if first == previous else f"{first} … {previous}: {last}"
                    )
                first, last = name, line
            previous = name
        return result


def _causal(model: Any) -> Any:
    """The causal LM under PEFT's wrappers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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
    mlp_rows: int = 4096,
    logits_bytes: int | None = None,
) -> tuple[FusedForward | ReferenceForward, FuseReport]:
    """Builds the fast forward of `model`, in training mode.

    Args:
        activations: a policy of `fused/keep.py` for all layers, or one a layer.
        base_gemm: "bf16" (the compute dtype) or "fp8": row-scaled e4m3 products on Hopper and Ada;
            on a CPU the same numbers, slowly.
        resident_bytes: device memory for dequantized copies of the base, filled layer by layer; None
            for all of it on a CPU and nothing on a GPU. fp8 always keeps its e4m3 copies.
        embeddings: "device", or "host" to keep an untied embedding table in pinned memory.
        mlp_rows: tokens of the MLP in flight at once in layers that recompute it.
        logits_bytes: size of a chunk of logits; None for 512 MiB on a GPU and 64 MiB on a CPU.

    Raises:
        ConfigError: a policy or a precision this machine or model cannot follow.
    """
    causal = _causal(model)
    config = causal.config
    embed = causal.get_input_embeddings()
    device, dtype = embed.weight.device, embed.weight.dtype
    operations, reason = pick(device)
    report = FuseReport(kernels=reason)
    if config.model_type not in FAMILIES:
        report.fused = False
        report.modules["model"] = (
            f"reference: model type {config.model_type} is not one of the fast path's families"
        )
        return ReferenceForward(model), report

    decoder = causal.model
    modules: list[Any] = list(decoder.layers)
    policies = _policies(activations, len(modules))
    workspace = Workspace(device, dtype)
    if base_gemm not in ("bf16", "fp8"):
        raise ConfigError(f"train.base_gemm={base_gemm!r}: give bf16 or fp8")
    if base_gemm == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError("train.base_gemm=fp8 needs an Ada or Hopper GPU; set train.base_gemm=bf16")
    make = Fp8Projection if base_gemm == "fp8" else Projection
    host = HostStore(device) if {*policies} & {*ON_HOST} and device.type == "cuda" else None

    layers: list[FusedLayer | ModuleLayer] = []
    parts_of: list[LayerParts] = []
    layer_types: list[str | None] = []
    for i, (module, policy) in enumerate(zip(modules, policies, strict=True)):
        name = f"layers.{i}"
        try:
            parts = recognise(module, name, config, operations, workspace, make)
        except Declined as why:
            layer_type = layer_type_of(module, module.self_attn)
            recompute = policy in (*RECOMPUTED, *ON_HOST)
            layers.append(ModuleLayer(module, layer_type, window_of(module.self_attn, config), recompute))
            layer_types.append(layer_type)
            report.modules[name] = f"reference: {why}"
            continue
        layers.append(FusedLayer(i, parts, operations, policy, host, mlp_rows))
        parts_of.append(parts)
        layer_types.append(parts.layer_type)
        report.modules[name] = f"fused, activations {policy}" + (
            " (kept where they are: no GPU)" if policy in ON_HOST and host is None else ""
        )
    everything = base_gemm == "fp8" or (device.type == "cpu" and resident_bytes is None)
    report.resident_bytes = _make_resident(parts_of, float("inf") if everything else resident_bytes or 0)
    report.workspace_bytes = workspace.nbytes
    report.activations = policies
    border = parts_of[-1].down.border if parts_of else 0
    chunk = logits_bytes or (512 << 20 if device.type == "cuda" else 64 << 20)
    head = _head(causal, decoder, operations, chunk, border, report)
    on_host = _embeddings_on_host(causal, embed, embeddings, report)
    rotary = Rotary(decoder.rotary_emb, layer_types)
    return FusedForward(device, workspace, embed, on_host, rotary, layers, head, host), report


def _make_resident(parts_of: list[LayerParts], left: float) -> int:
    """Dequantizes once, as far as `left` bytes go; returns the bytes taken."""
    taken = 0
    for parts in parts_of:
        for projection in parts.projections:
            size = projection.resident_nbytes
            if size <= left:
                projection.make_resident()
                left -= size
                taken += size
    return taken


def _head(
    causal: Any, decoder: Any, operations: Any, chunk: int, border: int, report: FuseReport
) -> FusedHead | ModuleHead:
    lm_head = causal.get_output_embeddings()
    softcap = getattr(causal.config, "final_logit_softcapping", None)
    try:
        if type(lm_head) is not nn.Linear or getattr(lm_head, "bias", None) is not None:
            raise Declined(f"it is a {type(lm_head).__name__}")
        if lm_head.weight.requires_grad:
            raise Declined("it is trained")
        norm = norm_of(decoder.norm)
    except Declined as why:
        report.modules["lm_head"] = f"reference in chunks: {why}"
        return ModuleHead(decoder.norm, lm_head, softcap, causal.config.vocab_size, chunk)
    report.modules["lm_head"] = "fused: norm, logits and cross-entropy of supervised positions in chunks"
    return FusedHead(norm, lm_head.weight.detach(), softcap, operations, chunk, border)


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
