"""bitsandbytes' own paged AdamW behind our interface: `optim.name=bnb_paged_adamw_32bit`.

For comparison with the original QLoRA runs. What it pages are the two moments, in CUDA managed
memory, which the driver evicts under pressure and faults back one 2 MiB page at a time. What it does
not page: the float32 masters and gradients, and, used the usual way, every tensor under 1e5
elements (with r=8 on a 7B model that is all of them). Here it is given one flat master, so no
tensor is too small. It waits for the device at every step, to know whether the gradient is finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from qlora_trainer.optim.gradients import FlatGradients
from qlora_trainer.optim.state import check_state

FIELDS = ("master", "exp_avg", "exp_avg_sq")


class BnbPagedAdamW:
    """The interface of `qlora_trainer.optim.adamw.AdamW` over `bitsandbytes.optim.PagedAdamW32bit`."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.gradients = FlatGradients(named_parameters)
        self.grad = self.gradients.buffer
        self.master = nn.Parameter(torch.zeros_like(self.grad))
        for span in self.gradients.spans:
            self.master.data[span.start : span.stop] = span.parameter.detach().reshape(-1)
        self.inner = bnb.optim.PagedAdamW32bit([self.master], betas=betas, eps=eps, weight_decay=weight_decay)
        self.inner.init_state(self.inner.param_groups[0], self.master, 0, 0)

    @torch.no_grad()
    def step(self, lr: float, max_grad_norm: float = 0.0) -> Tensor:
        """As `AdamW.step`, but waits for the device."""
        self.gradients.check_storage()
        norm = self.gradients.norm()
        if not torch.isfinite(norm):
            return norm
        if max_grad_norm > 0:
            self.grad.mul_((max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        self.master.grad = self.grad
        self.inner.param_groups[0]["lr"] = lr
        self.inner.step()
        self._write_parameters()
        return norm

    def _write_parameters(self) -> None:
        spans = self.gradients.spans
        torch._foreach_copy_(
            [span.parameter.detach() for span in spans],
            [self.master.detach()[span.start : span.stop].view_as(span.parameter) for span in spans],
        )

    def zero_grad(self) -> None:
        self.gradients.zero()

    def release_gpu_pages(self) -> int:
        """Nothing to do: the driver evicts managed memory by itself."""
        return 0

    @property
    def steps(self) -> int:
        return int(self.inner.state[self.master]["step"])

    def _tensors(self) -> dict[str, Tensor]:
        state = self.inner.state[self.master]
        flat = dict(zip(FIELDS, (self.master.detach(), state["state1"], state["state2"]), strict=True))
        return {
            f"{name}.{span.name}": tensor[span.start : span.stop].view_as(span.parameter)
            for span in self.gradients.spans
            for name, tensor in flat.items()
        }

    def state_tensors(self) -> dict[str, Tensor]:
        """As `AdamW.state_tensors` with 32-bit moments."""
        state = {key: tensor.to("cpu", copy=True) for key, tensor in self._tensors().items()}
        return {"step": torch.tensor(self.steps, dtype=torch.int64), **state}

    @torch.no_grad()
    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """As `AdamW.load_state_tensors`; the moments stay paged, unlike after `load_state_dict`."""
        own = self._tensors()
        check_state(state, {key: (tensor.dtype, tensor.shape) for key, tensor in own.items()})
        for key, tensor in own.items():
            tensor.copy_(state[key])
        self.inner.state[self.master]["step"] = int(state["step"])
        self._write_parameters()
