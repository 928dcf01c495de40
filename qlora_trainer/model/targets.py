"""Which modules an adapter goes to, and which are trained whole: asked before anything is adapted.

In: a model, loaded or a skeleton, and what the configuration names. Out: what PEFT takes, or one line that
says which name is nowhere. Names are ends of module names (`q_proj`, `self_attn.q_proj`), as PEFT has them;
other strings are regular expressions over whole names; `all-linear` is every linear layer that text passes,
but the head.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import peft
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.linears import adaptable, is_linear, is_packed, misread

ALL_LINEAR = "all-linear"
KEY = "lora.target_modules"
ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


def names_in(wanted: str | Sequence[str]) -> str | list[str]:
    """`all-linear`, a list of names, or a regular expression: `q_proj,v_proj` is a list too."""
    if not isinstance(wanted, str):
        return list(wanted)
    if wanted.lower() == ALL_LINEAR:
        return ALL_LINEAR
    if re.fullmatch(r"[\w.]+( *, *[\w.]+)*", wanted):
        return [name.strip() for name in wanted.split(",")]
    return wanted


def resolve(model: PreTrainedModel, wanted: str | Sequence[str], config: peft.LoraConfig) -> str | list[str]:
    """`target_modules` as PEFT takes them; each name is there and LoRA can adapt what it names.

    Args:
        config: all else of the adapter.

    Raises:
        ConfigError: naming what matches nothing, with the names that come near, or what is no linear layer.
    """
    names = names_in(wanted)
    if names == ALL_LINEAR:
        return _all_linear(model, config)
    modules = {name: module for name, module in model.named_modules() if name}
    matched: list[str]
    if isinstance(names, str):
        matched = _by_expression(names, modules)
    else:
        matched = [name for name in modules if _ends_with(name, names)]
        missing = [name for name in names if not any(_ends_with(other, [name]) for other in matched)]
        if missing and (missing := [name for name in missing if name not in _renamed(model, names, config)]):
            raise ConfigError(f"{KEY}: this model has no module named {_with_near(missing, model)}")
    past = misread(model)
    for name in matched:
        module = modules[name]
        if past.get(name):
            raise ConfigError(
                f"{KEY}: {name}: its owner's code in transformers reads the weight itself and would pass an "
                "adapter by; leave it out"
            )
        if not isinstance(module, ADAPTABLE) and not is_linear(module):
            raise ConfigError(
                f"{KEY}: {name} is a {type(module).__name__}: LoRA adapts linear layers, embeddings and "
                "convolutions; name those in it"
            )
        if isinstance(module, nn.Linear) and not is_linear(module):
            raise ConfigError(
                f"{KEY}: {name} is a {type(module).__name__}, which does more than multiply: LoRA cannot "
                "be added to its output; leave it out"
            )
    return names


def _ends_with(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _by_expression(expression: str, modules: dict[str, nn.Module]) -> list[str]:
    try:
        matched = [name for name in modules if re.fullmatch(expression, name)]
    except re.error as error:
        raise ConfigError(f"{KEY}: {expression!r} is no regular expression: {error}") from error
    if not matched:
        example = next((name for name, module in modules.items() if is_linear(module)), "")
        raise ConfigError(
            f"{KEY}: {expression!r} matches no module: a regular expression has to match a whole name, "
            f"such as {example}; names are listed as [q_proj,v_proj]"
        )
    return matched


def _all_linear(model: PreTrainedModel, config: peft.LoraConfig) -> str | list[str]:
    """`all-linear` itself where PEFT means the same by it; else what we mean by it, by name."""
    wanted = set(adaptable(model))
    modules = dict(model.named_modules())
    packed = {name.rpartition(".")[2] for name in wanted if is_packed(modules[name])}
    if packed:  # PEFT does not count GPTQ's and AWQ's layers as linear ones
        return sorted(packed)
    refused = {name for name in wanted if _is_refused(model, name, config)}
    head = model.get_output_embeddings()
    taken = {
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    return ALL_LINEAR if taken == wanted - refused else sorted(wanted - refused)


def _is_refused(model: PreTrainedModel, name: str, config: peft.LoraConfig) -> bool:
    """Whether PEFT knows that the model reads this layer's weight past its adapter (state-space models)."""
    try:
        _check_lora_target_modules_mamba(config, model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def _renamed(model: PreTrainedModel, names: list[str], config: peft.LoraConfig) -> set[str]:
    """Names of older transformers that PEFT understands: each expert's layers are one parameter today."""
    converted = copy.deepcopy(config)
    converted.target_modules = set(names)
    try:
        convert_peft_config_for_transformers(converted, model, None)
    except ValueError as error:
        raise ConfigError(f"{KEY}: {error}") from error
    return set(names) - set(converted.target_modules)


def _with_near(missing: list[str], model: PreTrainedModel) -> str:
    """`'q_porj' (near: q_proj), 'typo'; its linear layers are down_proj, …`."""
    there = sorted({name.rpartition(".")[2] for name in adaptable(model)})
    said = []
    for name in missing:
        near = ", ".join(get_close_matches(name.rpartition(".")[2], there, n=2))
        said.append(f"{name!r} (near: {near})" if near else repr(name))
    return f"{', '.join(said)}; its linear layers are {', '.join(there)}"


def check_whole(model: nn.Module, names: Sequence[str]) -> None:
    """Whether `lora.modules_to_save` can be trained whole.

    Raises:
        ConfigError: a name is nowhere, or means more modules than it says, or something quantized.
    """
    key = "lora.modules_to_save"
    modules: dict[str, Any] = {name: module for name, module in model.named_modules() if name}
    for wanted in names:
        found = [name for name in modules if _ends_with(name, [wanted])]
        if not found:
            near = get_close_matches(wanted, {name.rpartition(".")[2] for name in modules}, n=2)
            hint = f" (near: {', '.join(near)})" if near else ""
            raise ConfigError(f"{key}: this model has no module named {wanted!r}{hint}")
        more = [name for name in modules if name.endswith(wanted) and name not in found]
        if more:  # PEFT takes any module whose name ends so
            raise ConfigError(
                f"{key}: {wanted!r} would train {more[0]} too; write more of the name, such as {found[0]}"
            )
        whole = [p for name in found for p in modules[name].parameters()]
        if any(type(p).__name__ in ("Params4bit", "Int8Params") or not p.is_floating_point() for p in whole):
            raise ConfigError(
                f"{key}: {wanted!r} is quantized and cannot be trained whole; "
                "leave it to the adapter, or set quantization.method=none"
            )
