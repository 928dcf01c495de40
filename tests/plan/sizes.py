"""Settings and shapes that the plan's tests share."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.plan.architecture import Architecture
from qlora_trainer.plan.settings import Settings
from qlora_trainer.plan.shapes import ModelShape

LLAMA3_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip

BASIC = Settings(
    device="cuda", reference_because=None, plain_kernels_because=None, rows=4, length=2048, accumulation=1,
    world_size=1, supervised=1.0, mean_length=2048.0, method="nf4", double_quant=True, fp8=False,
    dtype_bytes=2, adapter_bytes=2, r=16, activations="auto", state_bits=32, paged=True, managed=False,
    optimizer_resident=None, offload="none", evaluation_rows=8, new_tokens=0, merges=False,
    checkpoints_kept=2,
)  # fmt: skip


def settings(*, fast: bool = True, **changes: object) -> Settings:
    if not fast:
        changes |= {"reference_because": "the test asks for it", "chunked": False}
    return replace(BASIC, **changes)  # type: ignore[arg-type]


def asked(**changes: object) -> RunConfig:
    """A configuration with keys of `lora` and `quantization` by their last names."""
    made = RunConfig()
    for name, value in changes.items():
        setattr(made.lora if hasattr(made.lora, name) else made.quantization, name, value)
    return made


def architecture_in(folder: Path) -> Architecture:
    return Architecture(json.loads((folder / "config.json").read_text()), folder)


def shape_in(folder: Path, device: str = "cuda", **changes: object) -> ModelShape:
    return architecture_in(folder).shape(asked(**changes), device)


def shape_of(config: dict[str, object], device: str = "cuda", **changes: object) -> ModelShape:
    return Architecture(config).shape(asked(**changes), device)


@functools.cache
def llama3_8b() -> Architecture:
    """Shared: what it has built for one test serves the next."""
    return Architecture(LLAMA3_8B)


def llama3_8b_shape(**changes: object) -> ModelShape:
    return llama3_8b().shape(asked(**changes), "cuda")
