"""What every test gets: no network, no user's cache or settings, and no GPU test without a GPU."""

from __future__ import annotations

import os

import pytest

from qlora_trainer.config.preflight import cuda_devices

# Before any import of torch or transformers: threads that spin for each other cost a busy machine
# most of its time, and a test that reaches for the hub is a bug.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.pop("QLORA_TRACEBACK", None)
if cuda_devices() == 0:
    # Triton reads it when it is imported, which whatever test module is collected first may do.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none here"))
