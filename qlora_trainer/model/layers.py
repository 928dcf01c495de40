"""Where a transformers model keeps its decoder layers, and what in it never sees a text.

In: any causal language model, with adapters or without, loaded or a skeleton. Out: names and modules.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel


def causal_of(model: Any) -> PreTrainedModel:
    """The causal language model under PEFT's wrappers."""
    return cast(PreTrainedModel, model.get_base_model() if hasattr(model, "get_base_model") else model)


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name: as long as config.json says, and the largest of such lists.

    An empty list where a model has none at all.
    """
    causal = causal_of(model)
    number = getattr(causal.config.get_text_config(decoder=True), "num_hidden_layers", None)
    inside = {id(module) for module in causal.get_decoder().modules()}
    lists = [(name, module) for name, module in causal.named_modules() if isinstance(module, nn.ModuleList)]
    lists = [found for found in lists if id(found[1]) in inside] or lists
    fitting = [found for found in lists if len(found[1]) == number] or lists

    def size(found: tuple[str, nn.ModuleList]) -> int:
        return sum(parameter.numel() for parameter in found[1].parameters())

    return max(fitting, key=size, default=("", nn.ModuleList()))


def beside_the_decoder(model: PreTrainedModel) -> tuple[str, ...]:
    """Prefixes of modules that no token of a text passes: towers of images and sound, and their projectors.

    Empty for a model that reads nothing but text.
    """
    _, layers = decoder_layers(model)
    named = dict(model.named_modules())
    above = {name for name, module in named.items() if any(inner is layers for inner in module.modules())}
    towers = [
        name for name, module in named.items() if isinstance(module, PreTrainedModel) and name not in above
    ]
    if not towers:
        return ()
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    outside = [
        f"{name}.{child}".lstrip(".")
        for name in above
        for child, module in named[name].named_children()
        if id(module) not in inside and f"{name}.{child}".lstrip(".") not in above
    ]
    return tuple(sorted({f"{name}." for name in [*towers, *outside]}))
