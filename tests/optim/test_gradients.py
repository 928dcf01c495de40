"""The flat gradient buffer's norm, which clipping divides by, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_trainer.optim.adamw import AdamW
from qlora_trainer.optim.gradients import NORM_BLOCK, FlatGradients


def of_size(elements: int) -> tuple[nn.Parameter, FlatGradients]:
    parameter = nn.Parameter(torch.zeros(elements))
    return parameter, FlatGradients([("a", parameter)])


@pytest.mark.parametrize("elements", [1, 256, NORM_BLOCK, NORM_BLOCK + 1, 3 * NORM_BLOCK, 20_000_000])
def test_the_norm_is_float64s(elements: int) -> None:
    """One float32 sum over 20M elements is 0.1% low."""
    _, gradients = of_size(elements)
    gradients.buffer[:elements].normal_(generator=torch.Generator().manual_seed(0))
    exact = sum(part.double().square().sum() for part in gradients.buffer.split(1 << 20)) ** 0.5
    assert float(gradients.norm()) == pytest.approx(float(exact), rel=1e-6)


def test_the_norm_of_a_small_buffer_is_one_float32_sum() -> None:
    """What adapters of tiny models have always had, to the last bit."""
    _, gradients = of_size(NORM_BLOCK - 300)
    gradients.buffer.normal_(generator=torch.Generator().manual_seed(0))
    assert torch.equal(gradients.norm(), torch.linalg.vector_norm(gradients.buffer))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_anywhere_is_seen(value: float) -> None:
    _, gradients = of_size(2 * NORM_BLOCK + 256)
    for place in (0, NORM_BLOCK, 2 * NORM_BLOCK + 255):
        gradients.zero()
        gradients.buffer[place] = value
        assert not torch.isfinite(gradients.norm())


def test_clipping_divides_by_the_right_norm() -> None:
    """A clipped gradient of many elements has the norm that was asked for (0.1% over it before)."""
    parameter = nn.Parameter(torch.zeros(20_000_000))
    optimizer = AdamW([("a", parameter)], page_elements=1 << 22)
    optimizer.grad.normal_(generator=torch.Generator().manual_seed(0))
    optimizer.step(lr=0.0, max_grad_norm=2.0)  # the kernel leaves the clipped gradient in the buffer
    clipped = sum(part.double().square().sum() for part in optimizer.grad.split(1 << 20)) ** 0.5
    assert float(clipped) == pytest.approx(2.0, rel=1e-5)
