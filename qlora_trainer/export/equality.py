"""Does a merged export hold base + adapter, tensor by tensor? A divergence near zero cannot tell.

In: the trained model as PEFT and bitsandbytes hold it in memory, and the export's folder. Out: `Equality`.
Nothing of `merge`, `delta` or `base` is used: what they get wrong must show. The export's tensors are read
as loaders read them, from the files that its index names; memory holds one of them at a time.

A weight is right if it is base + adapter, computed in float32, rounded once to the dtype it is stored in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_trainer.model.residual import changed_base
from qlora_trainer.model.shards import stored_tensors
from qlora_trainer.model.source import weight_files

_NOISE = 2.0**-19  # of float32 sums of some hundred products taken in another order, to their absolute sum
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Equality:
    """What the comparison of a whole model found.

    Attributes:
        tensors: how many were compared.
        unequal: names of those that are not base + adapter, or are missing.
        largest: difference of a weight beyond what rounding explains.
        strays: safetensors files in the folder that no loader reads, and tensors that no model has.
    """

    tensors: int
    unequal: list[str]
    largest: float
    strays: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Weight:
    """base + adapter in float32, and how far float32 sums may be from it (a number or like `value`)."""

    value: Tensor
    noise: Tensor | float = 0.0


@torch.inference_mode()
def compare(model: PreTrainedModel | PeftModel, folder: Path) -> Equality:
    """Compares the export in `folder` with `model`, a PeftModel or the plain base that was converted.

    Raises:
        CheckpointError, MissingInputError: files that cannot be read.
    """
    files = weight_files(str(folder))
    assert files is not None, "a folder"
    stored = stored_tensors(files, _CPU)
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    prefix = f"{inner.base_model_prefix}."
    unequal, tensors, largest, seen = [], 0, 0.0, set()
    shared = dict(inner.all_tied_weights_keys)
    for name, weight in _weights(inner, changed_base(model)):
        names = [n for n in (name, shared.get(name)) if n is not None]  # a loader shares what is not stored
        spelled = (k for n in names for k in (n, prefix + n, n.removeprefix(prefix)))
        key = next((k for k in spelled if k in stored), None)
        if key is None:
            unequal.append(name)
            continue
        seen.add(key)
        tensors += 1
        found = stored[key][...].to(weight.value.device)
        beyond = _beyond(found, weight)
        if not beyond <= 0:  # NaN too
            unequal.append(name)
            largest = max(largest, beyond)
    strays = {path.name for path in folder.glob("*.safetensors")} - {path.name for path in files}
    return Equality(tensors, unequal, largest, sorted(strays) + sorted(stored.keys() - seen))


def _beyond(found: Tensor, weight: _Weight) -> float:
    """The largest difference beyond one rounding to the dtype of `found`; infinite for other shapes."""
    expected = weight.value
    if found.shape != expected.shape:
        return float("inf")
    kind = torch.finfo(found.dtype)
    allowed = expected.abs() * kind.eps / 2 + kind.smallest_normal * kind.eps + weight.noise
    return float(((found.float() - expected).abs() - allowed).max())


def _weights(model: nn.Module, residual: bool) -> Iterator[tuple[str, _Weight]]:
    """(name in the plain model, weight) of every parameter, adapters written into theirs.

    Args:
        residual: the base's weights in memory were rounded after a part of each was taken out.
    """
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            yield f"{name}.weight", _tuned(module, dequantize_module_weight(base).float(), residual)
            yield from _plain(name, base, {"weight"})
        elif isinstance(module, AuxiliaryTrainingWrapper):
            trained = module.modules_to_save[module.active_adapters[0]]
            for part, parameter in trained.named_parameters(prefix=name):
                yield part, _Weight(parameter.float())
        else:
            yield from _plain(name, module, set())
            continue
        inside += (f"{name}.",)


def _plain(name: str, module: nn.Module, done: set[str]) -> Iterator[tuple[str, _Weight]]:
    for part, parameter in module.named_parameters(prefix=name, recurse=False):
        if part.rpartition(".")[2] not in done:
            quantized = part.endswith(".weight") and not parameter.is_floating_point()
            yield part, _Weight((dequantize_module_weight(module) if quantized else parameter).float())


def _tuned(layer: Any, weight: Tensor, residual: bool) -> _Weight:
    (adapter,) = layer.active_adapters
    scaling = layer.scaling[adapter]
    if adapter in layer.lora_A:
        a, b = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
        update, size = b @ a, b.abs() @ a.abs()
    else:
        a, b = layer.lora_embedding_A[adapter].float(), layer.lora_embedding_B[adapter].float()
        update, size = (b @ a).T, (b.abs() @ a.abs()).T
    tuned = weight + scaling * update
    noise = (weight.abs() + abs(scaling) * size) * _NOISE
    if residual:
        noise += weight.abs() * torch.finfo(layer.get_base_layer().weight.dtype).eps
    if adapter in layer.lora_magnitude_vector:
        rows = layer.lora_magnitude_vector[adapter].weight.float() / torch.linalg.vector_norm(tuned, dim=1)
        tuned, noise = tuned * rows[:, None], (noise * rows[:, None].abs()) * 2
    return _Weight(tuned, noise)
