"""Small checkpoints that have every part of a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.checkpoint import format, publish, rng


def contents(step: int, seed: int = 0, size: int = 64) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What `publish.save` takes, different for every step and seed; `size` elements a tensor."""
    generator = torch.Generator().manual_seed(1000 * step + seed)
    flat = torch.randn(3 * size, generator=generator)  # views of one buffer, as the optimizer's are
    tensors = {
        format.ADAPTER: {"base_model.model.layer.lora_A.weight": flat[:size].bfloat16()},
        format.OPTIMIZER: {"master.a": flat[:size], "exp_avg.a": flat[size : 2 * size].view(2, -1)},
        format.RNG: rng.for_ranks([rng.capture()]),
    }
    documents = {
        format.ADAPTER_CONFIG: {"peft_type": "LORA", "r": 4},
        format.STATE: {"step": step, "best_loss": 0.1},
    }
    return tensors, documents


def save(root: Path, step: int, seed: int = 0, size: int = 64) -> Path:
    return publish.save(root, step, *contents(step, seed, size))
