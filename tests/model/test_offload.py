"""Layers streamed from the host give the numbers of layers that stay, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.fuse import fuse
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.model.offload import StreamedWeights, offload_layers
from qlora_trainer.model.synthetic import random_base
from qlora_trainer.objectives.sft import sft
from tests import tiny
from tests.batches import collate, documents

LAYERS = 4
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make(device: torch.device, offload: bool, policy: str, method: str = "nf4"):
    config = tiny.model("llama", num_hidden_layers=LAYERS).config
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = random_base(config, device, dtype=dtype, method=method)
    model = attach(base, LoraOptions(r=4, dtype=dtype), seed=0).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator(device).manual_seed(1))
    if offload:
        codes = offload_layers(model, model.get_base_model().model.layers, device)
        assert codes > 0
    forward, _ = fuse(model, activations=policy, resident_bytes=0)
    return model, forward, StreamedWeights(forward) if offload else None


def gradients(model, forward, batch) -> tuple[Tensor, list[Tensor]]:
    loss = sft(forward(batch))
    loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return loss.detach(), found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", ["none", "mlp", "full"])
def test_streamed_layers_give_the_same_bits(device: str, policy: str) -> None:
    one = make(torch.device(device), False, policy)
    other = make(torch.device(device), True, policy)
    for seed in range(2):  # the second pass finds the first layers in the slots
        batch = collate([[d] for d in documents([20, 30], seed=seed)])
        (loss, expected), (streamed, found) = (gradients(m, f, batch) for m, f, _ in (one, other))
        assert torch.equal(loss, streamed)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_streamed_layers_give_the_base_alone() -> None:
    one, other = (make(torch.device("cpu"), offload, "none")[1] for offload in (False, True))
    batch = collate([[d] for d in documents([20, 30])])
    alone = one(batch, adapters=False).nll
    assert torch.equal(alone, other(batch, adapters=False).nll) and not torch.equal(alone, one(batch).nll)


@pytest.mark.parametrize("device", DEVICES)
def test_only_two_layers_are_on_the_device(device: str) -> None:
    model, _, stream = make(torch.device(device), True, "none")
    assert stream is not None
    codes = [p for n, p in model.named_parameters() if p.dtype == torch.uint8]
    assert len(codes) == 7 * LAYERS and all(p.device.type == "cpu" for p in codes)
    assert stream.nbytes == 2 * sum(p.numel() for p in codes) // LAYERS
    others = [p for p in model.parameters() if p.dtype != torch.uint8]
    assert all(p.device.type == device for p in [*others, *model.buffers()])


def test_each_layer_travels_once_a_pass() -> None:
    model, forward, stream = make(torch.device("cpu"), True, "none")
    fetched: list[int] = []
    fetch = stream._fetch
    stream._fetch = lambda number, slot: (fetched.append(number), fetch(number, slot))
    batch = collate([[d] for d in documents([20, 30])])
    gradients(model, forward, batch)
    assert fetched == [0, 1, 2, 3, 1, 0]  # up; then down, where the last two are still there
    fetched.clear()
    gradients(model, forward, batch)
    assert fetched == [2, 3, 1, 0]  # the first two are still there from the way down
    assert forward.workspace.store is stream


def test_sixteen_bit_layers_are_refused() -> None:
    model = attach(tiny.model("llama"), LoraOptions(r=4, dtype=torch.float32), seed=0)
    with pytest.raises(ConfigError, match="4-bit"):
        offload_layers(model, model.get_base_model().model.layers, torch.device("cpu"))


@pytest.mark.gpu
def test_offloading_leaves_no_holes_on_the_device() -> None:
    """Scales that stay where they are, between codes that left, keep a page of 20 MiB each."""
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    device = torch.device("cuda")
    wide = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 3}  # as 70B
    config = CONFIG_MAPPING["llama"](**(tiny.GATED | wide))

    def unused() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    before = unused()
    model = attach(random_base(config, device), LoraOptions(r=4), seed=0)
    offload_layers(model, model.get_base_model().model.layers, device)
    assert unused() - before < 64 << 20
