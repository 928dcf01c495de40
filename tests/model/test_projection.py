"""The adapters inside the base product: one rounding instead of two."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlora_trainer.kernels import plain
from qlora_trainer.model.fused.projection import Member, Projection
from qlora_trainer.model.fused.workspace import Workspace

BF16 = torch.bfloat16


def test_a_small_update_is_not_rounded_away() -> None:
    """An update of a tenth of the output's rounding: added to the rounded output, most of it is lost."""
    m, k, n, r = 512, 256, 192, 8
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(BF16)

    x, weight = random(m, k, scale=1.0), random(n, k, scale=k**-0.5)
    a, b = random(r, k, scale=k**-0.5), random(n, r, scale=5e-4 * r**-0.5)
    workspace = Workspace(torch.device("cpu"), BF16)

    def product(b: Tensor) -> Tensor:
        member = Member("q", weight, nn.Parameter(a), nn.Parameter(b), 1.0)
        projection = Projection("q", [member], plain(), workspace, "q")
        wide = projection.input(m)
        wide.values.copy_(x)
        return projection.forward(wide, projection.project(wide))

    before = product(torch.zeros_like(b))
    update = x.float() @ a.float().T @ b.float().T
    apart = before + (x @ a.T) @ b.T  # as modules one after another do it

    def arrived(after: Tensor) -> float:
        return float(((after.float() - before.float()) * update).sum() / update.square().sum())

    assert abs(arrived(product(b)) - 1) < 0.1
    assert arrived(apart) < 0.6
