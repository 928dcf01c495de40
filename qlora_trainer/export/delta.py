"""What an adapter changes: one update per weight, in float32, whatever kind of LoRA it is.

In: an adapter folder (ours or any PEFT one). Out: `Updates`, which turns a base weight into the
tuned one. Kinds that cannot be written into a weight are refused by name, before anything is read.

    LoRA   W + s·B·A, s = alpha/r, or alpha/sqrt(r) for rsLoRA (arXiv 2106.09685, 2312.03732)
    DoRA   m · (W + s·B·A) / ‖W + s·B·A‖, the norm over each output row (arXiv 2402.09353)

Foreign PiSSA and OLoRA adapters learned on the residual W - s·B0·A0, which is computed here as it was there
(`model.residual`); our own are stored as plain LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from qlora_trainer.errors import CheckpointError, ConfigError
from qlora_trainer.inference.load import ADAPTER_PREFIX, ADAPTER_WEIGHTS, open_adapter
from qlora_trainer.inference.records import adapter_config
from qlora_trainer.model import residual

# Settings of LoraConfig under which a layer computes something that no single weight expresses.
_NOT_A_WEIGHT = {
    "lora_bias": "a bias on B",
    "layer_replication": "replicated layers",
    "target_parameters": "bare parameters as targets",
    "trainable_token_indices": "single tokens trained",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "use_qalora": "QA-LoRA pooling",
    "fan_in_fan_out": "transposed (Conv1D) layers",
}


@dataclass
class _LowRank:
    """A [r, in] and B [out, r] of one module; `magnitude` [out] makes it DoRA.

    `init`: pissa or olora where the module's weight was a residual.
    """

    scaling: float
    init: str | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    magnitude: Tensor | None = None
    embedding: bool = False

    def apply(self, weight: Tensor) -> Tensor:
        assert self.a is not None and self.b is not None
        a, b = (factor.to(weight.device, torch.float32) for factor in (self.a, self.b))
        product = (b @ a).T if self.embedding else b @ a
        if self.init is not None:
            first_a, first_b = residual.first_factors(weight, self.init, a.shape[0], self.scaling)
            product -= first_b @ first_a
        tuned = weight + self.scaling * product
        if self.magnitude is not None:
            magnitude = self.magnitude.to(weight.device, torch.float32)
            tuned *= (magnitude / torch.linalg.vector_norm(tuned, dim=1))[:, None]
        return tuned

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.a is not None and self.b is not None
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.embedding else shape


@dataclass
class Updates:
    """All that an adapter changes, by the name of the base's parameter.

    Attributes:
        low_rank: parameter -> its low-rank update.
        replaced: parameter -> its new value (`modules_to_save`, trained biases), any dtype.
    """

    low_rank: dict[str, _LowRank] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        factors = [t for u in self.low_rank.values() for t in (u.a, u.b, u.magnitude) if t is not None]
        return sum(tensor.nbytes for tensor in [*factors, *self.replaced.values()])

    def touches(self, name: str) -> bool:
        return name in self.low_rank or name in self.replaced

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """The tuned value of parameter `name` in float32; `weight` float32, changed or returned as it is."""
        assert weight.dtype == torch.float32
        if name in self.replaced:
            weight = self.replaced[name].to(weight.device, torch.float32)
        return self.low_rank[name].apply(weight) if name in self.low_rank else weight

    def check(self, shapes: Mapping[str, tuple[int, ...]], resizable: Set[str], base: str) -> None:
        """Every update must meet a parameter of its shape.

        Args:
            shapes: parameter -> shape of the base.
            resizable: parameters that may have got another number of rows (embeddings).

        Raises:
            CheckpointError: naming the first that does not, with both shapes.
        """
        for name, update in self.low_rank.items():
            if name not in shapes:
                raise CheckpointError(f"this adapter belongs to another base: {base} has no {name}")
            if tuple(shapes[name]) != update.shape:
                raise CheckpointError(
                    f"this adapter belongs to another base: it updates {name} of shape {list(update.shape)}, "
                    f"in {base} that is {list(shapes[name])}"
                )
        for name, value in self.replaced.items():
            if name not in shapes:
                raise CheckpointError(f"this adapter belongs to another base: {base} has no {name}")
            first = 1 if name in resizable else 0
            if tuple(shapes[name][first:]) != tuple(value.shape[first:]):
                raise CheckpointError(
                    f"this adapter belongs to another base: it replaces {name} by {list(value.shape)}, "
                    f"in {base} that is {list(shapes[name])}"
                )


def read_updates(adapter: Path) -> Updates:
    """Everything in `adapter`.

    Raises:
        ConfigError: a kind of adapter that cannot be merged, by name.
        CheckpointError: unreadable, or tensors we do not know.
    """
    config = adapter_config(adapter)
    _refuse(config, adapter)
    init = config.get("init_lora_weights")
    reader = open_adapter(adapter)
    updates = Updates()
    for key in reader.slots:
        name = key.removeprefix(ADAPTER_PREFIX)
        module, mark, part = name.partition(".lora_")
        if not mark:
            # PEFT stores an embedding beside its low-rank update, for it may have been resized; one that was
            # trained whole it then stores three times: as it was, as it is, and under its own name.
            if ".original_module." not in name:
                plain = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
                updates.replaced[plain] = reader.read(key)
            continue
        parameter = f"{module}.weight"
        if parameter not in updates.low_rank:
            updates.low_rank[parameter] = _LowRank(0.0, init if residual.is_residual(init) else None)
        update = updates.low_rank[parameter]
        match part.removesuffix(".weight"):
            case "A" | "embedding_A" as which:
                update.a, update.embedding = reader.read(key), which != "A"
                update.scaling = _scaling(config, module, update.a.shape[0])
            case "B" | "embedding_B":
                update.b = reader.read(key)
            case "magnitude_vector":
                update.magnitude = reader.read(key)
            case _:
                raise CheckpointError(
                    f"{adapter / ADAPTER_WEIGHTS}: {key} is no part of LoRA that can be merged"
                )
    for name, update in updates.low_rank.items():
        if update.a is None or update.b is None:
            raise CheckpointError(f"{adapter / ADAPTER_WEIGHTS}: half of the update of {name} is missing")
        if update.embedding and update.magnitude is not None:
            raise ConfigError(
                f"{adapter}: DoRA on embeddings cannot be merged; export.format=[adapter] works"
            )
    return updates


def _scaling(config: dict[str, Any], module: str, r: int) -> float:
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
    return float(alpha) / (math.sqrt(r) if config.get("use_rslora") else r)


def _refuse(config: dict[str, Any], adapter: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ConfigError(
            f"{adapter}: an adapter of type {config.get('peft_type')} cannot be merged here, only LoRA can; "
            "export.format=[adapter] works"
        )
    residual.check_foreign(config, adapter)
    for key, meaning in _NOT_A_WEIGHT.items():
        if config.get(key):
            raise ConfigError(f"{adapter}: {meaning} ({key}) cannot be merged; export.format=[adapter] works")
