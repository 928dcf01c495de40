"""`bench` from its line to its table, on a CPU that answers for a GPU; true figures need a real one."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from qlora_trainer.__main__ import main
from qlora_trainer.bench import measure
from qlora_trainer.model import load, synthetic
from tests import tiny


class Event:
    """A CUDA event on a CPU."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


KERNELS = measure.Breakdown({"products": 3.0, "norms": 1.0}, [("gemm", 2, 3.0), ("_rms_norm", 4, 1.0)])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made = synthetic.random_base
    monkeypatch.setattr(load, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(
        synthetic, "random_base", lambda config, device, **rest: made(config, torch.device("cpu"), **rest)
    )
    monkeypatch.setattr(measure, "matrix_rate", lambda _: 1e12)
    monkeypatch.setattr(measure, "breakdown", lambda step: (step(), KERNELS)[1])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 3 << 29)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "a pretended GPU")


def line(folder: Path, *more: str) -> list[str]:
    tiny.save(folder / "model")
    keys = ["recipe=tiny", f"model.model_name_or_path={folder / 'model'}", f"output_dir={folder / 'bench'}"]
    return [
        "bench",
        *keys,
        "plan.gpu=24GiB",
        "train.max_length=32",
        "train.per_device_train_batch_size=2",
        *more,
    ]


def test_bench_prints_its_table_and_keeps_every_number(
    gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line(tmp_path, "train.gradient_accumulation_steps=3")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for said in (
        "steps of 3 x 2 x 32 tokens",
        "a pretended GPU",
        "supervised",
        "1.50 GiB allocated",
        "where the time",
    ):
        assert said in shown
    record = json.loads((tmp_path / "bench" / "bench.json").read_text())
    result = record["result"]
    assert result["tokens_s"] * result["step_s"] == pytest.approx(3 * 2 * 32)
    assert result["supervised_s"] * result["step_s"] == pytest.approx(3 * 2 * 31)
    assert 0 < result["loss"] < 20
    assert "75%" in shown and [kernel["launches"] for kernel in record["kernels"]] == [2, 4]


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.0, 1 + 3 + 8 + 1), (8.0, 1 + 1 + 3 + 1), (100.0, 1 + 1 + 2 + 1)]
)
def test_long_steps_are_repeated_less(
    gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: float, expected: int
) -> None:
    """A step seems to take `seconds`: the first, those that warm up, those that are timed, one profiled."""
    steps = 0
    now = time.perf_counter

    def step() -> torch.Tensor:
        nonlocal steps
        steps += 1
        return torch.zeros(())

    monkeypatch.setattr(measure.Bench, "step_of", lambda *_: (step, [1, 1, 1], None))
    monkeypatch.setattr(time, "perf_counter", lambda: now() + seconds * steps)
    assert main(line(tmp_path)) == 0
    assert steps == expected


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line(tmp_path)) == 2
    assert "bench measures a CUDA GPU" in capsys.readouterr().err
