"""The numbers of a run that its memory and time depend on: where the configuration ends.

In: a `RunConfig`, the machine, the model's shape and, once they are known, the data's token counts.
Out: `Settings`; nothing else in this room but `plan.py` reads a `RunConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.plan.hardware import GIB, Hardware
from qlora_trainer.plan.shapes import ModelShape

AUTO = "auto"
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class DataFacts:
    """What the data says: documents, their tokens, how many have a label, the longest document.

    `lengths`: tokens of equally likely documents, ascending; a few hundred say how much padding there is.
    """

    documents: int
    tokens: int
    supervised: int
    longest: int
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Settings:
    """Sizes in elements, bytes or tokens as named.

    Attributes:
        device: cuda or cpu.
        reference_because: why transformers, PEFT and bitsandbytes run the step and not the fast path
            (`model/fuse.py`); None if it does.
        plain_kernels_because: why the fast path runs without Triton on a GPU; None where it has it.
        fp8: products with the frozen base run in e4m3, from copies that stay on the device.
        rows, length: of a micro-batch at its largest, in rows and tokens a row.
        supervised: share of its tokens that have a label (1 if not known).
        mean_length: tokens a row on average, padding included, for the time.
        activations: auto, or the policy of every layer.
        offload: auto or none; embeddings: an untied table lives on the host; layers: 4-bit layers too,
            and stream (`model/offload.py`).
        evaluation_rows: held-out rows measured together; 0 if nothing is held out.
        new_tokens: that are generated to answer a held-out row; 0 if none is answered.
        optimizer_resident: bytes of paged state that may stay on the device; None: the plan chooses.
        dropout: the adapters' inputs are dropped in part.
        chunked: the step's logits are made a chunk at a time, whatever runs the layers.
        vocabulary: tokens of the tokenizer.
    """

    device: str
    reference_because: str | None
    plain_kernels_because: str | None
    rows: int
    length: int
    accumulation: int
    world_size: int
    supervised: float
    mean_length: float
    method: str
    double_quant: bool
    fp8: bool
    dtype_bytes: int
    adapter_bytes: int
    r: int
    activations: str
    state_bits: int
    paged: bool
    managed: bool
    optimizer_resident: int | None
    offload: str
    evaluation_rows: int
    new_tokens: int
    merges: bool
    checkpoints_kept: int
    dropout: bool = False
    chunked: bool = True
    vocabulary: int = 0

    @property
    def fast(self) -> bool:
        return self.reference_because is None

    @property
    def streamable(self) -> bool:
        """Whether `model/offload.py` could stream the layers."""
        return self.device == "cuda" and self.fast and self.method in ("nf4", "fp4") and not self.fp8

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch, padding included."""
        return self.rows * self.length

    @property
    def labelled(self) -> int:
        """Tokens of a micro-batch that the LM head runs on."""
        return max(1, round(self.tokens * self.supervised))


def from_config(
    config: RunConfig,
    hardware: Hardware,
    shape: ModelShape,
    data: DataFacts | None = None,
    world_size: int = 1,
    rows: int | None = None,
) -> Settings:
    """Settings of a run; `auto` is resolved as the rooms that load and train resolve it.

    `rows`: of a micro-batch, where the configuration leaves that to the plan.
    """
    train, quantization, lora = config.train, config.quantization, config.lora
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if hardware.has_bf16 else "float32"
    length = train.max_length
    if data is not None and not train.packing:
        length = min(length, data.longest)
    rows, accumulation = _micro_batch(config, rows)
    name = config.optim.name
    kernels = config.model.kernels == "auto"
    reference_because = shape.reference_because if kernels else f"model.kernels={config.model.kernels}"
    resident = config.optim.resident_gib
    return Settings(
        device=hardware.device,
        reference_because=reference_because,
        plain_kernels_because=_why_plain(hardware) if reference_because is None else None,
        chunked=kernels and shape.chunked,
        vocabulary=shape.vocab,
        rows=rows,
        length=length,
        accumulation=accumulation,
        world_size=world_size,
        mean_length=_mean_length(rows, length, config, data),
        supervised=data.supervised / data.tokens if data is not None else 1.0,
        method=quantization.method,
        double_quant=quantization.bnb_4bit_use_double_quant,
        fp8=train.base_gemm == "fp8" and reference_because is None,
        dtype_bytes=DTYPE_BYTES[dtype],
        adapter_bytes=DTYPE_BYTES[lora.dtype],
        r=lora.r,
        activations=train.activations,
        state_bits=8 if name.endswith("8bit") else 32,
        paged=name.startswith("paged") and hardware.device == "cuda",
        managed=name.startswith("bnb_paged") and hardware.device == "cuda",
        optimizer_resident=int(resident * GIB) if resident is not None else None,
        offload=config.model.offload,
        evaluation_rows=_held_out_rows(config),
        new_tokens=config.evaluate.max_new_tokens if config.evaluate.task != "none" else 0,
        merges=any(name not in ("adapter", "gguf_adapter") for name in config.export.format),
        checkpoints_kept=config.checkpoint.save_total_limit,
        dropout=lora.lora_dropout > 0,
    )


def _why_plain(hardware: Hardware) -> str | None:
    if hardware.device != "cuda":
        return None
    from qlora_trainer.kernels import why_plain

    return why_plain(hardware.device, hardware.capability, hardware.triton)


def _held_out_rows(config: RunConfig) -> int:
    """Held-out rows measured together; 0 if there are none."""
    evaluate, data = config.evaluate, config.data
    if not (evaluate.enabled and (data.eval_path or data.eval_fraction)):
        return 0
    return min(evaluate.batch_size, evaluate.max_rows or evaluate.batch_size)


def _micro_batch(config: RunConfig, rows: int | None) -> tuple[int, int]:
    """Rows, and micro-batches of a step; under auto `gradient_accumulation_steps` counts rows."""
    train = config.train
    if train.per_device_train_batch_size != AUTO:
        return int(train.per_device_train_batch_size), train.gradient_accumulation_steps
    rows = rows or 1
    assert train.gradient_accumulation_steps % rows == 0
    return rows, train.gradient_accumulation_steps // rows


def _mean_length(rows: int, length: int, config: RunConfig, data: DataFacts | None) -> float:
    """Packed rows are full; grouped ones carry next to no padding; else all are as long as the longest."""
    if data is None or config.train.packing:
        return float(length)
    mean = min(length, data.tokens / data.documents)
    if rows == 1 or config.train.group_by_length:
        return mean
    if not data.lengths:
        return (mean + length) / 2
    return min(length, expected_longest(data.lengths, rows))


def expected_longest(lengths: Sequence[int], rows: int) -> float:
    """Of `rows` draws from equally likely `lengths`, ascending: the mean of the largest."""
    n = len(lengths)
    return sum(x * (((i + 1) / n) ** rows - (i / n) ** rows) for i, x in enumerate(lengths))
