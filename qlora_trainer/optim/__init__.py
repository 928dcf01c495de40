"""The optimizer room: adapters' gradients in, updated adapters out; owns all optimizer state.

gradients.py   one flat float32 gradient buffer that every parameter's `main_grad` is a view of
pages.py       where the state lives: fixed pages on the device or in pinned host memory
adamw.py       AdamW over those pages: float32 masters, 32- or 8-bit moments
update.py      what a step applies to every page, and the float32 update
eight_bit.py   the update of 8-bit moments
managed.py     bitsandbytes' own paged AdamW behind the same interface, for comparison
state.py       the check of a saved state before it is loaded
schedule.py    step -> learning rate
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from qlora_trainer.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from qlora_trainer.optim.adamw import AdamW
    from qlora_trainer.optim.managed import BnbPagedAdamW

NAMES = ("paged_adamw_32bit", "paged_adamw_8bit", "adamw", "adamw_8bit", "bnb_paged_adamw_32bit")


def make_optimizer(
    name: str,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    resident_bytes: int | None = None,
) -> AdamW | BnbPagedAdamW:
    """The optimizer that a recipe's `optim.name` means.

    `resident_bytes` bounds how much of a paged optimizer's state may stay on the device (None: all
    of it, until `release_gpu_pages`).

    Raises:
        ConfigError: for a name that is not in `NAMES`.
    """
    if name not in NAMES:
        raise ConfigError(f"optim.name={name!r} is not an optimizer; choose one of {', '.join(NAMES)}")
    if name == "bnb_paged_adamw_32bit":
        from qlora_trainer.optim.managed import BnbPagedAdamW

        return BnbPagedAdamW(named_parameters, betas=betas, eps=eps, weight_decay=weight_decay)
    from qlora_trainer.optim.adamw import AdamW

    return AdamW(
        named_parameters,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        state_bits=8 if name.endswith("8bit") else 32,
        paged=name.startswith("paged"),
        resident_bytes=resident_bytes,
    )
