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
from qlora_trainer.model import residual, targets


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
    begins_in_weights = residual.is_residual(options.init_lora_weights)
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=options.r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        modules_to_save=list(options.modules_to_save) if options.modules_to_save else None,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        init_lora_weights=True if begins_in_weights else options.init_lora_weights,
        bias="none",
    )
    found = targets.resolve(model, options.target_modules, config)
    config.target_modules = found if isinstance(found, str) else set(found)
    targets.check_whole(model, options.modules_to_save or ())
    torch.manual_seed(seed)
    try:
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ConfigError(
            f"lora: PEFT cannot adapt a {model.config.model_type} so: {' '.join(str(error).split())}"
        ) from error
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "modules_to_save" not in name:
            parameter.data = parameter.data.to(options.dtype)
    if begins_in_weights:
        residual.begin(adapted, str(options.init_lora_weights), stored)
    return adapted
