"""States of every random number generator a step may draw from, as tensors.

Python's `random`, numpy's legacy global generator, torch on the CPU and on the current CUDA device
(a rank computes on one). All sizes are fixed, so that ranks can gather each other's states as equal
byte strings (`to_bytes`), and all are exact: integers as they are, cached Gaussians as float64 bits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import numpy as np
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor


def capture() -> dict[str, Tensor]:
    """The states of this process; CPU tensors, a few kilobytes."""
    version, words, gauss = random.getstate()
    assert version == 3, "Python's Mersenne Twister state, unchanged since 3.2"
    name, key, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert name == "MT19937"
    states = {
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy.words": torch.from_numpy(np.asarray(key).astype(np.int64)),
        "numpy.position": torch.tensor([position], dtype=torch.int64),
        "numpy.gauss": torch.tensor([has_gauss, cached], dtype=torch.float64),
        "torch.cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        states["torch.cuda"] = torch.cuda.get_rng_state()
    return states


def restore(states: Mapping[str, Tensor]) -> None:
    """Makes this process draw on as the one did that captured `states`.

    A CUDA state is left out where there is no CUDA: a run that moved to another kind of machine is
    refused before (`resume.check_same_run`), or its user has allowed it.
    """
    flag, value = states["python.gauss"].tolist()
    random.setstate((3, tuple(states["python.words"].tolist()), value if flag else None))
    has_gauss, cached = states["numpy.gauss"].tolist()
    words = states["numpy.words"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, int(states["numpy.position"]), int(has_gauss), cached))
    torch.set_rng_state(states["torch.cpu"])
    if "torch.cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["torch.cuda"])


def keep() -> Callable[[], None]:
    """A function that puts this process's generators back to where they are now.

    For undoing a step in the same process: a tenth of the cost of `capture`, and no device is asked.
    """
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)

    return put_back


def to_bytes(states: Mapping[str, Tensor]) -> Tensor:
    """The states as one uint8 vector, of equal length on all ranks of a run."""
    return torch.frombuffer(bytearray(save_bytes(dict(states))), dtype=torch.uint8)


def from_bytes(data: Tensor) -> dict[str, Tensor]:
    """The inverse of `to_bytes`."""
    return load_bytes(data.cpu().numpy().tobytes())


def for_ranks(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of `rng.safetensors`: every rank's states, named `<rank>.<state>`."""
    return {f"{rank}.{name}": state for rank, states in enumerate(ranks) for name, state in states.items()}


def of_rank(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """One rank's part of `rng.safetensors`; empty if the saved run had no such rank."""
    prefix = f"{rank}."
    return {name[len(prefix) :]: state for name, state in tensors.items() if name.startswith(prefix)}
