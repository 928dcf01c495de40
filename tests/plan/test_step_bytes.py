"""The plan's peak of a step is what the fast path's tensors take: the real code on tensors without data.

Layers of the 8B shape run on the meta device. Kernels and attention are replaced by what they allocate on
a GPU, streams by nothing; everything else (what is made, kept, freed and when) is the code that trains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_trainer.kernels import Operations, attention
from qlora_trainer.model import fuse as fuse_module
from qlora_trainer.model.fused import activations, projection
from qlora_trainer.model.fused.inputs import Inputs
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.objectives.sft import sft
from qlora_trainer.plan import memory
from qlora_trainer.plan.fast_path import FastPath
from tests.plan.sizes import LLAMA3_8B, settings, shape_of

META = torch.device("meta")
LAYERS = 4


class Live(TorchDispatchMode):
    """Counts the bytes of storages, `known` ones apart, that are alive after each operation."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in self.known:
                    continue
                self.seen.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.seen = {key: value for key, value in self.seen.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.seen.values()))
        return result


def allocating() -> Operations:
    """The operations as allocations: what the Triton files make that outlives a launch."""

    def rms_norm(x: Tensor, delta: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
        return x if delta is None else delta, torch.empty(len(x), dtype=torch.float32, device=META)

    def cross_entropy_(logits: Tensor, *_: Any) -> Tensor:
        return torch.empty(len(logits), dtype=torch.float32, device=META)

    def nothing(*_: Any) -> None:
        return None

    made = {name: nothing for name in Operations.__dataclass_fields__}
    return Operations(**made | {"name": "none", "rms_norm": rms_norm, "cross_entropy_": cross_entropy_})


def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    return torch.empty(q.shape, dtype=q.dtype, device=META), (torch.empty(1, *q.shape[1::-1], device=META),)


def attend_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    found = tuple(torch.empty(x.shape, dtype=q.dtype, device=META) for x in (q, k, v))
    torch.empty(q.shape, dtype=torch.float32, device=META), [torch.empty_like(q) for _ in range(2)]
    return found


class Nowhere(activations._Home):
    """Remembers a tensor's shape, as pinned memory would its bytes."""

    def put(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def get(self, tensor: Tensor) -> None:
        pass


class Stream:
    device = META

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass

    wait_event = wait_stream

    def record_event(self) -> None:
        pass


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(projection.ALIGN, "meta", 64)
        patch.setattr(fuse_module, "pick", lambda device: (allocating(), "none"))
        patch.setattr(fuse_module, "HostStore", activations.HostStore)
        patch.setattr(attention, "_attend", attend)
        patch.setattr(attention, "_attend_backward", attend_backward)
        patch.setattr(activations, "_Home", Nowhere)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "current_stream", Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        yield


def peak(policies: list[str], tokens: int, *, trained: bool = True, base_gemm: str = "bf16") -> int:
    """Bytes of a step, or of a forward pass on held-out rows, beside weights and workspace."""
    config = LlamaConfig(**{**LLAMA3_8B, "num_hidden_layers": LAYERS})
    with META:
        base = LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    model = attach(base, LoraOptions(r=16, lora_alpha=16, dtype=torch.bfloat16), seed=0).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.main_grad = torch.empty(parameter.shape, dtype=torch.float32, device=META)  # type: ignore
    forward, report = fuse_module.fuse(
        model, activations=policies, base_gemm=base_gemm, resident_bytes=0, logits_bytes=512 << 20
    )
    assert not report.fallbacks
    forward.host = activations.HostStore(META)
    for layer in forward.layers:
        layer.host = forward.host
    there = [*model.parameters(), *(getattr(p, "main_grad", p) for p in model.parameters())]
    for layer in forward.layers:
        for group in layer.projections:
            there += [value for value in vars(group).values() if isinstance(value, Tensor)]
    with Live(there) as live:
        ids = torch.empty((1, tokens), dtype=torch.int64, device=META)
        rows = torch.empty(tokens, dtype=torch.int64, device=META)
        weights = torch.empty(tokens, dtype=torch.float32, device=META)
        inputs = Inputs(ids, ids.clone(), rows, rows.clone(), weights)
        if trained:
            sft(forward.run(inputs)).backward()
        else:
            with torch.no_grad():
                forward.run(inputs)
    return live.peak - sum(buffer.nbytes for buffer in forward.workspace._buffers.values())


def path_of(tokens: int, base_gemm: str = "bf16") -> FastPath:
    shape = shape_of({**LLAMA3_8B, "num_hidden_layers": LAYERS})
    return FastPath(shape, settings(rows=1, length=tokens, mean_length=float(tokens), fp8=base_gemm == "fp8"))


MIXES = [[policy] * LAYERS for policy in activations.POLICIES]
MIXES += [["full_offload", "full_offload", "full", "full"], ["mlp", "mlp", "none", "none"]]


@pytest.mark.parametrize(("tokens", "base_gemm"), [(8_192, "bf16"), (350_208, "bf16"), (65_536, "fp8")])
@pytest.mark.parametrize("policies", MIXES, ids=lambda mix: f"{mix[0]}-{mix[-1]}")
def test_planned_peak_is_that_of_the_tensors(policies: list[str], tokens: int, base_gemm: str) -> None:
    with as_on_a_gpu():
        measured = peak(policies, tokens, base_gemm=base_gemm)
    path = path_of(tokens, base_gemm)
    step = memory.step_phase(path, path.settings, memory.fixed(path.shape, path.settings), policies, 0)
    assert step.parts["activations"] + step.parts["logits"] == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("tokens", [2_048, 65_536])
def test_planned_evaluation_is_that_of_the_tensors(tokens: int) -> None:
    with as_on_a_gpu():
        measured = peak(["none"] * LAYERS, tokens, trained=False)
    path = path_of(tokens)
    assert max(path.evaluation(), path.head(backward=False)) == pytest.approx(measured, rel=0.02)
