from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from qlora_trainer.checkpoint import rng


def _draw() -> list[object]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.standard_normal(3).tolist(),
        np.random.randint(0, 2**31),
        torch.randn(4).tolist(),
        torch.randperm(7).tolist(),
    ]


@pytest.mark.parametrize("odd", [False, True], ids=["no cached Gaussian", "one cached"])
def test_restored_generators_draw_the_same(odd: bool) -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    if odd:  # both libraries make Gaussians in pairs and keep the second one
        random.gauss(0, 1)
        np.random.standard_normal(1)
    states = rng.from_bytes(rng.to_bytes(rng.capture()))
    first = [_draw() for _ in range(3)]
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    rng.restore(states)
    assert [_draw() for _ in range(3)] == first


def test_states_of_all_ranks_have_one_length_and_stay_apart() -> None:
    states, sizes = [], set()
    for seed in range(4):
        random.seed(seed)
        torch.manual_seed(seed)
        for _ in range(seed):
            random.gauss(0, 1)
        states.append(rng.capture())
        sizes.add(rng.to_bytes(states[-1]).numel())
    assert len(sizes) == 1
    tensors = rng.for_ranks(states)
    for rank, state in enumerate(states):
        found = rng.of_rank(tensors, rank)
        assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    assert rng.of_rank(tensors, 4) == {}


@pytest.mark.gpu
def test_restored_cuda_generator_draws_the_same() -> None:
    torch.rand(3, device="cuda")
    states = rng.capture()
    first = torch.rand(5, device="cuda")
    rng.restore(states)
    assert torch.equal(torch.rand(5, device="cuda"), first)
