"""What a launch asks of its device: how many programs fill it."""

from __future__ import annotations

from functools import cache

import torch


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 132, as an H100 has, where kernels are interpreted."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
