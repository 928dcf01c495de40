"""Times optimizer steps of one cell, with peak memory and a breakdown by kernel.

Time is device time between events around a whole step (all micro-batches, clipping, update),
median of `repeats`; memory is PyTorch's own peak, fixed costs included.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from qlora_trainer.model.fuse import FuseReport, GraphedMicroStep, fuse
from qlora_trainer.optim.adamw import AdamW

from .cells import Cell, make_batch

# a kernel belongs to the first line that one of its marks occurs in
KINDS: list[tuple[str, tuple[str, ...]]] = [
    ("attention", ("flash", "fmha", "sdpa", "attention", "cudnn_generated", "mha")),
    ("thin products", ("_thin_", "splitK", "splitk")),
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
            self.model, activations=cell.activations, base_gemm=cell.base_gemm, resident_bytes=cell.resident_bytes,
            embeddings=cell.embeddings, mlp_rows=cell.mlp_rows, logits_bytes=cell.logits_bytes,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        batches = [make_batch(cell, self.vocabulary, generator) for _ in range(cell.accumulation)]
        counts = [
            sum(b.input_ids.numel() for b in batches),
            sum(b.n_tokens for b in batches),
            sum(b.n_supervised for b in batches),
        ]
        scale = 1.0 / counts[2]
        if cell.graph:
            graphed = GraphedMicroStep(forward, self.parameters)
            graphed.scale.fill_(scale)

        def step() -> torch.Tensor:
            total = torch.zeros((), device=self.device)
            for batch in batches:
                if cell.graph:
                    total += graphed(batch)
                else:
                    loss = forward(batch)
                    (loss * scale).backward()
                    total += loss.detach()
            self.optimizer.step(self.learning_rate, 0.3)
            self.optimizer.zero_grad()
            return total * scale

        return step, counts, report

    def measure(self, cell: Cell, warmup: int = 3, repeats: int = 8) -> tuple[Result, Callable[[], torch.Tensor]]:
        """The result, and the warm step for whoever wants to profile it."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        step, counts, _ = self.step_of(cell)
        step()
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        torch.cuda.reset_peak_memory_stats()
        for _ in range(warmup):
            loss = step()
        events = []
        for _ in range(repeats):
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            loss = step()
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize()
        seconds = statistics.median(a.elapsed_time(b) for a, b in events) / 1e3
        rates = [count / seconds for count in counts]
        result = Result(
            cell.name, seconds, *rates, torch.cuda.max_memory_allocated() / 2**30,
            torch.cuda.max_memory_reserved() / 2**30, first, float(loss),
        )  # fmt: skip
        return result, step


def breakdown(step: Callable[[], torch.Tensor]) -> tuple[dict[str, float], list[tuple[str, int, float]]]:
    """Device milliseconds of one step by kind, and by kernel (name, launches, milliseconds)."""
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
    return dict(sorted(kinds.items(), key=lambda kv: -kv[1])), sorted(kernels, key=lambda k: -k[2])


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
