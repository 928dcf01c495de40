"""Low-rank adapters on a frozen base, by PEFT (Hu et al. 2021; rank-stabilised and weight-decomposed too).

The adapter's parameters are PEFT's own; only their dtype is ours: values are drawn in float32 from
the run's seed and rounded to the dtype of the forward pass. The optimizer keeps float32 masters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import peft
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_trainer.errors import ConfigError
from qlora_trainer.model import residual


@dataclass(frozen=True)
class LoraOptions:
    """As in `peft.LoraConfig`; `dtype` is that of A and B in the forward pass."""

    r: int = 64
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    modules_to_save: Sequence[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    dtype: torch.dtype = torch.bfloat16


def attach(
    model: PreTrainedModel, options: LoraOptions, seed: int, stored: Mapping[str, Tensor] | None = None
) -> peft.PeftModel:
    """Puts adapters on `model`; the first loss is the base's, for B starts at zero (or see `residual`).

    Args:
        stored: the adapter of the checkpoint that the run goes on from.

    Raises:
        ConfigError: a target or a module to save is not in the model.
    """
    targets = options.target_modules
    packed = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "qweight")}
    if targets == "all-linear" and packed:
        targets = sorted(packed)  # PEFT does not count GPTQ's and AWQ's layers as linear ones
    begins_in_weights = residual.is_residual(options.init_lora_weights)
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=options.r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(options.modules_to_save) if options.modules_to_save else None,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        init_lora_weights=True if begins_in_weights else options.init_lora_weights,
        bias="none",
    )
    for wanted in options.modules_to_save or ():
        found = [m for name, m in model.named_modules() if name == wanted or name.endswith(f".{wanted}")]
        if not found:
            raise ConfigError(f"lora.modules_to_save: the model has no module named {wanted!r}")
        if any(not p.is_floating_point() for module in found for p in module.parameters()):
            raise ConfigError(
                f"lora.modules_to_save: {wanted!r} is quantized and cannot be trained whole; "
                "leave it to the adapter, or set quantization.method=none"
            )
    torch.manual_seed(seed)
    try:
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        linear = sorted(
            {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if "Linear" in type(m).__name__}
        )
        raise ConfigError(
            f"lora.target_modules={targets!r} does not fit this model, whose linear layers are "
            f"{', '.join(linear)}: {str(error).splitlines()[0]}"
        ) from error
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "modules_to_save" not in name:
            parameter.data = parameter.data.to(options.dtype)
    if begins_in_weights:
        residual.begin(adapted, str(options.init_lora_weights), stored)
    return adapted
