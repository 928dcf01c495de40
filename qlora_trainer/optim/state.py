"""What a saved optimizer state must look like before any of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qlora_trainer.errors import CheckpointError


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.dtype, torch.Size]]) -> None:
    """Compare names, dtypes and shapes with `expected`, to which `step` (int64 []) is added.

    Raises:
        CheckpointError: naming the first tensor that is missing, unknown or different.
    """
    need = {**expected, "step": (torch.int64, torch.Size())}
    found = {key: (tensor.dtype, tensor.shape) for key, tensor in state.items()}
    odd = sorted(key for key in need.keys() | found.keys() if need.get(key) != found.get(key))
    if odd:
        raise CheckpointError(
            f"optimizer state does not fit this optimizer in {len(odd)} tensors, the first {odd[0]!r}: "
            f"found {_describe(found.get(odd[0]))}, need {_describe(need.get(odd[0]))}; resume with the "
            "checkpoint's optim.name and lora settings, or set checkpoint.resume_from_checkpoint=never"
        )


def _describe(entry: tuple[torch.dtype, torch.Size] | None) -> str:
    return f"{str(entry[0]).removeprefix('torch.')} {list(entry[1])}" if entry else "none"
