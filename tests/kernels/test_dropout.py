"""Dropout's masks: random as they should be, the same bits everywhere, and every kernel that makes them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qlora_trainer.kernels import Dropout, Operations, Target, plain, triton_set
from qlora_trainer.kernels.reference import _mixed, kept
from tests.kernels.test_operations import DEVICE, close, random, wide

PLAIN = plain()
GROUPS = ((4,), (8, 8, 8), (16, 3), (64, 64), (256, 16, 5))
SEED = 0x0123_4567_89AB_CDEF


@pytest.fixture(scope="module")
def fast() -> Operations:
    pytest.importorskip("triton")
    return triton_set()


def dropout(*ranks: int, rate: float = 0.3, seed: int = SEED, first: int = 5, row0: int = 7) -> Dropout:
    return Dropout(rate, torch.tensor(seed, device=DEVICE), first, ranks, row0)


def mask(rate: float, seed: int = SEED, first: int = 0, row0: int = 0, shape=(1024, 512)) -> Tensor:
    """The mask as a variable of mean 0 and variance 1."""
    seen = kept(dropout(1, rate=rate, seed=seed, first=first, row0=row0), 0, *shape).double().cpu()
    return (seen - (1 - rate)) / math.sqrt(rate * (1 - rate))


def deviation(*variables: Tensor) -> float:
    """How many standard deviations the sum of products of independent variables is from its mean, 0."""
    product = math.prod(variables[1:], start=variables[0])
    return abs(float(product.sum() / math.sqrt(product.numel())))


def test_mixing_is_32_bit_arithmetic_and_loses_nothing() -> None:
    numbers = [0, 1, 0x7FFF_FFFF, 0x8000_0000, 0xDEAD_BEEF, 0xFFFF_FFFF] * 3  # whole vectors, and a rest
    as_int32 = torch.tensor([x - (x >> 31 << 32) for x in numbers], dtype=torch.int32, device=DEVICE)
    for x, found in zip(numbers, (_mixed(as_int32).long() & 0xFFFF_FFFF).tolist(), strict=True):
        x ^= x >> 16
        x = x * 0x21F0AAAD % 2**32
        x ^= x >> 15
        x = x * 0xD35A2D97 % 2**32
        assert found == x ^ x >> 15
    spread = torch.arange(1 << 16, dtype=torch.int32, device=DEVICE) * 65537
    assert _mixed(spread).unique().numel() == 1 << 16


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_masks_keep_their_rate_and_know_nothing_of_each_other(rate: float) -> None:
    x = mask(rate)
    found = {"rate": deviation(x)}
    for d in (1, 2, 3, 8, 64):
        found[f"columns {d}"] = deviation(x[:, d:], x[:, :-d])
        found[f"rows {d}"] = deviation(x[d:], x[:-d])
        found[f"diagonals {d}"] = deviation(x[d:, d:], x[:-d, :-d])
    for other in (1, 2, 7, 224):
        found[f"adapter {other}"] = deviation(x, mask(rate, first=other))
    for seed in (SEED + 1, SEED ^ (1 << 32), SEED ^ (1 << 62)):
        found[f"seed {seed:x}"] = deviation(x, mask(rate, seed=seed))
    worst = max(found, key=lambda name: found[name])
    assert found[worst] < 4.5, (worst, found[worst])  # of 23: once in six thousand seeds
    for axis in (0, 1):  # no row or column has a rate of its own
        means = x.mean(axis)
        assert 0.8 < means.var() * x.shape[axis] < 1.2


def test_rectangles_are_not_dropped_together() -> None:
    """Four corners of a rectangle mix two rows with two columns: nothing of that must show."""
    x = mask(0.5, shape=(2048, 1024))
    for rows, columns in ((1, 1), (1, 2), (2, 2), (64, 32)):
        a, b = x[:-rows], x[rows:]
        corners = a[:, :-columns], a[:, columns:], b[:, :-columns], b[:, columns:]
        assert deviation(*corners) < 4.5


@pytest.mark.parametrize("rate", [0.0123, 0.05, 1 / 3])
def test_rates_are_met_to_one_in_a_hundred_thousand(rate: float) -> None:
    assert abs(dropout(1, rate=rate).threshold / 2**32 + 0.5 - rate) < 1e-5
    assert dropout(1, rate=rate).scale == 1 / (1 - rate)


def test_a_part_of_an_activation_has_its_part_of_the_mask() -> None:
    whole = kept(dropout(4, row0=0), 0, 50, 33)
    assert torch.equal(kept(dropout(4, row0=20), 0, 30, 33), whole[20:])
    assert torch.equal(kept(dropout(4, row0=0), 0, 50, 8), whole[:, :8])


@pytest.mark.parametrize("row0", [0, 7, 2**31 - 40])
@pytest.mark.parametrize("seed", [0, SEED, 2**63 - 2])
def test_kernels_make_the_references_masks_bit_for_bit(fast: Operations, seed: int, row0: int) -> None:
    """Each row of u says which elements of a row of x were seen: x is 2^column, and sums are exact."""
    m, k = 37, 23
    x = (2.0 ** torch.arange(k, device=DEVICE)).repeat(m, 1)
    drops = dropout(1, 1, 1, rate=0.5, seed=seed, row0=row0)
    out = wide(m, 3, 0)
    fast.project_dropped(x, torch.ones(3, k, device=DEVICE), drops, out)
    for adapter in range(3):
        expected = (kept(drops, adapter, m, k) * x).sum(1)
        assert torch.equal(out[:, adapter], expected * 2)


@pytest.mark.parametrize("ranks", GROUPS)
@pytest.mark.parametrize(("m", "k"), [(1, 40), (3, 123), (300, 200)])
def test_projection_of_what_is_left(fast: Operations, m: int, k: int, ranks: tuple[int, ...]) -> None:
    drops, r = dropout(*ranks), sum(ranks)
    x, a = random(m, k + 3)[:, :k], random(r + 2, k + 4, seed=1)[:, :k]
    x_seen = [x.double() * kept(drops, i, m, k) / 0.7 for i in range(len(ranks))]
    expected = torch.cat(
        [seen @ a[start:end].double().T for seen, (start, end) in zip(x_seen, drops.spans, strict=True)], 1
    )
    for operations in (PLAIN, fast):
        out = wide(m, r + 7, 5)
        operations.project_dropped(x, a, drops, out[:, : r + 7])
        close(out[:, :r], expected)
        assert (out[:, r : r + 7] == 0).all() and out[:, r + 7 :].isnan().all()


@pytest.mark.parametrize("ranks", GROUPS)
@pytest.mark.parametrize(("m", "k"), [(1, 40), (3, 123), (300, 200)])
def test_gradient_of_what_was_left(fast: Operations, m: int, k: int, ranks: tuple[int, ...]) -> None:
    drops, r = dropout(*ranks), sum(ranks)
    v, a = random(m, r + 5)[:, :r], random(r + 2, k + 4, seed=1)[:, :k]
    expected = random(m, k, seed=2).double()
    for i, (start, end) in enumerate(drops.spans):
        expected += kept(drops, i, m, k) * (v[:, start:end].double() @ a[start:end].double()) / 0.7
    for operations in (PLAIN, fast):
        dx = wide(m, k, 3)
        dx[:, :k] = random(m, k, seed=2)
        operations.add_dropped_(dx[:, :k], v, a, drops)
        close(dx[:, :k], expected)
        assert dx[:, k:].isnan().all()


@pytest.mark.parametrize("ranks", GROUPS)
@pytest.mark.parametrize(("m", "c"), [(1, 40), (77, 130), (300, 64)])
def test_adapter_grad_of_what_was_left(fast: Operations, m: int, c: int, ranks: tuple[int, ...]) -> None:
    drops, r = dropout(*ranks), sum(ranks)
    narrow, x = random(m, r + 3)[:, :r], random(m, c, seed=1)
    scale, factor = random(m, seed=2), random(c, seed=3)
    for row_scale, column_scale in ((None, None), (scale, factor)):
        left, right = narrow.double(), x.double() / 0.7
        if row_scale is not None:
            left, right = left * scale.double()[:, None], right * factor.double()
        for operations in (PLAIN, fast):
            found = [torch.ones(end - start, c, device=DEVICE) for start, end in drops.spans]
            targets = [
                Target(out, start, 0, 0.5, False) for out, (start, _) in zip(found, drops.spans, strict=True)
            ]
            operations.adapter_grad(narrow, x, row_scale, column_scale, targets, drops)
            for i, (start, end) in enumerate(drops.spans):
                expected = 0.5 * left[:, start:end].T @ (right * kept(drops, i, m, c))
                close(found[i] - 1, expected, 4e-5)


@pytest.mark.parametrize("rank", [4, 64, 256])
@pytest.mark.parametrize(("m", "f"), [(1, 96), (3, 123), (300, 200)])
def test_gated_unit_masks_only_the_down_projections_input(
    fast: Operations, m: int, f: int, rank: int
) -> None:
    drops = dropout(rank)
    gate_up, d_act = random(m, 2 * f), random(m, f, seed=1)
    v, u = random(m, rank, seed=2), random(m, 2 * rank, seed=3)
    act = wide(m, f, 0)
    PLAIN.glu(gate_up, "silu", act)
    for operations in (PLAIN, fast):
        grads, undropped = gate_up.clone(), gate_up.clone()
        of = [torch.zeros(rank, f, device=DEVICE)]
        of += [torch.zeros(f, rank, device=DEVICE) for _ in range(4)]
        ranks = ((0, rank), (rank, rank))
        down, gate, up = Target(of[0], 0, 0, 1.0, False), *(Target(t, 0, 0, 1.0, True) for t in of[1:3])
        operations.glu_backward_(d_act.clone(), grads, "silu", v, u, ranks, [down], [gate], [up], drops)
        gate, up = (Target(t, 0, 0, 1.0, True) for t in of[3:])
        operations.glu_backward_(d_act.clone(), undropped, "silu", v, u, ranks, [], [gate], [up])
        close(of[0], v.double().T @ (act.double() * kept(drops, 0, m, f)) / 0.7, 2e-5)
        close(of[1], of[3], 1e-6)
        close(of[2], of[4], 1e-6)
        assert torch.equal(grads, undropped)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_activations_are_rounded_once(fast: Operations, dtype: torch.dtype) -> None:
    drops, m, k = dropout(8, 8), 65, 130
    x, dx = random(m, k, dtype=dtype), random(m, k, seed=2, dtype=dtype)
    a, v = random(16, k, seed=1, dtype=dtype), random(m, 16, seed=3, dtype=dtype)
    found = []
    # Triton's interpreter multiplies the bits of bfloat16, not its values
    sets = (PLAIN, fast) if dtype == torch.float16 or DEVICE.type == "cuda" else (PLAIN,)
    for operations in sets:
        u, back = wide(m, 16, 0, dtype), dx.clone()
        operations.project_dropped(x, a, drops, u)
        operations.add_dropped_(back, v, a, drops)
        found.append((u, back))
    exact = wide(m, 16, 0), dx.float()
    PLAIN.project_dropped(x.float(), a.float(), drops, exact[0])
    PLAIN.add_dropped_(exact[1], v.float(), a.float(), drops)
    one_rounding = 0.6 * torch.finfo(dtype).eps
    for pair in found:
        for value, truth in zip(pair, exact, strict=True):
            close(value, truth, one_rounding)
