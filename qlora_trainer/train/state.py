"""All that a run is made of between two steps, as tensors and plain values: out to a checkpoint, and back.

The checkpoint room knows files; this module knows what goes into them: the adapter (valid for PEFT by
itself), float32 masters and moments, every rank's random number generators, and the progress.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from qlora_trainer import __version__
from qlora_trainer.checkpoint import format, publish, rng
from qlora_trainer.checkpoint.format import Checkpoint
from qlora_trainer.model import residual
from qlora_trainer.train.distributed import Ranks
from qlora_trainer.train.job import Optimizer, Progress

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


@dataclass(frozen=True)
class RunState:
    """The parts of a run that change, and what identifies it.

    Attributes:
        identity: flat field -> plain value; a checkpoint of another identity is refused.
    """

    model: PeftModel
    optimizer: Optimizer
    progress: Progress
    identity: dict[str, Any]
    ranks: Ranks

    def save(self, root: Path) -> Path | None:
        """Publishes a checkpoint below `root`; every rank calls it, rank 0 writes and returns the folder.

        Raises:
            CheckpointError: rank 0 could not write; the launcher then ends the others.
        """
        states = self.ranks.gather(rng.to_bytes(rng.capture()))
        folder: Path | None = None
        if self.ranks.main:
            folder = publish.save(
                root,
                self.progress.step,
                {
                    format.ADAPTER: adapter_tensors(self.model),
                    format.OPTIMIZER: self.optimizer.state_tensors(),
                    format.RNG: rng.for_ranks([rng.from_bytes(data) for data in states]),
                },
                {
                    format.ADAPTER_CONFIG: adapter_config(self.model),
                    format.STATE: {
                        **self.progress.to_dict(),
                        "identity": self.identity,
                        "versions": versions(),
                        "threads": torch.get_num_threads(),
                        "world_size": self.ranks.world_size,
                    },
                },
            )
        self.ranks.wait()
        return folder

    def sizes(self) -> tuple[int, int]:
        """Bytes of a checkpoint, and of the adapter alone."""
        adapter = {format.ADAPTER: adapter_tensors(self.model)}
        whole = {**adapter, format.OPTIMIZER: self.optimizer.state_tensors()}
        return format.size_of(whole), format.size_of(adapter)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Becomes what `checkpoint` holds, bit for bit.

        Raises:
            CheckpointError: tensors of other names or shapes: a change was allowed that cannot be made.
        """
        self.optimizer.load_state_tensors(checkpoint.tensors(format.OPTIMIZER))  # looks before it changes
        residual.take_adapter(self.model, checkpoint.tensors(format.ADAPTER))
        for name in self.progress.to_dict():
            setattr(self.progress, name, checkpoint.state[name])
        states = rng.of_rank(checkpoint.tensors(format.RNG), self.ranks.rank)
        if states:
            rng.restore(states)


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The adapter under PEFT's own names for its file, without the base's embeddings."""
    return residual.adapter_tensors(model, save_embedding_layers=False)


def adapter_config(model: PeftModel) -> dict[str, Any]:
    """`adapter_config.json` as PEFT writes it, ready for inference."""
    config = residual.adapter_settings(model).to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return plain | {"inference_mode": True}


def changed_surroundings(checkpoint: Checkpoint) -> list[str]:
    """What this process runs on differently from the one that saved: allowed, and not bit-exact."""
    saved, now = dict(checkpoint.state["versions"]), versions()
    saved["CPU threads"], now["CPU threads"] = str(checkpoint.state["threads"]), str(torch.get_num_threads())
    return [f"{name} was {saved.get(name)}, is {now[name]}" for name in now if saved.get(name) != now[name]]


def versions() -> dict[str, str]:
    """What this process runs on; recorded, not compared."""
    found = {name: version(name) for name in LIBRARIES}
    return found | {"qlora_trainer": __version__, "python": platform.python_version()}
