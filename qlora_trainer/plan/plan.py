"""RunConfig, hardware and model -> RunPlan: will it fit, how, and how long will it take.

Pure and quick: nothing is loaded, no device is touched. `check` is what a run calls before loading.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError
from qlora_trainer.plan import memory
from qlora_trainer.plan import settings as settings_module
from qlora_trainer.plan.architecture import Architecture
from qlora_trainer.plan.changes import Change, cheapest
from qlora_trainer.plan.choose import Choice
from qlora_trainer.plan.decide import decide
from qlora_trainer.plan.hardware import GIB, Hardware
from qlora_trainer.plan.micro_batch import divisors, pick
from qlora_trainer.plan.settings import DataFacts, Settings
from qlora_trainer.plan.shapes import ModelShape
from qlora_trainer.plan.speed import token_flops

if TYPE_CHECKING:
    from qlora_trainer.model.linears import Share

MARGIN, WIDE_MARGIN = 0.05, 0.20  # of the memory prediction, for tested and for unknown architectures
HOST_MARGIN, HOST_ROUNDING = 0.20, 256 << 20  # of RAM: libraries and the allocator's holes are in it
TIME_MARGIN = 0.20
PINNED = ("offloaded weights", "optimizer pages", "offloaded activations")
PROCESS = 3 * GIB  # RAM of Python, torch and CUDA's host side
MANIFEST = 1 << 20  # JSON, tokenizer and manifest of a checkpoint


@dataclass(frozen=True)
class RunPlan:
    """Sizes in bytes, times in seconds; None where it cannot be known.

    Attributes:
        phases: peak of each phase, by part.
        path: of the layers, fast or reference, and why the latter (`model/fused/spec.py` says it for both).
        head_because: why the LM head alone runs as the reference does.
        plain_kernels_because: why the fast path runs without Triton's kernels on this GPU.
        method, share: how the base is quantized, and how much of it; None where only loading tells.
        policies: activation policy of every layer, from the first.
        optimizer_resident: optimizer bytes that stay on the device (None: all), to hand to the optimizer.
        dequantized: base weights kept in 16 bits because there is room, to hand to the fast path.
        offload: none; embeddings: their table lives on the host; layers: 4-bit layers too.
        graphs: micro-steps may run as CUDA graphs.
        host, disk: RAM and disk of the run, by part.
        merging: RAM that `export` takes to merge, weight by weight.
        tokens_per_step: of all ranks, padding included, on average.
        changes: if it does not fit, the three cheapest ways out.
    """

    hardware: Hardware
    model_type: str
    parameters: int
    trainable: int
    path: str
    reference_because: str | None
    head_because: str | None
    plain_kernels_because: str | None
    method: str
    share: Share | None
    phases: tuple[memory.Phase, ...]
    policies: tuple[str, ...]
    optimizer_resident: int | None
    dequantized: int
    offload: str
    graphs: bool
    host: dict[str, int]
    disk: dict[str, int]
    merging: int
    rows: int
    accumulation: int
    world_size: int
    length: int
    tokens_per_step: float
    steps: int | None
    seconds_per_step: float | None
    tokens_per_second: float | None
    flops_per_token: float
    margin: float
    budget: int
    fits: bool
    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    @property
    def peak(self) -> memory.Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def training_peak(self) -> int:
        """Bytes that PyTorch allocates at most until training ends: the base is compared with after that."""
        return max(phase.allocated for phase in self.phases if phase.name not in ("comparison", "merge"))

    @property
    def training_host(self) -> int:
        """Bytes of RAM that this process takes at most until training ends."""
        if self.hardware.device == "cpu":
            return self.training_peak + self.peak.parts["context"] + self.host["data"]
        return sum(self.host.values())

    @property
    def pinned(self) -> int:
        """Bytes of host memory that the device reads and writes: they cannot be swapped out."""
        return sum(self.host[part] for part in PINNED)

    @property
    def seconds(self) -> float | None:
        """The whole run, without loading and evaluation."""
        if self.steps is None or self.seconds_per_step is None:
            return None
        return self.steps * self.seconds_per_step

    def policy_summary(self) -> str:
        """`none`, or `mlp in layers 0-11, none in 12-31`."""
        runs, first = [], 0
        for policy, layers in groupby(self.policies):
            count = len(list(layers))
            runs.append((policy, first, first + count - 1))
            first += count
        if len(runs) == 1:
            return runs[0][0]
        return ", ".join(f"{policy} in layers {a}-{b}" for policy, a, b in runs)

    def to_dict(self) -> dict[str, Any]:
        """plan.json."""
        peaks = {"peak_allocated": self.training_peak, "peak_host": self.training_host}
        return dataclasses.asdict(self) | peaks


def make_plan(
    config: RunConfig,
    hardware: Hardware,
    architecture: Architecture,
    data: DataFacts | None = None,
    world_size: int = 1,
    rows: int | None = None,
) -> RunPlan:
    """The plan of one run. Without `data`, every row counts as full and every token as labelled.

    Under `train.per_device_train_batch_size=auto`, `rows` is what the run began with, if it has.

    Raises:
        ConfigError: the card cannot do what is asked, whatever its memory.
    """
    if config.train.base_gemm == "fp8" and not hardware.has_fp8:
        raise ConfigError(
            f"train.base_gemm=fp8: {hardware.name} has no e4m3 products (Ada and Hopper do): set "
            "train.base_gemm=bf16"
        )
    shape = architecture.shape(config, hardware.device)
    auto = config.train.per_device_train_batch_size == settings_module.AUTO
    if auto and rows not in divisors(config.train.gradient_accumulation_steps):
        rows = pick(config, hardware, architecture, data, world_size)
    asked = settings_module.from_config(config, hardware, shape, data, world_size, rows)
    found = decide(shape, asked, hardware)
    settings, choice, seconds = found.settings, found.choice, found.seconds
    tokens = settings.rows * settings.mean_length * settings.accumulation * world_size
    host = _host(shape, settings, choice, data, found.peak)
    enough = hardware.host_memory is None or sum(host[part] for part in PINNED) <= hardware.host_memory
    return RunPlan(
        hardware=hardware,
        model_type=shape.model_type,
        parameters=shape.parameters,
        trainable=memory.adapter_parameters(shape, settings),
        path="fast" if settings.fast else "reference",
        reference_because=settings.reference_because,
        head_because=shape.head_because if settings.chunked else None,
        plain_kernels_because=settings.plain_kernels_because,
        method=settings.method,
        share=shape.share,
        phases=found.phases,
        policies=choice.policies,
        optimizer_resident=choice.resident_state if choice.host_state else None,
        dequantized=choice.dequantized,
        offload=settings.offload,
        graphs=found.graphs,
        host=host,
        disk=_disk(shape, settings),
        merging=_merging(shape, settings),
        rows=settings.rows,
        accumulation=settings.accumulation,
        world_size=world_size,
        length=settings.length,
        tokens_per_step=tokens,
        steps=_steps(config, settings, data),
        seconds_per_step=seconds,
        tokens_per_second=tokens / seconds if seconds else None,
        flops_per_token=token_flops(shape, settings, choice.policies),
        margin=MARGIN if shape.exact and settings.plain_kernels_because is None else WIDE_MARGIN,
        budget=found.room,
        fits=found.fits and enough,
        changes=() if found.fits else cheapest(config, hardware, architecture, data, world_size, rows),
        notes=_notes(shape, settings, hardware, data, auto),
    )


def check(plan: RunPlan) -> None:
    """Refuse to load what cannot fit.

    Raises:
        ConfigError: with the numbers and the changes that would help.
    """
    if plan.fits:
        return
    peak = plan.peak
    if peak.total <= plan.budget:
        raise ConfigError(
            f"{plan.pinned / GIB:.1f} GiB of host memory would be pinned for what does not stay on "
            f"{plan.hardware.name}, and {(plan.hardware.host_memory or 0) / GIB:.1f} GiB are available: "
            "close other programs, or take a smaller model, batch or rank"
        )
    changes = "; ".join(
        f"{c.overrides} ({'' if c.fits else 'still '}{c.peak / GIB:.1f} GiB)" for c in plan.changes
    )
    raise ConfigError(
        f"the {peak.name} would need {peak.total / GIB:.1f} GiB and {plan.hardware.name} has "
        f"{plan.budget / GIB:.1f} GiB to use; the cheapest changes: {changes or 'a smaller model'}"
    )


def compare(plan: RunPlan, measured: Mapping[str, float]) -> list[str]:
    """Predicted beside measured, a line each, for the end of training; says so when the plan was off.

    Args:
        measured: of `peak_allocated` (bytes on a GPU), `peak_host` (bytes of RAM, looked at where there is
            no GPU) and `tokens_per_second` (of the median step) what is known.
    """
    lines = []
    if "peak_allocated" in measured:
        what = f"{measured['peak_allocated'] / GIB:.2f} GiB allocated, {plan.training_peak / GIB:.2f}"
        lines.append(_beside("memory", what, plan.training_peak, measured["peak_allocated"], plan.margin))
    elif "peak_host" in measured and plan.hardware.device == "cpu":
        near = abs(plan.training_host - measured["peak_host"]) < HOST_ROUNDING
        what = f"{measured['peak_host'] / GIB:.2f} GiB of RAM, {plan.training_host / GIB:.2f}"
        margin = math.inf if near else HOST_MARGIN
        lines.append(_beside("memory", what, plan.training_host, measured["peak_host"], margin))
    if "tokens_per_second" in measured and plan.tokens_per_second:
        speed = measured["tokens_per_second"]
        what = f"{speed:,.0f} tokens/s in the median step, {plan.tokens_per_second:,.0f}"
        margin = TIME_MARGIN if plan.hardware.device == "cuda" else math.inf  # others share a CPU
        lines.append(_beside("speed", what, plan.tokens_per_second, speed, margin))
    return lines


def _beside(label: str, what: str, predicted: float, measured: float, margin: float) -> str:
    error = predicted / measured - 1
    verdict = f" - the plan is off by more than {margin:.0%}" if abs(error) > margin else ""
    return f"{label:<8} {what} planned ({error:+.1%}){verdict}"


def _host(
    shape: ModelShape, settings: Settings, choice: Choice, data: DataFacts | None, peak: int
) -> dict[str, int]:
    """RAM by part; on a CPU everything is in `peak` but the data."""
    if settings.device == "cpu":
        return {**dict.fromkeys(PINNED, 0), "run": peak, "data": 16 * data.tokens if data else 0}
    trained = memory.adapter_parameters(shape, settings)
    largest = max((x.numel for x in shape.linears), default=0)
    path = memory.path_of(shape, settings)
    in_flight = memory.state_bytes(trained, settings.state_bits) + settings.adapter_bytes * trained
    return {
        "process": PROCESS + memory.TOKENIZER * shape.vocab,
        "loading or saving": max(2 * max(largest, shape.embedding) * settings.dtype_bytes, in_flight),
        "offloaded weights": _offloaded(shape, settings),
        "optimizer pages": choice.host_state,
        "offloaded activations": sum(path.on_host(policy) for policy in choice.policies),
        "data": 16 * data.tokens if data else 0,
    }


def _offloaded(shape: ModelShape, settings: Settings) -> int:
    codes = memory.layer_codes(shape, settings) // shape.layers if settings.offload == "layers" else 0
    table = settings.dtype_bytes * shape.embedding if settings.offload != "none" and shape.head else 0
    return shape.layers * _pinned(codes) + _pinned(table)


def _pinned(size: int) -> int:
    """What PyTorch's allocator takes for `size` bytes of pinned memory: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def _merging(shape: ModelShape, settings: Settings) -> int:
    """A weight in float32, its update and their sum (`export/merge.py`), the adapter, and the process."""
    widest = max((x.numel for x in shape.linears), default=0)
    piece = 4 * max(3 * widest, 2 * shape.embedding)
    return memory.CONTEXT["cpu"] + piece + settings.adapter_bytes * memory.adapter_parameters(shape, settings)


def _disk(shape: ModelShape, settings: Settings) -> dict[str, int]:
    trained = memory.adapter_parameters(shape, settings)
    adapter = settings.adapter_bytes * trained
    checkpoint = adapter + memory.state_bytes(trained, settings.state_bits) + MANIFEST
    return {
        # one more than are kept: the next is complete before the oldest goes
        "checkpoints": (settings.checkpoints_kept + 1) * checkpoint,
        "adapter": adapter + MANIFEST,
        "merged exports": 2 * shape.parameters if settings.merges else 0,
    }


def _steps(config: RunConfig, settings: Settings, data: DataFacts | None) -> int | None:
    if config.train.max_steps > 0:
        return config.train.max_steps
    if data is None:
        return None
    rows = data.documents
    if config.train.packing:
        rows = math.ceil(data.tokens / settings.length / 0.97)  # packs are filled to about 97%
    per_step = settings.rows * settings.accumulation * settings.world_size
    return math.ceil(config.train.num_train_epochs * math.ceil(rows / per_step))


def _notes(
    shape: ModelShape, settings: Settings, hardware: Hardware, data: DataFacts | None, auto: bool
) -> tuple[str, ...]:
    notes = []
    if auto:
        of = settings.rows * settings.accumulation
        notes.append(f"micro-batch auto: {settings.rows} of the {of} rows of a step at once")
    if not shape.exact:
        notes.append(
            f"architecture {shape.model_type} is planned from its shapes: memory within {WIDE_MARGIN:.0%}"
        )
    if data is None:
        notes.append("data not read: every row counted as full and every token as labelled")
    if hardware.flops is None:
        notes.append(
            f"speed of {hardware.name} is not known: no time predicted; plan.gpu=NAME of a card has it"
        )
    if settings.plain_kernels_because is not None:
        notes.append(f"kernels: {settings.plain_kernels_because}; memory within {WIDE_MARGIN:.0%}")
    if settings.managed:
        notes.append(
            "bnb_paged_adamw_32bit: moments in managed memory, which the driver moves; counted as resident"
        )
    return tuple(notes)
