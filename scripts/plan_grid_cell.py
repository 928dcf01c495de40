"""One cell of `scripts/plan_grid`: a real training step, planned, run as planned, and measured.

In: a `Cell`. Out: its `RunPlan` and what it took. On a CPU everything runs on shapes of a few hundred
thousand parameters and no memory is counted: a rehearsal of the grid.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import CONFIG_MAPPING

from qlora_trainer.bench.cells import Cell as BatchCell
from qlora_trainer.bench.cells import make_batch
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model.forward import ReferenceForward
from qlora_trainer.model.fuse import GraphedMicroStep, fuse
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.model.offload import StreamedWeights, offload_layers
from qlora_trainer.model.synthetic import random_base
from qlora_trainer.objectives.sft import sft
from qlora_trainer.optim import make_optimizer
from qlora_trainer.plan import hardware
from qlora_trainer.plan.architecture import Architecture
from qlora_trainer.plan.hardware import GIB
from qlora_trainer.plan.plan import RunPlan, make_plan
from qlora_trainer.plan.settings import DataFacts
from qlora_trainer.train.job import MicroStep

LONGEST = 0  # as a cell's length: the longest that the plan says fits
FURTHEST = 1 << 20  # tokens: as far as it looks
WARM_UP = 2  # steps: kernels compile in the first, a graph is captured in the second
MANY_SECONDS = 30.0  # a step that is planned to take longer is measured once


def llama(h: int, f: int, layers: int, heads: int, kv: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": h, "intermediate_size": f, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab,
        "max_position_embeddings": 1 << 20,
    }  # fmt: skip


SHAPES = {
    "Llama-2-7B": llama(4096, 11008, 32, 32, 32, 32000),
    "Llama-3-8B": llama(4096, 14336, 32, 32, 8, 128256),
    "Llama-2-13B": llama(5120, 13824, 40, 40, 40, 32000),
    "Llama-1-65B": llama(8192, 22016, 80, 64, 64, 32000),
    "Llama-3-70B": llama(8192, 28672, 80, 64, 8, 128256),
}
TINY = llama(128, 320, 3, 4, 2, 512)


@dataclass(frozen=True)
class Cell:
    """`keys` are what a recipe would set; `cap`: GiB that the process may allocate, context included."""

    shape: str
    r: int
    rows: int
    length: int
    activations: str = "auto"
    cap: float | None = None
    keys: dict[str, object] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        extra = "".join(f" {key.split('.')[1]}={value}" for key, value in self.keys.items())
        cap = f" in {self.cap:g} GiB" if self.cap else ""
        length = self.length or "longest"
        return f"{self.shape} r={self.r} {self.rows}x{length} {self.activations}{extra}{cap}"

    def config(self) -> RunConfig:
        config = RunConfig(output_dir="unused")
        config.lora.r = self.r
        config.train.per_device_train_batch_size = self.rows
        config.train.max_length = self.length
        config.train.gradient_accumulation_steps = 1
        config.train.activations = self.activations
        config.evaluate.enabled = False
        for key, value in self.keys.items():
            section, name = key.split(".")
            setattr(getattr(config, section), name, value)
        return config


@dataclass(frozen=True)
class Measured:
    """Bytes and seconds of one cell; `reserved` is what PyTorch took from the device."""

    allocated: int
    reserved: int
    seconds: float
    update: float
    loss: float


class Device:
    """A GPU and its counters; or the CPU, where sizes are tiny and nothing is counted."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.counted = name == "cuda"
        if self.counted:
            # Without it up to a fifth of the memory is lost between blocks whose sizes change.
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")

    def shape(self, name: str) -> dict[str, Any]:
        return SHAPES[name] if self.counted else TINY

    def small(self, cell: Cell) -> Cell:
        """The cell as it is rehearsed."""
        return cell if self.counted else replace(cell, length=cell.length // 32, cap=None)

    def wait(self) -> None:
        if self.counted:
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Frees whatever nothing refers to."""
        gc.collect()
        if self.counted:
            torch.cuda.synchronize()
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            torch._C._host_emptyCache()  # pinned memory of one cell is no use to the next

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.counted else 0

    def limit(self, size: float | None) -> None:
        """What PyTorch may take from the device from now on; None: all."""
        if self.counted:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(1.0 if size is None else size / total)

    def reset_peak(self) -> None:
        if self.counted:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> tuple[int, int]:
        return (
            (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if self.counted else (0, 0)
        )


class Room:
    """Keeps one base model while cells of its shape and rank follow each other.

    `bytes`: what it takes; anything more between two cells was left behind by the first.
    """

    def __init__(self, device: Device) -> None:
        self.device, self.holds, self.model, self.bytes = device, "", None, 0

    def base(self, shape: str, r: int) -> Any:
        """A PEFT model of `shape`; the base is made anew for every cell that changes shape or rank."""
        key = f"{shape}, r={r}"
        if key != self.holds:
            self.empty()
            config = CONFIG_MAPPING["llama"](**self.device.shape(shape))
            dtype = torch.bfloat16 if self.device.counted else torch.float32
            base = random_base(config, self.device.device, dtype=dtype)
            with self.device.device:  # adapters of 65B take half a minute to draw on a CPU
                self.model = attach(base, LoraOptions(r=r, lora_alpha=16), seed=0).train()
            self.device.clear()
            self.holds, self.bytes = key, self.device.allocated()
        return self.model

    def empty(self) -> None:
        self.holds, self.model = "", None
        self.device.clear()
        self.bytes = self.device.allocated()

    def left_behind(self) -> int:
        """Bytes on the device beside the base, of which some may have moved to the host."""
        self.device.clear()
        return max(0, self.device.allocated() - self.bytes)


def plan_of(cell: Cell, device: Device) -> tuple[Cell, RunPlan]:
    """The cell with its length settled, and the plan of it."""
    if cell.length:
        return cell, _plan(cell, device)
    step = 256 if device.counted else 8
    low, high = 1, (FURTHEST if device.counted else 256) // step
    while high - low > 1:
        middle = (low + high) // 2
        fits = _plan(replace(cell, length=middle * step), device).fits
        low, high = (middle, high) if fits else (low, middle)
    found = replace(cell, length=low * step)
    return found, _plan(found, device)


def _plan(cell: Cell, device: Device) -> RunPlan:
    machine = hardware.detect(device.device.type, Path())
    if cell.cap is not None:
        machine = replace(machine, memory=int(cell.cap * GIB))
    tokens = cell.rows * cell.length
    facts = DataFacts(documents=cell.rows, tokens=tokens, supervised=tokens - cell.rows, longest=cell.length)
    return make_plan(cell.config(), machine, Architecture(device.shape(cell.shape)), facts)


def steps_of(plan: RunPlan, steps: int) -> int:
    """Steps that run: `steps` after those that warm up, or one long one."""
    return 1 if (plan.seconds_per_step or 0.0) > MANY_SECONDS else WARM_UP + steps


def measure(cell: Cell, plan: RunPlan, room: Room, steps: int) -> Measured:
    """Run the cell as planned, under its cap."""
    device, config = room.device, cell.config()
    device.limit(None)
    model = room.base(cell.shape, cell.r)
    if plan.offload == "layers":
        offload_layers(model, model.get_base_model().model.layers, device.device)
        device.clear()
    if cell.cap is not None:  # the context is outside PyTorch's allocator
        device.limit(cell.cap * GIB - plan.peak.parts["context"])
    if plan.offload != "none":
        room.holds = ""  # the next cell needs its base on the device again
    forward = forward_of(model, plan, config.train.base_gemm)
    optimizer = make_optimizer(
        config.optim.name, model.named_parameters(), resident_bytes=plan.optimizer_resident
    )
    batch = make_batch(
        BatchCell("", cell.rows, cell.length),
        device.shape(cell.shape)["vocab_size"],
        torch.Generator().manual_seed(0),
    )
    step: MicroStep | GraphedMicroStep = MicroStep(forward, sft, device.device)
    if plan.graphs:
        step = GraphedMicroStep(forward, sft, [p for p in model.parameters() if p.requires_grad])
    if plan.path == "reference":
        batch = batch.to(device.device)
    step.scale.fill_(1.0 / batch.n_supervised)
    times, updates = [], []
    device.reset_peak()
    while len(times) < steps_of(plan, steps):
        device.wait()
        started = time.perf_counter()
        loss = step(batch)
        device.wait()
        middle = time.perf_counter()
        optimizer.step(1e-4, 0.3)
        optimizer.zero_grad()
        device.wait()
        times.append(time.perf_counter() - started)
        updates.append(time.perf_counter() - middle)
    warm = slice(WARM_UP, None) if len(times) > WARM_UP else slice(None)
    seconds, update = statistics.median(times[warm]), statistics.median(updates[warm])
    result = Measured(*device.peak(), seconds, update, float(loss * step.scale))
    optimizer.gradients.detach()
    return result


def forward_of(model: Any, plan: RunPlan, base_gemm: str) -> Callable[..., torch.Tensor]:
    base = model.get_base_model()
    if plan.path == "reference":
        if plan.policies[0] == "full":
            base.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            base.gradient_checkpointing_disable()
        return ReferenceForward(model)
    base.gradient_checkpointing_disable()
    forward, report = fuse(
        model,
        activations=list(plan.policies),
        base_gemm=base_gemm,
        resident_bytes=plan.dequantized,
        embeddings="device" if plan.offload == "none" else "host",
    )
    assert report.fused and not report.fallbacks, report.fallbacks
    if plan.offload == "layers":
        StreamedWeights(forward)  # its weights hold on to it
    return forward
