"""Paged state on a GPU: same bits wherever the pages live, memory really given back, no waiting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from qlora_trainer.optim.adamw import AdamW
from qlora_trainer.optim.managed import BnbPagedAdamW

pytestmark = pytest.mark.gpu

SHAPES = [(16, 4096), (1000,), (4096, 16), (3, 7), (64, 1024)]  # 197k elements in pages of 8192
PAGE = 8192
HYPER = {"betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.05}


def make_parameters(dtype: torch.dtype = torch.bfloat16) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        str(i): nn.Parameter(torch.randn(shape, generator=generator).to("cuda", dtype))
        for i, shape in enumerate(SHAPES)
    }


def make(
    parameters: dict[str, nn.Parameter], bits: int, resident_bytes: int | None, paged: bool = True
) -> AdamW:
    return AdamW(
        parameters.items(),
        state_bits=bits,
        paged=paged,
        resident_bytes=resident_bytes,
        page_elements=PAGE,
        **HYPER,
    )


def set_gradients(optimizer: AdamW | BnbPagedAdamW, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for span in optimizer.gradients.spans:
        gradient = torch.randn(span.parameter.shape, generator=generator)
        span.parameter.main_grad.copy_(gradient)


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bits", [32, 8])
def test_result_does_not_depend_on_where_pages_live(bits: int) -> None:
    states, weights = [], []
    for resident, paged, release_at in (
        (None, False, -1),
        (None, True, 3),
        (0, True, -1),
        (500_000, True, 5),
    ):
        parameters = make_parameters()
        optimizer = make(parameters, bits, resident, paged)
        for step in range(8):
            if step == release_at:
                optimizer.release_gpu_pages()
            set_gradients(optimizer, step)
            optimizer.step(1e-2, 0.3)
        states.append(optimizer.state_tensors())
        weights.append({key: parameter.detach().clone() for key, parameter in parameters.items()})
        hosts = [page.on_host for page in optimizer.pages.pages]
        assert any(hosts) == (paged and (resident is not None or release_at >= 0))
        for page in optimizer.pages.pages:
            assert all(tensor.is_pinned() == page.on_host for tensor in page.tensors.values())
    for state, weight in zip(states[1:], weights[1:], strict=True):
        assert all(torch.equal(state[key], states[0][key]) for key in states[0])
        assert all(torch.equal(weight[key], weights[0][key]) for key in weight)


def test_paged_update_equals_torch_adamw() -> None:
    ours, theirs = make_parameters(torch.float32), make_parameters(torch.float32)
    optimizer = make(ours, 32, 0)
    reference = torch.optim.AdamW(theirs.values(), lr=1e-2, **HYPER)
    for step in range(10):
        set_gradients(optimizer, step)
        for key, parameter in theirs.items():
            parameter.grad = ours[key].main_grad.clone()
        norm = optimizer.step(1e-2, 0.3)
        torch.testing.assert_close(
            norm, torch.nn.utils.clip_grad_norm_(theirs.values(), 0.3), rtol=1e-6, atol=0
        )
        reference.step()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("resident", [None, 0])
def test_step_never_waits_for_the_device(bits: int, resident: int | None) -> None:
    optimizer = make(make_parameters(), bits, resident)
    set_gradients(optimizer, 0)
    optimizer.step(1e-2, 0.3)
    torch.cuda.synchronize()
    with no_waiting():
        optimizer.step(1e-2, 0.3)
        optimizer.zero_grad()


@pytest.mark.parametrize("bits", [32, 8])
def test_non_finite_gradient_changes_no_bit_of_paged_state(bits: int) -> None:
    parameters = make_parameters()
    optimizer = make(parameters, bits, 0)
    set_gradients(optimizer, 0)
    optimizer.step(1e-2, 0.3)
    before = optimizer.state_tensors()
    weights = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    optimizer.grad[100] = float("inf")
    assert not torch.isfinite(optimizer.step(1e-2, 0.3))
    after = optimizer.state_tensors()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(weights[key], parameters[key]) for key in weights)


def test_paged_state_resumes_resident_bit_for_bit() -> None:
    paged = make(first := make_parameters(), 32, 0)
    for step in range(3):
        set_gradients(paged, step)
        paged.step(1e-2)
    resident = make(second := make_parameters(), 32, None, paged=False)
    resident.load_state_tensors(paged.state_tensors())
    for optimizer in (paged, resident):
        set_gradients(optimizer, 3)
        optimizer.step(1e-2)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_release_gives_the_memory_back() -> None:
    weight = {"w": nn.Parameter(torch.zeros(1 << 24, device="cuda", dtype=torch.bfloat16))}
    optimizer = AdamW(weight.items(), paged=True, **HYPER)
    before = torch.cuda.memory_allocated()
    freed = optimizer.release_gpu_pages()
    state = 12 << 24
    assert optimizer.pages.nbytes()["host"] == state and freed > 0.5 * state
    assert before - torch.cuda.memory_allocated() == freed
    assert optimizer.release_gpu_pages() == 0


def test_bitsandbytes_adapter_pages_and_agrees() -> None:
    ours, theirs = make_parameters(), make_parameters()
    hyper = HYPER | {"weight_decay": 0.0}  # its kernel decays after the update, PyTorch's before
    one, other = AdamW(ours.items(), **hyper), BnbPagedAdamW(theirs.items(), **hyper)
    for step in range(4):
        for optimizer in (one, other):
            set_gradients(optimizer, step)
            optimizer.step(1e-2, 0.3)
    states = one.state_tensors(), other.state_tensors()
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-4, atol=1e-6)
    assert getattr(other.inner.state[other.master]["state1"], "is_paged", False)
