"""Bytes on the device, phase by phase and part by part.

In: shape, settings, and what `choose.py` chose. Out: `Phase`s. What PyTorch calls allocated is the sum of
all parts but `context`; tests compare it with the bytes of real small models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

from qlora_trainer.plan.fast_path import FastPath
from qlora_trainer.plan.reference_path import ReferencePath
from qlora_trainer.plan.settings import Settings
from qlora_trainer.plan.shapes import Linear, ModelShape

MIB = 1 << 20
BLOCK = 64  # elements that share a 4-bit scale (bitsandbytes' default)
NESTED_BLOCK = 256  # scales that share a second-level scale
STATE_BLOCK = 256  # elements that share an 8-bit moment's scale (optim/eight_bit.py)
PAGE_ELEMENTS, SLOTS = 1 << 21, 3  # optim/pages.py
CUBLAS_WORKSPACE = 65 * MIB  # 32 MiB each for cuBLAS and cuBLASLt on Hopper
CAPTURED_WORKSPACE = 32 * MIB  # and one more on the stream that CUDA graphs are captured on
CONTEXT = {"cuda": 500 * MIB, "cpu": 576 * MIB}  # outside PyTorch's allocator: CUDA, or the whole process
TOKENIZER = 1350  # bytes of RAM a token of the vocabulary: 42 MiB of 32,000, 166 of 128,000, 337 of 262,000
GPTQMODEL = 512 * MIB  # of the process: that library, and the compiler that it calls on a CPU


@dataclass(frozen=True)
class Phase:
    """Peak of one phase, in bytes by part."""

    name: str
    parts: dict[str, int]

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` would say."""
        return sum(self.parts.values()) - self.parts.get("context", 0)

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Fixed:
    """What is there from loading to the end, in bytes."""

    base_weights: int
    quantization_constants: int
    e4m3_copies: int
    embeddings_and_head: int
    adapter: int
    gradients: int


def is_quantized(settings: Settings) -> bool:
    return settings.method != "none"


def constants_bytes(linear: Linear, settings: Settings) -> int:
    """Scales of one 4-bit weight, and its two small code books, as bitsandbytes' QuantState holds them."""
    blocks = -(-linear.numel // BLOCK)
    if settings.method == "int8":
        return 4 * linear.out_features
    if settings.method not in ("nf4", "fp4"):
        return 0
    if not settings.double_quant:
        return _allocation(4 * blocks) + _allocation(16 * 4)
    nested = -(-blocks // NESTED_BLOCK)
    return sum(_allocation(size) for size in (blocks, 4 * nested, 4, 16 * 4, 256 * 4))


def _allocation(size: int) -> int:
    """What PyTorch's CUDA allocator hands out for `size` bytes."""
    return -(-size // 512) * 512


def adapter_parameters(shape: ModelShape, settings: Settings) -> int:
    """Trainable elements."""
    return shape.trainable(settings.r)


def layer_codes(shape: ModelShape, settings: Settings) -> int:
    """Bytes of the 4-bit codes of all decoder layers: what `model/offload.py` keeps on the host."""
    return sum(x.numel for x in shape.linears if x.layer is not None and x.quantized) // 2


def fixed(shape: ModelShape, settings: Settings) -> Fixed:
    bytes_each = {"nf4": 0.5, "fp4": 0.5, "int8": 1.0, "gptq": 0.5, "awq": 0.5}
    each = bytes_each.get(settings.method, 0.0)
    trained = adapter_parameters(shape, settings)
    base_weights = int(sum(x.numel for x in shape.linears if x.quantized) * each)
    base_weights += settings.dtype_bytes * sum(x.numel for x in shape.linears if not x.quantized)
    base_weights += settings.dtype_bytes * shape.loose
    if settings.offload == "layers":  # two slots instead of all layers
        base_weights -= layer_codes(shape, settings) * (shape.layers - 2) // shape.layers
    embedding = 0 if settings.offload in ("embeddings", "layers") and shape.head else shape.embedding
    return Fixed(
        base_weights=base_weights,
        quantization_constants=sum(constants_bytes(x, settings) for x in shape.linears if x.quantized),
        e4m3_copies=FastPath(shape, settings).e4m3() if settings.fp8 else 0,
        embeddings_and_head=settings.dtype_bytes * (embedding + shape.head + shape.other),
        adapter=settings.adapter_bytes * trained,
        gradients=4 * trained,
    )


def state_bytes(elements: int, state_bits: int) -> int:
    """Master and two moments of `elements` parameters."""
    moment = 4.0 if state_bits == 32 else 1 + 4 / STATE_BLOCK
    return int(elements * (4 + 2 * moment))


def slot_bytes(settings: Settings) -> int:
    """The device slots that pages travel through, once any page is on the host."""
    return SLOTS * state_bytes(PAGE_ELEMENTS, settings.state_bits)


def path_of(shape: ModelShape, settings: Settings) -> FastPath | ReferencePath:
    """The path's own account of what its layers keep and need."""
    return FastPath(shape, settings) if settings.fast else ReferencePath(shape, settings)


def step_phase(
    path: FastPath | ReferencePath,
    settings: Settings,
    base: Fixed,
    policies: Sequence[str],
    state: int,
    dequantized: int = 0,
) -> Phase:
    """One micro-batch, forward and backward, at its largest: its parts at the moment of the peak.

    That moment is the head's, when every layer's tensors are kept, or some layer's: its forward pass, or its
    backward pass, when those of the layers above are gone.
    """
    policies = tuple(policies)
    work = {policy: (path.forward(policy), path.work(policy)) for policy in set(policies)}
    kept = [0, *accumulate(path.kept(policy) for policy in policies)]

    @cache
    def handed_on(last: tuple[str, ...]) -> int:
        return path.stream(last) + path.leaving(last)

    head = path.head(backward=True) + handed_on(policies[-2:])
    layer = 0
    for i, policy in enumerate(policies):
        forward, backward = work[policy]
        below = handed_on(policies[max(0, i - 2) : i])
        layer = max(layer, kept[i] + below + forward, kept[i + 1] + backward)
    layer, kept_all = layer + path.inputs(), kept[-1] + path.inputs()
    peak = max(kept_all + head, layer)
    activations = kept_all if peak > layer else peak
    parts = _parts(base, settings, state, dequantized)
    return Phase("step", parts | {
        "activations": activations,
        "logits": peak - activations,
        "workspace": _workspace(path, settings, dequantized),
    })  # fmt: skip


def evaluation_phase(
    path: FastPath | ReferencePath, settings: Settings, base: Fixed, state: int, dequantized: int = 0
) -> Phase:
    """Held-out rows without gradients, between two steps: one layer at work, or the head."""
    return _held_out("evaluation", path, settings, base, state, dequantized)


def comparison_phase(
    path: FastPath | ReferencePath, settings: Settings, base: Fixed, state: int, dequantized: int = 0
) -> Phase:
    """Base beside tuned at the end, on the reference path, because it can switch the adapter off.

    Where questions are answered, with the cache of the generated tokens.
    """
    wide = replace(settings, rows=settings.evaluation_rows)
    cache = 0
    if settings.new_tokens:
        tokens = wide.tokens + wide.rows * settings.new_tokens
        cache = tokens * path.shape.layers * 2 * path.shape.kv * settings.dtype_bytes
    whole = replace(settings, chunked=False)
    reference = ReferencePath(path.shape, whole)
    return _held_out("comparison", reference, whole, base, state, dequantized, cache)


def _held_out(
    name: str,
    path: FastPath | ReferencePath,
    settings: Settings,
    base: Fixed,
    state: int,
    dequantized: int,
    cache: int = 0,
) -> Phase:
    wide = type(path)(path.shape, replace(settings, rows=settings.evaluation_rows))
    head = wide.head(backward=False)
    activations, logits = max((wide.evaluation() + cache, 0), (0, head), key=sum)
    return Phase(name, _parts(base, settings, state, dequantized) | {
        "activations": activations,
        "logits": logits,
        "workspace": _workspace(path, settings, dequantized),
    })  # fmt: skip


def phases(
    shape: ModelShape, settings: Settings, policies: Sequence[str], state: int, dequantized: int = 0
) -> tuple[Phase, ...]:
    """All phases of a run, in order; `state` is what the optimizer has on the device."""
    base, path = fixed(shape, settings), path_of(shape, settings)
    found = [load_phase(shape, settings, base)]
    found.append(step_phase(path, settings, base, policies, state, dequantized))
    if settings.evaluation_rows:
        found.append(evaluation_phase(path, settings, base, state, dequantized))
    found.append(save_phase(settings, base, state, dequantized))
    if settings.evaluation_rows and settings.offload == "none":
        found.append(comparison_phase(path, settings, base, state, dequantized))
    found.append(Phase("merge", dict.fromkeys(found[0].parts, 0)))  # on the host, weight by weight
    return tuple(found)


def load_phase(shape: ModelShape, settings: Settings, base: Fixed) -> Phase:
    """Weights arrive one by one and are quantized on the device: the largest is there twice."""
    largest = max((x.numel for x in shape.linears), default=0)
    parts = _parts(base, settings, 0) | {"adapter": 0, "gradients": 0, "e4m3 copies": 0}
    return Phase(
        "load", {**parts, "workspace": 2 * settings.dtype_bytes * largest if is_quantized(settings) else 0}
    )


def save_phase(settings: Settings, base: Fixed, state: int, dequantized: int = 0) -> Phase:
    """State is copied to the host piece by piece; nothing is added on the device."""
    return Phase("save", _parts(base, settings, state, dequantized) | {"workspace": _cublas(settings)})


def captured(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """The same with CUDA graphs, which exist from the second step on."""
    return tuple(
        phase
        if phase.name == "load"
        else Phase(phase.name, phase.parts | {"workspace": phase.parts["workspace"] + CAPTURED_WORKSPACE})
        for phase in phases
    )


def context(settings: Settings) -> int:
    """Bytes outside PyTorch's allocator; on a CPU the tokenizer's too."""
    if settings.device != "cpu":
        return CONTEXT[settings.device]
    packed = GPTQMODEL if settings.method in ("gptq", "awq") else 0
    return CONTEXT["cpu"] + packed + TOKENIZER * settings.vocabulary


def _parts(base: Fixed, settings: Settings, state: int, dequantized: int = 0) -> dict[str, int]:
    return {
        "base weights": base.base_weights,
        "quantization constants": base.quantization_constants,
        "dequantized weights": dequantized,
        "e4m3 copies": base.e4m3_copies,
        "embeddings, head, norms": base.embeddings_and_head,
        "adapter": base.adapter,
        "gradients": base.gradients,
        "optimizer": state,
        "activations": 0,
        "logits": 0,
        "workspace": 0,
        "context": context(settings),
    }


def _workspace(path: FastPath | ReferencePath, settings: Settings, dequantized: int) -> int:
    return path.workspace(dequantized) + _cublas(settings)


def _cublas(settings: Settings) -> int:
    return CUBLAS_WORKSPACE if settings.device == "cuda" else 0
