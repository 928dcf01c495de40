"""AdamW over pages: same numbers as PyTorch's, no step on bad gradients, exact state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from qlora_trainer.errors import CheckpointError, ConfigError
from qlora_trainer.optim import NAMES, make_optimizer
from qlora_trainer.optim.adamw import AdamW

SHAPES = {"a": (8, 96), "b": (700,), "c": (31, 17), "scalar": (), "d": (3, 1, 5)}  # odd, and across pages
HYPER = {"betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.05}


def make_parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def make(parameters: dict[str, nn.Parameter], state_bits: int = 32, page_elements: int = 512) -> AdamW:
    return AdamW(parameters.items(), state_bits=state_bits, page_elements=page_elements, **HYPER)


def accumulate(parameters: dict[str, nn.Parameter], step: int) -> None:
    for name, gradient in gradients(step).items():
        parameters[name].main_grad.copy_(gradient)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.3, 1e6])
@pytest.mark.parametrize("name", NAMES)
def test_update_equals_torch_adamw(name: str, max_grad_norm: float) -> None:
    ours, theirs = make_parameters(), make_parameters()
    optimizer = make_optimizer(name, ours.items(), **HYPER)
    reference = torch.optim.AdamW(theirs.values(), lr=1.0, **HYPER)
    eight_bit = name.endswith("8bit")
    for step in range(4 if eight_bit else 20):
        lr = 1e-2 / (step + 1)
        accumulate(ours, step)
        for key, gradient in gradients(step).items():
            theirs[key].grad = gradient
        norm = optimizer.step(lr, max_grad_norm)
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), max_grad_norm or float("inf"))
        reference.param_groups[0]["lr"] = lr
        reference.step()
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        for key in SHAPES:
            difference = (ours[key] - theirs[key]).abs()
            # 8-bit moments: a few percent of what was moved, on average.
            assert difference.max() < (5e-3 if eight_bit else 1e-6)
            assert difference.mean() < (1e-3 if eight_bit else 1e-6)
    assert optimizer.steps == (4 if eight_bit else 20)


def test_8bit_update_equals_bitsandbytes() -> None:
    import bitsandbytes as bnb

    ours, theirs = ({"w": nn.Parameter(torch.linspace(-1, 1, 8192))} for _ in range(2))
    optimizer = AdamW(ours.items(), state_bits=8, **HYPER)
    reference = bnb.optim.AdamW8bit(theirs.values(), lr=1e-2, min_8bit_size=0, **HYPER)
    for step in range(5):
        gradient = torch.randn(8192, generator=torch.Generator().manual_seed(step))
        ours["w"].main_grad.copy_(gradient)
        theirs["w"].grad = gradient
        optimizer.step(1e-2)
        reference.step()
    state = reference.state[theirs["w"]]
    codes = optimizer.state_tensors()
    agree = (codes["exp_avg.w"] == state["state1"]).float().mean()
    assert agree > 0.98, agree  # codes at a boundary may fall either way
    torch.testing.assert_close(codes["exp_avg_absmax.w"], state["absmax1"], rtol=1e-2, atol=0)
    moved = (theirs["w"] - torch.linspace(-1, 1, 8192)).abs().mean()
    assert (ours["w"] - theirs["w"]).abs().mean() < 1e-2 * moved


@pytest.mark.parametrize("state_bits", [32, 8])
def test_result_does_not_depend_on_pages(state_bits: int) -> None:
    results = []
    for resident_bytes, page_elements in ((None, 1024), (0, 256), (0, 1 << 20), (8000, 512)):
        parameters = make_parameters()
        optimizer = AdamW(
            parameters.items(),
            state_bits=state_bits,
            paged=True,
            resident_bytes=resident_bytes,
            page_elements=page_elements,
            **HYPER,
        )
        for step in range(4):
            if step == 2:
                optimizer.release_gpu_pages()
            accumulate(parameters, step)
            optimizer.step(1e-2, 0.3)
        results.append(optimizer.state_tensors())
        assert all(torch.equal(parameters[key], results[-1][f"master.{key}"]) for key in parameters)
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(torch.equal(other[key], results[0][key]) for key in other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_non_finite_gradient_changes_no_bit(name: str, bad: float) -> None:
    parameters = make_parameters(torch.bfloat16)
    optimizer = make_optimizer(name, parameters.items(), **HYPER)
    accumulate(parameters, 0)
    optimizer.step(1e-2, 0.3)
    before = optimizer.state_tensors()
    weights = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    accumulate(parameters, 1)
    optimizer.grad[5] = bad
    norm = optimizer.step(1e-2, 0.3)
    assert not torch.isfinite(norm)
    after = optimizer.state_tensors()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(weights[key], parameters[key]) for key in weights)
    optimizer.zero_grad()
    accumulate(parameters, 2)
    assert torch.isfinite(optimizer.step(1e-2, 0.3))
    assert optimizer.steps == 2


@pytest.mark.parametrize("name", NAMES)
def test_restored_state_continues_bit_for_bit(name: str) -> None:
    through, resumed = make_parameters(torch.bfloat16), make_parameters(torch.bfloat16, seed=1)
    one = make_optimizer(name, through.items(), **HYPER)
    for step in range(6):
        if step == 3:
            saved = one.state_tensors()
        accumulate(through, step)
        one.step(1e-2, 0.3)
    two = make_optimizer(name, resumed.items(), **HYPER)
    accumulate(resumed, 9)
    two.step(1e-2, 0.3)  # whatever was there before must not matter
    two.load_state_tensors(saved)
    for step in range(3, 6):
        two.zero_grad()
        accumulate(resumed, step)
        two.step(1e-2, 0.3)
    first, second = one.state_tensors(), two.state_tensors()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(through[key], resumed[key]) for key in SHAPES)


def test_released_state_is_not_kept_alive() -> None:
    parameters = make_parameters()
    optimizer = AdamW(parameters.items(), paged=True, page_elements=512)
    optimizer.step(1e-2)
    storages = [StorageWeakRef(t.untyped_storage()) for t in optimizer.pages.pages[0].tensors.values()]
    assert not any(storage.expired() for storage in storages)
    optimizer.release_gpu_pages()
    assert all(storage.expired() for storage in storages)


def test_state_does_not_alias_the_optimizer() -> None:
    parameters = make_parameters()
    optimizer = make(parameters)
    saved = optimizer.state_tensors()
    accumulate(parameters, 0)
    optimizer.step(1e-2)
    assert int(saved["step"]) == 0 and torch.equal(saved["master.a"], make_parameters()["a"])


def test_masters_start_as_the_parameter_and_parameters_are_rounded_masters() -> None:
    parameters = make_parameters(torch.bfloat16)
    start = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    optimizer = make(parameters)
    state = optimizer.state_tensors()
    assert all(torch.equal(state[f"master.{key}"], start[key].float()) for key in start)
    for step in range(5):
        accumulate(parameters, step)
        optimizer.step(1e-5)  # far below bfloat16's resolution: only masters can hold it
    state = optimizer.state_tensors()
    for key in start:
        assert torch.equal(parameters[key], state[f"master.{key}"].bfloat16())
    assert not torch.equal(state["master.a"], start["a"].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_backward_accumulates_in_float32_and_frees_grad(dtype: torch.dtype) -> None:
    parameters = make_parameters(dtype)
    optimizer = make(parameters)
    weight = parameters["a"]
    inputs = [torch.randn(8, 96).to(dtype) for _ in range(3)]
    for x in inputs:
        (weight * x).sum().backward()
        assert weight.grad is None
    assert torch.equal(weight.main_grad, inputs[0].float() + inputs[1].float() + inputs[2].float())
    optimizer.zero_grad()
    assert not optimizer.grad.any()


def test_detached_parameters_are_as_they_were() -> None:
    parameters = make_parameters()
    make(parameters).gradients.detach()
    parameters["a"].sum().backward()
    assert torch.equal(parameters["a"].grad, torch.ones(8, 96)) and not hasattr(parameters["a"], "main_grad")


def test_frozen_parameters_are_left_out() -> None:
    parameters = make_parameters()
    parameters["b"].requires_grad_(False)
    optimizer = make(parameters)
    assert "master.b" not in optimizer.state_tensors() and not hasattr(parameters["b"], "main_grad")


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "dtype"])
def test_state_of_another_run_is_refused_untouched(damage: str) -> None:
    parameters = make_parameters()
    optimizer = make(parameters)
    state = optimizer.state_tensors()
    if damage == "missing":
        del state["exp_avg.c"]
    elif damage == "unknown":
        state["exp_avg.z"] = torch.zeros(1)
    elif damage == "shape":
        state["exp_avg.c"] = state["exp_avg.c"].T
    else:
        state["exp_avg.c"] = state["exp_avg.c"].to(torch.uint8)
    state["master.a"] = torch.zeros_like(state["master.a"])
    with pytest.raises(CheckpointError, match=r"exp_avg\.(c|z)"):
        optimizer.load_state_tensors(state)
    assert parameters["a"].any()


def test_moved_parameter_is_noticed() -> None:
    parameters = make_parameters()
    optimizer = make(parameters)
    parameters["a"].data = parameters["a"].data.clone()
    with pytest.raises(AssertionError, match="a moved"):
        optimizer.step(1e-2)


def test_unknown_name_is_an_error() -> None:
    with pytest.raises(ConfigError, match="paged_adamw_32bit"):
        make_optimizer("adamw_torch", make_parameters().items())


def test_eight_bit_state_is_a_quarter() -> None:
    weight = {"w": nn.Parameter(torch.zeros(1 << 16))}
    bytes_of = {
        bits: AdamW(weight.items(), state_bits=bits).pages.nbytes()["device"] / (1 << 16) for bits in (32, 8)
    }
    assert bytes_of == {32: 12.0, 8: 4 + 2 * (1 + 4 / 256)}
