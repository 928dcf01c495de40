"""The fast path's operations: one file each, all with the plain-torch meaning given in `reference.py`.

`pick(device)` hands out the set that serves a device and says why in one line. This room imports
nothing from the rest of the package; Triton is imported only when a GPU asks for it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from .types import Adapter, Dropout, Fp8Rows, HeadNorm, NestedScales, QuantizedWeight, Target

__all__ = [
    "Adapter",
    "Dropout",
    "Fp8Rows",
    "HeadNorm",
    "NestedScales",
    "Operations",
    "QuantizedWeight",
    "Target",
    "pick",
]


@dataclass(frozen=True)
class Operations:
    """One implementation of every operation; signatures and meaning as in `reference.py`."""

    name: str
    dequantize: Callable[[QuantizedWeight, Tensor], None]
    pack_adapters: Callable[[Sequence[Adapter], Tensor, Tensor], None]
    rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rms_norm_backward: Callable[..., None]
    rotary: Callable[..., None]
    rotary_backward: Callable[..., None]
    glu: Callable[..., None]
    glu_backward_: Callable[..., None]
    cross_entropy_: Callable[[Tensor, Tensor, float | None], Tensor]
    adapter_grad: Callable[..., None]
    project_dropped: Callable[[Tensor, Tensor, Dropout, Tensor], None]
    add_dropped_: Callable[[Tensor, Tensor, Tensor, Dropout], None]
    quantize_fp8: Callable[[Tensor, Fp8Rows], None]
    pack_fp8: Callable[[Tensor, Tensor, float, Tensor], None]
    fp8_product: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def _from(name: str, *modules: object) -> Operations:
    found = {}
    for operation in Operations.__dataclass_fields__:
        for module in modules:
            if hasattr(module, operation):
                found[operation] = getattr(module, operation)
    return Operations(name=name, **found)


def plain() -> Operations:
    """The plain-torch set."""
    return _from("plain torch", reference)


def triton_set() -> Operations:
    """The Triton set (compiled for a GPU; interpreted on the CPU under TRITON_INTERPRET=1)."""
    from . import adapter_grad, cross_entropy, dequantize, dropout, fp8, glu, norm, pack, rotary

    return _from("triton", adapter_grad, cross_entropy, dequantize, dropout, fp8, glu, norm, pack, rotary)


def why_plain(device: str, capability: tuple[int, int] | None, triton: bool) -> str | None:
    """Why a kind of device gets the plain-torch set, in one line; None where it gets Triton's.

    Args:
        device: `cuda` or `cpu`.
        capability: CUDA's; None of a card that is not known, which is taken for a recent one.
        triton: whether the package is installed.
    """
    if device != "cuda":
        return f"plain torch: Triton kernels need a CUDA device, this is {device}"
    if not triton:
        return "plain torch: the package `triton` is not installed"
    if capability is not None and capability < (8, 0):
        return f"plain torch: compute capability {capability[0]}.{capability[1]} has no bfloat16"
    return None


def pick(device: torch.device) -> tuple[Operations, str]:
    """The set for `device`, and the reason in one line."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    why = why_plain(device.type, capability, importlib.util.find_spec("triton") is not None)
    if why is not None:
        return plain(), why
    import triton

    return triton_set(), f"triton {triton.__version__} on {torch.cuda.get_device_name(device)}"
