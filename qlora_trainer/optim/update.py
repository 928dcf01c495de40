"""What one optimizer step applies to every page, and its application in float32."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Update:
    """Hyperparameters and device scalars of one step.

    Attributes:
        steps: float32 [], updates made, this one included.
        divisor: float32 [], what clipping divides gradients by; 1 where nothing is clipped.
        skip: float32 [], 1 if the gradient is not finite and nothing may change, else 0.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    steps: Tensor
    divisor: Tensor
    skip: Tensor

    @cached_property
    def bias(self) -> Tensor:
        """float32 [2]: 1 - beta1^t, √(1 - beta2^t), made in float64 because 1 - 0.999 cancels."""
        betas = [1 - beta ** self.steps.double() for beta in self.betas]
        return torch.stack((betas[0], betas[1].sqrt())).float()


def adamw_(master: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, update: Update) -> None:
    """The kernel of `torch.optim.AdamW(fused=True)`, in place; it also stores the clipped gradient."""
    torch._fused_adamw_(
        [master],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [update.steps],
        lr=update.lr,
        beta1=update.betas[0],
        beta2=update.betas[1],
        weight_decay=update.weight_decay,
        eps=update.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=update.divisor,
        found_inf=update.skip,
    )
