"""Settings and shapes that the plan's tests share."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from qlora_trainer.plan.architecture import shape_of
from qlora_trainer.plan.settings import Settings
from qlora_trainer.plan.shapes import ModelShape, from_config

LLAMA3_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip

BASIC = Settings(
    device="cuda", reference_because=None, rows=4, length=2048, accumulation=1, world_size=1, supervised=1.0,
    mean_length=2048.0, method="nf4", double_quant=True, fp8=False, dtype_bytes=2, adapter_bytes=2, r=16,
    target_modules="all-linear", dora=False, modules_to_save=(), activations="auto", state_bits=32,
    paged=True, managed=False, optimizer_resident=None, offload="none",
    evaluation_rows=8, new_tokens=0, merges=False, checkpoints_kept=2,
)  # fmt: skip


def settings(*, fast: bool = True, **changes: object) -> Settings:
    if not fast:
        changes["reference_because"] = "the test asks for it"
    return replace(BASIC, **changes)  # type: ignore[arg-type]


def shape_in(folder: Path) -> ModelShape:
    return shape_of(json.loads((folder / "config.json").read_text()), folder)


def llama3_8b() -> ModelShape:
    return from_config(LLAMA3_8B)
