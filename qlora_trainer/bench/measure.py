"""Times optimizer steps of one cell, with peak memory and a breakdown by kernel.

Time is device time between events around a whole step (all micro-batches, clipping, update),
median of `repeats`, or of fewer where a step is long; memory is PyTorch's own peak, fixed costs included.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.fuse import FuseReport, GraphedMicroStep, fuse
from qlora_trainer.model.fused.decoder import FusedForward
from qlora_trainer.objectives.sft import sft
from qlora_trainer.optim.adamw import AdamW

from .cells import Cell, make_batch

# a kernel belongs to the first line that one of its marks occurs in
KINDS: list[tuple[str, tuple[str, ...]]] = [
    ("attention", ("flash", "fmha", "sdpa", "attention", "cudnn_generated", "mha")),
    ("adapter gradients", ("_adapter_grad", "splitK", "splitk")),
    ("dropout", ("_dropped_",)),
    ("dequantization", ("_dequantize_kernel", "_pack_kernel")),
    ("norms", ("_rms_norm",)),
    ("gated unit", ("_glu_",)),
    ("rotation", ("_rotary_",)),
    ("cross-entropy", ("_cross_entropy",)),
    ("fp8 quantization", ("_quantize_fp8",)),
    ("products", ("gemm", "nvjet", "cutlass", "xmma", "sm90", "gemv", "cublas")),
    ("copies", ("memcpy", "copy", "Memcpy", "memset", "Memset", "Fill", "index")),
    ("optimizer", ("adam", "Adam")),
]

ENOUGH = 30.0  # seconds of timed steps: long ones are repeated less, though never only once


@dataclass(frozen=True)
class Result:
    """tokens_s counts every token, non_pad_s those of documents, supervised_s those with a label."""

    cell: str
    step_s: float
    tokens_s: float
    non_pad_s: float
    supervised_s: float
    allocated_gib: float
    reserved_gib: float
    first_step_s: float
    loss: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Breakdown:
    """Device milliseconds of a step: by kind of kernel, and (name, launches, milliseconds) of each kernel."""

    kinds: dict[str, float]
    kernels: list[tuple[str, int, float]]


class Bench:
    """One model, one optimizer, many cells. `model`: a PEFT model on a CUDA device."""

    def __init__(self, model: nn.Module, vocabulary: int, learning_rate: float = 2e-4) -> None:
        self.model, self.vocabulary, self.learning_rate = model.train(), vocabulary, learning_rate
        self.device = next(model.parameters()).device
        self.optimizer = AdamW(model.named_parameters(), state_bits=32, paged=False)
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def step_of(self, cell: Cell, seed: int = 0) -> tuple[Callable[[], torch.Tensor], list[int], FuseReport]:
        """(one optimizer step, [tokens, non-pad, supervised] of it, what was fused)."""
        forward, report = fuse(
            self.model, activations=cell.activations, base_gemm=cell.base_gemm,
            resident_bytes=cell.resident_bytes, embeddings=cell.embeddings, logits_bytes=cell.logits_bytes,
        )  # fmt: skip
        if not isinstance(forward, FusedForward):
            raise ConfigError(f"bench measures the fast path: {'; '.join(report.lines())}")
        generator = torch.Generator().manual_seed(seed)
        batches = [make_batch(cell, self.vocabulary, generator) for _ in range(cell.accumulation)]
        counts = [
            sum(b.input_ids.numel() for b in batches),
            sum(b.n_tokens for b in batches),
            sum(b.n_supervised for b in batches),
        ]
        scale = 1.0 / counts[2]
        if cell.graph:
            graphed = GraphedMicroStep(forward, sft, self.parameters)
            graphed.scale.fill_(scale)

        def step() -> torch.Tensor:
            total = torch.zeros((), device=self.device)
            for batch in batches:
                if cell.graph:
                    total += graphed(batch)
                else:
                    loss = sft(forward(batch))
                    (loss * scale).backward()
                    total += loss.detach()
            self.optimizer.step(self.learning_rate, 0.3)
            self.optimizer.zero_grad()
            return total * scale

        return step, counts, report

    def measure(
        self, cell: Cell, warmup: int = 3, repeats: int = 8, profile: bool = False
    ) -> tuple[Result, Breakdown | None]:
        """The result, and with `profile` where a warm step's time goes.

        Nothing of the cell outlives the call: its resident weights would count against the next one.
        """
        try:
            return self._measure(cell, warmup, repeats, profile)
        finally:
            gc.collect()  # captured graphs and autograd's nodes refer to each other
            torch.cuda.empty_cache()

    def _measure(
        self, cell: Cell, warmup: int, repeats: int, profile: bool
    ) -> tuple[Result, Breakdown | None]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        step, counts, _ = self.step_of(cell)
        step()
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        affordable = max(2, int(ENOUGH / (time.perf_counter() - start)))
        for _ in range(min(warmup, affordable // 2) - 1):
            loss = step()
        events = []
        for _ in range(min(repeats, affordable)):
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            loss = step()
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize()
        seconds = statistics.median(a.elapsed_time(b) for a, b in events) / 1e3
        result = Result(
            cell=cell.name,
            step_s=seconds,
            tokens_s=counts[0] / seconds,
            non_pad_s=counts[1] / seconds,
            supervised_s=counts[2] / seconds,
            allocated_gib=torch.cuda.max_memory_allocated() / 2**30,
            reserved_gib=torch.cuda.max_memory_reserved() / 2**30,
            first_step_s=first,
            loss=float(loss),
        )
        return result, breakdown(step) if profile else None


def breakdown(step: Callable[[], torch.Tensor]) -> Breakdown:
    """Where the device time of one warm step goes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kinds: dict[str, float] = defaultdict(float)
    kernels = []
    for event in profile.key_averages():
        milliseconds = event.self_device_time_total / 1e3
        if milliseconds <= 0:
            continue
        kind = next((k for k, marks in KINDS if any(mark in event.key for mark in marks)), "other")
        kinds[kind] += milliseconds
        kernels.append((event.key, event.count, milliseconds))
    ordered = dict(sorted(kinds.items(), key=lambda kv: -kv[1]))
    return Breakdown(ordered, sorted(kernels, key=lambda kernel: -kernel[2]))


def matrix_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16, n: int = 8192) -> float:
    """FLOP/s of a large product on random values: the ceiling to compare with."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(20):
        a @ b
    stop.record()
    torch.cuda.synchronize()
    return 20 * 2 * n**3 / (start.elapsed_time(stop) / 1e3)


def model_flops(model: Any, config: Any, length: float) -> float:
    """FLOPs a token needs without recomputation and without gradients of frozen weights.

    4·N_lin + 4·V·h + 3.5·A + 6·P_lora with A = 2·length·heads·head width·layers (causal attention).
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = model.get_output_embeddings()
    linear = sum(
        m.in_features * m.out_features
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m is not head and "lora_" not in name and not m.weight.requires_grad
    )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * length * config.num_attention_heads * width * config.num_hidden_layers
    return 4 * linear + 4 * config.vocab_size * config.hidden_size + 3.5 * attention + 6 * trainable
