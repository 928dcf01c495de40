"""The one-launch 8-bit update is the composed one, on whichever device Triton runs here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_trainer.kernels.adamw_8bit import adamw_8bit_, borders
from qlora_trainer.optim.eight_bit import MOMENTS, EightBitUpdate
from qlora_trainer.optim.update import Update

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCKS = 7  # not a multiple of what a program takes


def make_page(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n = BLOCKS * 256
    page = {
        "master": torch.randn(n, generator=generator),
        "exp_avg": torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator),
        "exp_avg_absmax": torch.rand(BLOCKS, generator=generator),
        "exp_avg_sq": torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator),
        "exp_avg_sq_absmax": torch.rand(BLOCKS, generator=generator),
    }
    for name in MOMENTS:  # a block that has never moved
        page[f"{name}_absmax"][2] = 0.0
    return {name: tensor.to(DEVICE) for name, tensor in page.items()}


def make_update(skip: bool = False) -> Update:
    scalars = [torch.tensor(value, device=DEVICE) for value in (3.0, 1.7, float(skip))]
    return Update(1e-2, (0.9, 0.98), 1e-8, 0.05, *scalars)


def run_kernel(page: dict[str, Tensor], gradient: Tensor, update: Update) -> dict[str, Tensor]:
    """Runs the kernel; returns the maps of the two moments."""
    codes = EightBitUpdate(DEVICE).codes
    tables = {name: (code, borders(code)) for name, code in codes.items()}
    scalars = (update.divisor, update.skip, update.bias)
    adamw_8bit_(page, gradient, tables, scalars, update.lr, update.betas, update.eps, update.weight_decay)
    return codes


@pytest.mark.parametrize("zero_gradient", [False, True])
def test_kernel_equals_composed_update(zero_gradient: bool) -> None:
    one, other = make_page(0), make_page(0)
    gradient = torch.randn(BLOCKS * 256, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    gradient[2 * 256 : 3 * 256] *= not zero_gradient
    EightBitUpdate(DEVICE).composed(one, gradient.clone(), make_update())
    codes = run_kernel(other, gradient.clone(), make_update())
    torch.testing.assert_close(other["master"], one["master"], rtol=1e-6, atol=1e-6)
    for name in MOMENTS:
        torch.testing.assert_close(other[f"{name}_absmax"], one[f"{name}_absmax"], rtol=1e-6, atol=0)
        live = one[f"{name}_absmax"].repeat_interleave(256) > 0  # a code of a zero block means nothing
        theirs, ours = (codes[name][page[name].int()][live] for page in (one, other))
        assert (theirs == ours).float().mean() > 0.98
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.015)  # the widest step of a map


def test_codes_are_the_nearest() -> None:
    page = make_page(0)
    page["exp_avg_absmax"].zero_()  # so that the moment is a tenth of the gradient
    gradient = torch.randn(BLOCKS * 256, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    update = make_update()
    codes = run_kernel(page, gradient, update)
    moment = (1 - 0.9) * gradient / update.divisor
    scaled = moment / page["exp_avg_absmax"].repeat_interleave(256)
    distance = (scaled[:, None] - codes["exp_avg"][None]).abs()
    chosen = distance.gather(1, page["exp_avg"].long()[:, None]).squeeze(1)
    assert (chosen <= distance.min(dim=1).values + 1e-7).all()


def test_every_code_survives_decoding_and_encoding() -> None:
    """Each value of a map is nearest to itself, at both ends too."""
    for name, code in EightBitUpdate(DEVICE).codes.items():
        assert (code[1:] > code[:-1]).all() and borders(code).isinf().sum() == 1
        assert torch.equal(torch.searchsorted(borders(code), code), torch.arange(256, device=DEVICE)), name


def test_skipped_update_changes_no_bit() -> None:
    page, before = make_page(0), make_page(0)
    gradient = torch.full((BLOCKS * 256,), float("nan"), device=DEVICE)
    run_kernel(page, gradient, make_update(skip=True))
    assert all(torch.equal(page[name], before[name]) for name in page)
