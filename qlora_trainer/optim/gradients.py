"""Gradients of all trainable parameters in one flat float32 buffer.

In: named parameters. Out: `FlatGradients.buffer`, and on each parameter `main_grad`, a view of its
part. Micro-batches accumulate in float32 whatever the parameters' dtype, several processes reduce
one tensor, and the norm is one reduction of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # elements: a parameter never shares a block of 8-bit state with its neighbour
# Elements that a CPU sums in float32. One sum over a whole buffer, each square added to all before, is 0.1%
# low at 20M elements and 2.1% at 160M; over blocks of this size, joined in float64, 2e-7 at any length.
NORM_BLOCK = 65536


@dataclass(frozen=True)
class Span:
    """A parameter's place in the flat buffers: elements `start` to `stop`."""

    name: str
    parameter: nn.Parameter
    start: int
    stop: int


class FlatGradients:
    """One flat float32 gradient buffer for `named_parameters`, on their device.

    A gradient that autograd accumulates is added to `main_grad` as soon as it is complete, and
    freed. Code that writes `main_grad` itself returns no gradient for the parameter.

    Attributes:
        buffer: float32 [numel], zero between the parameters (each starts on a multiple of 256).
        spans: one per parameter, in the order given.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.spans: list[Span] = []
        end = 0
        for name, parameter in named_parameters:
            if not parameter.requires_grad:
                continue
            self.spans.append(Span(name, parameter, end, end + parameter.numel()))
            end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        assert self.spans, "no parameter requires a gradient"
        devices = {span.parameter.device for span in self.spans}
        assert len(devices) == 1, f"trainable parameters on several devices: {devices}"
        self.device = devices.pop()
        self.buffer = torch.zeros(end, dtype=torch.float32, device=self.device)
        self._addresses, self._hooks = [], []
        for span in self.spans:
            parameter = span.parameter
            assert parameter.is_contiguous(), span.name
            parameter.main_grad = self.buffer[span.start : span.stop].view_as(parameter)  # type: ignore[attr-defined]
            self._hooks.append(parameter.register_post_accumulate_grad_hook(_move_to_main_grad))
            self._addresses.append(parameter.data_ptr())

    def norm(self) -> Tensor:
        """L2 norm over all parameters, float32 scalar on the device, right to 1e-6 at any length."""
        if self.buffer.is_cuda:  # a reduction by thousands of threads: no sum there is long
            return torch.linalg.vector_norm(self.buffer)
        whole = self.buffer.numel() // NORM_BLOCK * NORM_BLOCK
        blocks = torch.linalg.vector_norm(self.buffer[:whole].view(-1, NORM_BLOCK), dim=1)
        rest = torch.linalg.vector_norm(self.buffer[whole:])
        return torch.linalg.vector_norm(torch.cat((blocks, rest.view(1))).double()).float()

    def zero(self) -> None:
        self.buffer.zero_()

    def detach(self) -> None:
        """Leave the parameters as they were found, for another optimizer."""
        for hook in self._hooks:
            hook.remove()
        for span in self.spans:
            del span.parameter.main_grad  # type: ignore[attr-defined]

    def check_storage(self) -> None:
        """Assert that nobody moved the parameters: the state would then train a dead copy."""
        for span, address in zip(self.spans, self._addresses, strict=True):
            assert span.parameter.data_ptr() == address, f"{span.name} moved after the optimizer was made"


def _move_to_main_grad(parameter: Tensor) -> None:
    parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
    parameter.grad = None
