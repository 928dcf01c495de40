"""A run's model before any weight is read: the base as loading will hold it, and its adapters.

In: a configuration and the options of `load` and `lora`. Out: models on the meta device whose modules are of
the classes that the loaded ones will be of, made by the code that loading runs. What is asked of them (which
layers are quantized, where adapters go, what the fast path says) has the answer that the run will find.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import peft
import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.linears import adaptable, as_plain_linears, in_kinds, leave_misread
from qlora_trainer.model.load import BaseOptions, check_widths, quantization_config
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.model.skeleton import skeleton


def outline_base(config: PreTrainedConfig, options: BaseOptions, device: str) -> PreTrainedModel:
    """The base as `load.load_base` will hold it on a `cuda` or `cpu` device.

    Layers of GPTQ and AWQ are marked as such: their own classes come with GPTQModel, which a plan does not
    need.

    Raises:
        MissingInputError: transformers cannot build it.
        ConfigError: it is stored in another way than `options.method`, or cannot be held so on `device`.
    """
    quantization = quantization_config(options, config)
    model: Any = skeleton(config, options.dtype)
    if options.method in ("gptq", "awq"):
        for name in adaptable(model):
            model.get_submodule(name).stands_for_packed = True
    elif options.method != "none":
        hold(model, quantization or config.quantization_config, device, stored=quantization is None)
        setattr(model, "is_loaded_in_8bit" if options.method == "int8" else "is_loaded_in_4bit", True)
        check_widths(model, options.method, device)
    model.requires_grad_(False)
    return model


def hold(
    model: PreTrainedModel, how: BitsAndBytesConfig | dict[str, Any], device: str, *, stored: bool = False
) -> None:
    """Replaces the layers of a skeleton that bitsandbytes is to hold, as transformers does when it loads.

    Args:
        stored: the checkpoint is quantized already.
    """
    as_plain_linears(model)
    if not stored:
        leave_misread(model, how)
    quantizer = AutoHfQuantizer.from_config(how, pre_quantized=stored)
    quantizer.preprocess_model(model, device_map={"": device})


def outline_adapted(
    config: PreTrainedConfig,
    options: BaseOptions,
    lora: LoraOptions,
    device: str,
    base: PreTrainedModel | None = None,
) -> peft.PeftModel:
    """The same with the adapters of `lora`.

    DoRA measures the weights that it is added to, and there are none: under it the base is as it would be
    in 16 bits.

    Args:
        base: of `outline_base`, if there is one that may be changed.

    Raises:
        ConfigError: as `outline_base` and `lora.attach`.
    """
    if lora.use_dora and options.method in ("nf4", "fp4", "int8"):
        base = skeleton(config, options.dtype).requires_grad_(False)
    elif base is None:
        base = outline_base(config, options, device)
    with torch.random.fork_rng([]), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT says of the adapter it says again when that is real
        adapted = attach(base, replace(lora, init_lora_weights=True), seed=0)
        _check_found_again(adapted)
    return adapted


def _check_found_again(adapted: peft.PeftModel) -> None:
    """Whether PEFT, given the adapter that it saves, finds each tensor's place.

    Raises:
        ConfigError: it renames some on their way in, and would leave those adapters at their beginning.
    """
    result = peft.set_peft_model_state_dict(adapted, peft.get_peft_model_state_dict(adapted))
    lost = sorted({in_kinds(name) for name in result.missing_keys if "lora_" in name})
    if lost:
        raise ConfigError(
            f"lora.target_modules: PEFT would not find {', '.join(lost)} again in an adapter that it saves; "
            "name other modules"
        )
