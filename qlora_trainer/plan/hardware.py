"""The machine a plan is for: this one, or one that `plan.gpu` describes.

In: `plan.gpu` ("24GiB", "RTX 4090", null). Out: `Hardware`. Speeds are the makers' dense bf16 figures with
float32 accumulation and memory bandwidth; what a training step reaches of them is in `speed.py`.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from qlora_trainer.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True)
class Hardware:
    """One device and its host.

    Attributes:
        device: `cuda` or `cpu`.
        memory: bytes of device memory a process can have (on a CPU: of the host's).
        flops: peak dense bf16 FLOP/s (on a CPU: float32, sustained), None if not known.
        bandwidth: bytes/s of device memory.
        bus: bytes/s between device and pinned host memory, one direction, as reached.
        capability: CUDA's number for what it can compute; None: not known, taken for a recent one.
        triton: whether its kernels can be compiled there.
        host_memory: bytes of RAM that are available, None if not known.
        disk: bytes that are free where the run writes, None if not known.
    """

    name: str
    device: str
    memory: int
    flops: float | None
    bandwidth: float | None
    bus: float | None
    capability: tuple[int, int] | None = None
    triton: bool = True
    host_memory: int | None = None
    disk: int | None = None

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bfloat16 without emulating it (Ampere and later)."""
        return self.device == "cuda" and (self.capability is None or self.capability >= (8, 0))

    @property
    def has_fp8(self) -> bool:
        """Whether e4m3 products run there (Ada, Hopper and later; emulated on a CPU)."""
        return self.device == "cpu" or self.capability is None or self.capability >= (8, 9)


def _card(
    name: str, gib: float, tflops: float, gb_per_s: float, capability: tuple[int, int], bus: float = 25
) -> Hardware:
    return Hardware(name, "cuda", int(gib * GIB), tflops * 1e12, gb_per_s * 1e9, bus * 1e9, capability)


# GiB that CUDA reports as total; dense bf16 TFLOP/s (float32 on a T4, which has no bfloat16); GB/s; compute
# capability. PCIe 5 cards reach about 50 GB/s, PCIe 4 about 25.
CARDS = {
    card.name: card
    for card in (
        _card("H200 141GB", 139.8, 989, 4800, (9, 0), 50),
        _card("H100 80GB", 79.2, 989, 3350, (9, 0), 50),
        _card("H100 PCIe 80GB", 79.2, 756, 2000, (9, 0), 50),
        _card("B200 180GB", 178, 2250, 7700, (10, 0), 50),
        _card("A100 80GB", 79.2, 312, 2039, (8, 0)),
        _card("A100 40GB", 39.4, 312, 1555, (8, 0)),
        _card("L40S 48GB", 44.4, 362, 864, (8, 9)),
        _card("L4 24GB", 22.0, 121, 300, (8, 9)),
        _card("A10 24GB", 22.0, 125, 600, (8, 6)),
        _card("RTX 6000 Ada 48GB", 47.4, 364, 960, (8, 9)),
        _card("RTX A6000 48GB", 47.4, 155, 768, (8, 6)),
        _card("RTX 5090 32GB", 31.4, 209, 1792, (12, 0), 50),
        _card("RTX 4090 24GB", 23.5, 165, 1008, (8, 9)),
        _card("RTX 4080 16GB", 15.6, 97, 717, (8, 9)),
        _card("RTX 3090 24GB", 23.6, 71, 936, (8, 6)),
        _card("RTX 3060 12GB", 11.6, 26, 360, (8, 6), 12),
        _card("T4 16GB", 14.6, 8.1, 320, (7, 5), 12),
    )
}
CPU_FLOPS = 45e9  # float32, one thread, a training step of a small model (SmolLM2-135M, 84 tokens/s)


def parse(description: str) -> Hardware:
    """A machine from `plan.gpu`: the name of a card, or the size of an unknown one ("24GiB", "24 GB").

    Raises:
        ConfigError: if it is neither.
    """
    text = description.strip()
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB|G|MiB|MB)", text, re.IGNORECASE)
    if size:
        unit = {"gib": GIB, "g": GIB, "gb": 10**9, "mib": 1 << 20, "mb": 10**6}[size.group(2).lower()]
        return Hardware(text, "cuda", int(float(size.group(1)) * unit), None, None, None)
    card = _find(text)
    if card is None:
        raise ConfigError(
            f"plan.gpu={description!r} is neither a size such as 24GiB nor a card the plan knows: "
            f"{', '.join(CARDS)}"
        )
    return card


def _find(text: str) -> Hardware | None:
    """The card whose name has all words of `text` ("h100", "4090", "NVIDIA A100-SXM4-40GB")."""
    ignored = {"nvidia", "geforce", "gpu", "sxm", "sxm4", "sxm5", "hbm3", "hbm3e", "tensor", "core", "pcie"}
    words = [w for w in re.split(r"[^a-z0-9]+", text.lower()) if w]
    words = [w for w in words if w not in ignored or (w == "pcie" and "h100" in words)]
    for card in CARDS.values():
        name = re.split(r"[^a-z0-9]+", card.name.lower())
        if words and all(word in name for word in words):
            return card
    return None


def detect(device: str, folder: Path) -> Hardware:
    """This machine: its first CUDA device or its CPU, RAM that is available, and space where `folder` is."""
    import torch

    host, disk = available_ram(), free_disk(folder)
    if device != "cuda":
        threads = torch.get_num_threads()
        return Hardware(
            name=f"CPU, {threads} thread{'s' * (threads > 1)}",
            device="cpu",
            memory=host or 0,
            flops=CPU_FLOPS * threads**0.72,  # two threads gave 1.65 times one
            bandwidth=None,
            bus=None,
            host_memory=host,
            disk=disk,
        )
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    card = _find(properties.name)
    here = card or Hardware(properties.name, "cuda", 0, None, None, None)
    return replace(
        here,
        name=properties.name,
        memory=properties.total_memory,
        capability=(properties.major, properties.minor),
        triton=find_spec("triton") is not None,
        host_memory=host,
        disk=disk,
    )


def available_ram() -> int | None:
    """Bytes of RAM a process can still get: the kernel's estimate, or what its control group leaves."""
    limits = []
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except FileNotFoundError:
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            limits.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except FileNotFoundError:
        pass  # no control group limits this process
    return min(limits)


def free_disk(folder: Path) -> int | None:
    """Bytes free on the disk that holds `folder`, or would hold it."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free if os.access(folder, os.R_OK) else None
