"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) on float32 masters of the adapters.

In: trainable parameters, and their gradients in `main_grad`. Out: updated parameters, each the
round-to-nearest of its float32 master. Clipping and the skipping of non-finite gradients happen on
the device; no call here waits for it, except those that read or write the state as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qlora_trainer.optim.gradients import ALIGNMENT, FlatGradients, Span
from qlora_trainer.optim.pages import PAGE_ELEMENTS, Field, Page, Pages
from qlora_trainer.optim.state import check_state
from qlora_trainer.optim.update import Update, adamw_

if TYPE_CHECKING:
    from qlora_trainer.optim.eight_bit import EightBitUpdate

FIELDS = {
    32: {"master": Field(torch.float32), "exp_avg": Field(torch.float32), "exp_avg_sq": Field(torch.float32)},
    8: {
        "master": Field(torch.float32),
        "exp_avg": Field(torch.uint8, fill=127),  # the code of zero in the signed map
        "exp_avg_absmax": Field(torch.float32, ALIGNMENT),
        "exp_avg_sq": Field(torch.uint8),
        "exp_avg_sq_absmax": Field(torch.float32, ALIGNMENT),
    },
}


@dataclass
class _Copies:
    """Views that write a page's master (at address `master`) into the parameters it belongs to.

    A parameter may lie across pages. Kept from step to step: making thousands of views takes the host
    longer than the update takes the device.
    """

    master: int
    targets: list[Tensor]
    sources: list[Tensor]


class AdamW:
    """AdamW with float32 masters and float32 or 8-bit moments, resident or paged.

    With 32-bit moments the update is that of `torch.optim.AdamW(fused=True)`, whose kernel it calls;
    the result is bit-equal wherever the pages live. Weight decay applies to every parameter.

    Args:
        named_parameters: those that require no gradient are ignored; all others on one device.
        betas, eps, weight_decay: as `torch.optim.AdamW`.
        state_bits: 32 or 8, of the two moments; masters always have 32.
        paged: state may leave the device (on a CPU: it is only held in more pieces).
        resident_bytes: of the state that stays on the device when paged; None: all of it, until
            `release_gpu_pages`.

    Attributes:
        grad: float32 [numel], all gradients of this process; several processes sum it before `step`.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_bits: int = 32,
        paged: bool = False,
        resident_bytes: int | None = None,
        page_elements: int = PAGE_ELEMENTS,
    ) -> None:
        self.betas, self.eps, self.weight_decay, self.paged = betas, eps, weight_decay, paged
        self.gradients = FlatGradients(named_parameters)
        self.grad = self.gradients.buffer
        device = self.gradients.device
        self.pages = Pages(
            self.grad.numel(),
            FIELDS[state_bits],
            device,
            resident_bytes=resident_bytes if paged else None,
            page_elements=page_elements,
        )
        self._steps = torch.zeros((), dtype=torch.float32, device=device)
        self._copies: dict[int, _Copies] = {}  # by the page's start
        self._eight_bit = _eight_bit_update(device) if state_bits == 8 else None
        for span in self.gradients.spans:
            self.pages.write("master", span.start, span.parameter.detach().float().reshape(-1))

    @torch.no_grad()
    def step(self, lr: float, max_grad_norm: float = 0.0) -> Tensor:
        """Clip by the global norm (0: not at all), update masters, write parameters.

        Returns the gradient norm before clipping, a float32 scalar on the device. If it is not
        finite, masters, moments, step count and parameters stay bit for bit as they are.
        """
        self.gradients.check_storage()
        norm = self.gradients.norm()
        finite = torch.isfinite(norm)
        self._steps += finite
        # torch.nn.utils.clip_grad_norm_ multiplies by min(1, max/(norm+1e-6)); the kernels divide.
        divisor = (norm + 1e-6) / max_grad_norm if max_grad_norm > 0 else torch.ones_like(norm)
        update = Update(
            lr,
            self.betas,
            self.eps,
            self.weight_decay,
            self._steps,
            divisor.clamp(min=1.0),
            (~finite).float(),
        )
        for page in self.pages.stream():
            gradient, state = self.grad[page.start : page.stop], page.tensors
            if self._eight_bit is not None:
                self._eight_bit(state, gradient, update)
            else:
                adamw_(state["master"], gradient, state["exp_avg"], state["exp_avg_sq"], update)
            self._write_parameters(page)
        return norm

    def _write_parameters(self, page: Page) -> None:
        """Parameters become the round-to-nearest-even of their masters (exact for float32)."""
        master = page.tensors["master"]
        copies = self._copies.get(page.start)
        if copies is None or copies.master != master.data_ptr():
            copies = self._copies[page.start] = self._copies_of(page, master)
        if copies.targets:
            torch._foreach_copy_(copies.targets, copies.sources)

    def _copies_of(self, page: Page, master: Tensor) -> _Copies:
        copies = _Copies(master.data_ptr(), [], [])
        for span in self.gradients.spans:
            first, last = max(span.start, page.start), min(span.stop, page.stop)
            if first < last:
                flat = span.parameter.detach().view(-1)
                copies.targets.append(flat[first - span.start : last - span.start])
                copies.sources.append(master[first - page.start : last - page.start])
        return copies

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        self.gradients.zero()

    def release_gpu_pages(self) -> int:
        """Move all paged state to the host, after an out-of-memory error; returns the bytes freed."""
        self._copies.clear()  # views that would keep the state alive
        return self.pages.release() if self.paged else 0

    @property
    def steps(self) -> int:
        """Updates made, skipped ones not counted. Waits for the device."""
        return int(self._steps.item())

    def state_tensors(self) -> dict[str, Tensor]:
        """CPU copies of the whole state: `<field>.<parameter>` and `step` (int64 []). Waits for the device.

        `master`, `exp_avg` and `exp_avg_sq` have the parameter's shape (float32; 8-bit moments
        uint8); `exp_avg_absmax` and `exp_avg_sq_absmax` are float32 [blocks of 256 elements].
        """
        state = {"step": torch.tensor(self.steps, dtype=torch.int64)}
        for key, name, span in self._keys():
            values = self.pages.read(name, span.start, self._stop(name, span))
            state[key] = values.view_as(span.parameter) if self._per_element(name) else values
        return state

    @torch.no_grad()
    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` gave, bit for bit, and write the parameters from the masters.

        Raises:
            CheckpointError: if a tensor is missing, unknown, or of another shape or dtype; nothing
                is changed then.
        """
        check_state(
            state,
            {
                key: (self.pages.fields[name].dtype, self._shape(name, span))
                for key, name, span in self._keys()
            },
        )
        for key, name, span in self._keys():
            self.pages.write(name, span.start, state[key].reshape(-1))
        self._steps.copy_(state["step"])
        for span in self.gradients.spans:
            span.parameter.copy_(state[f"master.{span.name}"])

    def _keys(self) -> Iterable[tuple[str, str, Span]]:
        for span in self.gradients.spans:
            for name in self.pages.fields:
                yield f"{name}.{span.name}", name, span

    def _per_element(self, name: str) -> bool:
        return self.pages.fields[name].elements_per_entry == 1

    def _stop(self, name: str, span: Span) -> int:
        return span.stop if self._per_element(name) else -(-span.stop // ALIGNMENT) * ALIGNMENT

    def _shape(self, name: str, span: Span) -> torch.Size:
        if self._per_element(name):
            return span.parameter.shape
        return torch.Size([self.pages.fields[name].entries(self._stop(name, span) - span.start)])


def _eight_bit_update(device: torch.device) -> EightBitUpdate:
    from qlora_trainer.optim.eight_bit import EightBitUpdate  # imports bitsandbytes

    return EightBitUpdate(device)
