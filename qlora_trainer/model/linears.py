"""Which modules of a model are linear layers, which of them are quantized, and how much of the body that is.

In: a transformers model, with its weights or without (`skeleton`). The body is every matrix outside
embeddings and head. transformers quantizes what is exactly `nn.Linear`: a subclass with the same meaning
(Falcon's) takes part here too, because `as_plain_linears` makes it one; a subclass with another meaning
(routers that return pairs, grouped products) is not a linear layer. Weights of experts in one 3-D parameter
stay as they are.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.layers import beside_the_decoder

ENOUGH = 0.9  # of the body; a base of which less is quantized is not what its method's name says
SHOWN = 4  # groups of weights that a message names
_OURS = re.compile(r"\.(lora_\w+|modules_to_save)\.")  # what PEFT adds to a model
_WRAPPED = re.compile(r"^base_model\.model\.|\.(base_layer|original_module|default)(?=\.)")  # and its words


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is x Wᵀ + b and nothing else: of a class that says so, or seen to be so."""
    if isinstance(module, Conv1D | bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) or is_packed(module):
        return True
    if not isinstance(module, nn.Linear):
        return False
    return type(module).forward is nn.Linear.forward or _computes_linear(module)


def is_packed(module: nn.Module) -> bool:
    """A layer of GPTQ or AWQ: of GPTQModel's classes, or what stands for one in a skeleton."""
    return hasattr(module, "qweight") or getattr(module, "stands_for_packed", False)


def _computes_linear(module: nn.Linear) -> bool:
    """Tries a subclass of `nn.Linear` on a miniature of itself."""
    small: Any = copy.copy(module)
    small.in_features, small.out_features = 8, 4
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cpu", generator=generator)

    bias = None if module.bias is None else nn.Parameter(draw(4))
    small._parameters = {"weight": nn.Parameter(draw(4, 8)), "bias": bias}
    x = draw(2, 3, 8)
    try:
        with torch.no_grad():
            found = small(x)
    except Exception:  # whatever it wants of its input, it is no linear layer
        return False
    wanted = nn.functional.linear(x, small.weight, small.bias)
    return isinstance(found, torch.Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted)


def as_plain_linears(model: nn.Module) -> int:
    """Replaces subclasses of `nn.Linear` that are linear layers by `nn.Linear` itself; returns how many."""
    found = [(name, module) for name, module in model.named_modules() if _is_like_linear(module)]
    for name, module in found:
        plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        plain.weight, plain.bias = module.weight, module.bias
        model.set_submodule(name, plain)
    return len(found)


def _is_like_linear(module: Any) -> bool:
    """Torch's own subclass belongs to `nn.MultiheadAttention`, which reads its weight past its forward."""
    if type(module) is nn.Linear or type(module).__module__.startswith(("torch.", "bitsandbytes.")):
        return False
    return isinstance(module, nn.Linear) and is_linear(module)


def misread(model: nn.Module) -> dict[str, bool]:
    """Linear layers whose weight their owner's code reads itself, past their forward.

    Quantized, such a weight is packed codes: `x.to(self.weights_proj.weight.dtype)` makes bytes of the
    activations (indexers of sparse attention), `self.dt_proj.weight @ x` fails (Mamba). So they stay as they
    are. True where it reads values and not the dtype alone: then it passes an adapter by, too.
    """
    found: dict[str, bool] = {}
    for name, owner in model.named_modules():
        kind: Any = type(owner)
        for child, module in owner.named_children():
            if isinstance(module, nn.Linear) and (reads := _reads(kind, child)) is not None:
                found[f"{name}.{child}".lstrip(".")] = reads
    return found


@cache
def _reads(owner: Any, child: str) -> bool | None:
    """Whether a class's own code reads values (True) or the dtype (False) of `self.child.weight`."""
    if owner.__module__.startswith("torch."):
        return None
    source = _source(owner)
    weight = rf"self\.{re.escape(child)}\.weight"
    if re.search(rf"{weight}( @|\.(data|clamp|type|reshape|float|T)\b)", source):
        return True
    return False if re.search(rf"to\((dtype=)?{weight}\.dtype\)", source) else None


def _source(owner: Any) -> str:
    """The text of a class; `inspect.getsource` parses the whole file for each. Empty if made in memory."""
    try:
        text = _text(inspect.getfile(owner))
    except (OSError, TypeError):
        return ""
    found = re.search(rf"^class {owner.__name__}\b.*?(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    return found.group() if found else ""


@cache
def _text(file: str) -> str:
    return Path(file).read_text(encoding="utf-8")


def leave_misread(model: PreTrainedModel, quantization: Any) -> None:
    """Tells transformers to leave `misread` layers as they are, beside those that it leaves anyway."""
    head = model.get_output_embeddings()
    names = [name for name in misread(model) if model.get_submodule(name) is not head]
    if names:
        quantization.llm_int8_skip_modules = sorted({*get_keys_to_not_convert(model), *names})


def class_to_load(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A class of the same name whose models have plain linear layers before any weight is read.

    transformers makes the model itself and quantizes what is exactly `nn.Linear` while it reads. A model
    that is loaded becomes one of `kind` again: set its `__class__`.
    """

    def __init__(self: Any, *arguments: Any, **keywords: Any) -> None:
        kind.__init__(self, *arguments, **keywords)
        as_plain_linears(self)

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})


def adaptable(model: PreTrainedModel) -> list[str]:
    """The linear layers that `all-linear` means: all that text passes, the head apart."""
    head, beside = model.get_output_embeddings(), beside_the_decoder(model)
    past = misread(model)
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module)
        and module is not head
        and not past.get(name)
        and not f"{name}.".startswith(beside)
    ]


@dataclass(frozen=True)
class Share:
    """How much of a base's body is quantized, in elements.

    `left`: what is not, by its name with `*` for numbers (`model.layers.*.mlp.experts.down_proj`), the
    largest first.
    """

    quantized: int
    body: int
    left: tuple[tuple[str, int], ...]

    @property
    def of_body(self) -> float:
        return self.quantized / self.body if self.body else 1.0

    @property
    def enough(self) -> bool:
        return self.of_body >= ENOUGH

    def names(self) -> str:
        """`model.layers.*.mlp.experts.down_proj 33%, …`; empty if everything is quantized."""
        named = [f"{name} {percent(count / self.body)}" for name, count in self.left[:SHOWN]]
        if len(self.left) > SHOWN:
            named.append(f"{len(self.left) - SHOWN} more kinds")
        return ", ".join(named)

    def check(self, method: str) -> None:
        """Refuses what would be called quantized and is not.

        Raises:
            ConfigError: naming what would stay as it is.
        """
        if not self.enough and method != "none":
            raise ConfigError(
                f"quantization.method={method} reaches {self}; quantization.allow_partial=true trains it so, "
                "quantization.method=none calls it what it is"
            )

    def __str__(self) -> str:
        said = f"{percent(self.of_body)} of the body's weights"
        return f"{said}; not quantized: {self.names()}" if self.left else said


def percent(share: float) -> str:
    """Rounded down, so that 100% is all."""
    return f"{int(share * 100)}%" if share >= 0.01 or share == 0 else "below 1%"


def quantized_share(model: PreTrainedModel) -> Share:
    """Of a base, loaded or a skeleton; adapters on it do not count."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    apart = {id(module) for end in ends if end is not None for module in end.modules()}
    quantized = 0
    left: Counter[str] = Counter()
    seen: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in apart or isinstance(module, nn.Embedding) or _OURS.search(f"{name}."):
            continue
        if size := quantized_elements(module):
            quantized += size
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                left[in_kinds(f"{name}.{own}")] += parameter.numel()
    return Share(quantized, quantized + left.total(), tuple(left.most_common()))


def in_kinds(name: str) -> str:
    """A parameter's name with `*` for numbers, without PEFT's words and `weight`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", _WRAPPED.sub("", name)).removesuffix(".weight")


def quantized_elements(module: Any) -> int:
    """Elements of a quantized layer's weight, before it was quantized; 0 of any other module."""
    if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) or is_packed(module):
        return int(module.in_features * module.out_features)
    return 0
