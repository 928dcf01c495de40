"""The processes of one run: who am I, sums over everyone, and decisions everyone makes together.

Process handling is accelerate's (`accelerate launch`, torchrun, or a single process); gradients are
summed once per optimizer step over one flat buffer, so no wrapper stands around the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from qlora_trainer.errors import ConfigError, QLoRAError, explained

T = TypeVar("T")


class Ranks:
    """This process among its peers.

    Attributes:
        rank, world_size: of this process and of the run.
        device: where this rank computes.
        main: whether this rank writes files and logs.
    """

    def __init__(self, device: torch.device) -> None:
        wanted = int(os.environ.get("WORLD_SIZE", "1"))
        if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and wanted == 1:
            # accelerate 1.15 without GPUs: its default launcher starts one process whatever was asked.
            raise ConfigError(
                "accelerate was asked for several processes and started one, as it does without GPUs: write "
                "`accelerate launch --multi_gpu --num_processes N -m qlora_trainer …`, good on CPUs too"
            )
        state = PartialState(cpu=device.type == "cpu")
        if state.num_processes != wanted:
            raise ConfigError(
                f"the launcher announced {wanted} processes and {state.num_processes} came up: "
                "check `accelerate launch --num_processes` and the visible GPUs"
            )
        self.rank: int = state.process_index
        self.world_size: int = state.num_processes
        self.device: torch.device = state.device if device.type == "cuda" else device
        self.main: bool = self.rank == 0
        # Decisions travel over the CPU: asking the GPU would make every step wait for it.
        self._control = dist.new_group(backend="gloo") if self.world_size > 1 else None

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over all ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_control(self, tensor: Tensor) -> Tensor:
        """Sums a small CPU tensor over all ranks in place, without touching the device."""
        if self._control is not None:
            dist.all_reduce(tensor, group=self._control)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; every rank gets the same answer."""
        return self.max(int(flag)) > 0

    def max(self, value: int) -> int:
        """The largest `value` of any rank."""
        if self._control is None:
            return value
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._control)
        return int(tensor.item())

    def failure(self, mine: Exception | None) -> Exception | None:
        """What failed, if anything did on any rank: `mine`, or that another did, with its exit code."""
        code = self.max(explained(mine).exit_code if mine is not None else 0)
        if mine is not None or code == 0:
            return mine
        other = QLoRAError("another process of this run failed: its own line says why")
        other.exit_code = code
        return other

    def together(self, work: Callable[[], T]) -> T:
        """`work()`, which does not communicate; where it raises on one rank, all raise, and none waits."""
        result: T | None = None
        mine: Exception | None = None
        try:
            result = work()
        except Exception as error:
            mine = error
        if failed := self.failure(mine):
            raise failed
        return result  # type: ignore[return-value]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """`tensor` (CPU, same shape everywhere) of every rank, in rank order, on every rank."""
        if self._control is None:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor, group=self._control)
        return parts

    def wait(self) -> None:
        """Returns when every rank has come here."""
        if self._control is not None:
            dist.barrier(group=self._control)

    def close(self) -> None:
        """Leaves the process group, so that no rank waits for a peer that is gone."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
