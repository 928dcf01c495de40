"""A tiny model, data and command lines for it, and how two runs are compared to the last bit."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_trainer.checkpoint import format, resume
from tests import tiny
from tests.faults.zygote import Run, Runner

STEPS = 8  # of four rows each; the data hold 20 rows, so an epoch ends after the fifth
KEYS = {
    "recipe": "tiny",
    "train.max_steps": STEPS,
    "train.max_length": 48,
    "lora.lora_dropout": 0.1,  # so that random states matter
    "checkpoint.save_steps": 3,
    "checkpoint.save_total_limit": 10,
    "train.learning_rate": 0.01,
    "train.lr_scheduler_type": "cosine",
    "evaluate.enabled": "false",
}
WORDS = ["red", "blue", "green", "seven", "eight", "nine", "north", "south", "up", "down", "left", "right"]


class Scene:
    """Where faults happen: `folder` holds the model, the data, and one folder a run.

    Args:
        runner: None where only command lines are wanted.
        model: changes of the tiny model's shape.
    """

    def __init__(self, folder: Path, runner: Runner | None, **model: Any) -> None:
        self.folder, self.runner = folder, runner
        tiny.save(folder / "model", **model)
        self.write_data(folder / "data.json", 20, seed=0)
        self.write_data(folder / "eval.json", 4, seed=1)

    def write_data(self, file: Path, rows: int, seed: int) -> None:
        words = random.Random(seed)
        table = []
        for _ in range(rows):
            answer = words.choices(WORDS, k=words.randint(1, 4))
            table.append({"instruction": words.choice(WORDS), "output": " ".join(answer)})
        file.write_text(json.dumps(table))

    def line(self, output: str, **keys: Any) -> list[str]:
        """The command line of a run into `folder/output`; `train__packing=True` sets `train.packing`."""
        given = {name.replace("__", "."): value for name, value in keys.items()}
        settings: dict[str, Any] = {
            **KEYS,
            "model.model_name_or_path": self.folder / "model",
            "data.path": self.folder / "data.json",
            "data.cache_dir": self.folder / "cache",
            "output_dir": self.folder / output,
            **given,
        }
        return [f"{name}={value}" for name, value in settings.items()]

    def start(
        self, output: str, *hooks: Sequence[Any], env: dict[str, str] | None = None, **keys: Any
    ) -> Run:
        assert self.runner is not None
        return self.runner.start(*self.line(output, **keys), hooks=[list(hook) for hook in hooks], env=env)

    def train(self, output: str, *hooks: Sequence[Any], expect: int = 0, **options: Any) -> str:
        """Runs to the end and returns what it printed; fails unless it exits with `expect`."""
        run = self.start(output, *hooks, **options)
        code = run.wait()
        assert code == expect, f"exit {code} instead of {expect}:\n{run.text()}"
        return run.text()

    def uninterrupted(self, **keys: Any) -> Path:
        """The finished run with these settings; made once."""
        name = "whole-" + hashlib.sha256(repr(sorted(keys.items())).encode()).hexdigest()[:8]
        if not (self.folder / name).exists():
            self.train(name, **keys)
        return self.folder / name

    def copy(self, output: str, target: str) -> Path:
        """Another run folder with the same content."""
        shutil.rmtree(self.folder / target, ignore_errors=True)
        return Path(shutil.copytree(self.folder / output, self.folder / target))

    def status(self, output: str) -> dict[str, Any]:
        return json.loads((self.folder / output / "status.json").read_bytes())

    def steps(self, output: str) -> list[int]:
        """Steps of the checkpoints there are."""
        folders = (self.folder / output / resume.CHECKPOINTS).glob("step-*")
        return sorted(format.step_of(folder) or 0 for folder in folders)


def metrics(run: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` with floats in hex, without what a clock measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_second", "eval_seconds", "seconds")
    return [{key: _exact(value) for key, value in line.items() if key not in clock} for line in lines]


def _exact(value: Any) -> Any:
    return value.hex() if isinstance(value, float) else value


def differences(run: Path, other: Path) -> list[str]:
    """Where two finished runs are not the same bytes: every metric, the last checkpoint, the adapter."""
    found = []
    mine, theirs = metrics(run), metrics(other)
    if len(mine) != len(theirs):
        found.append(f"{len(mine)} metrics lines and {len(theirs)}")
    for a, b in zip(mine, theirs, strict=False):
        odd = [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]
        found += [f"step {a['step']}: {key} {a.get(key)} and {b.get(key)}" for key in odd]
    last = format.folder_name(max(line["step"] for line in mine))
    for folder in (f"{resume.CHECKPOINTS}/{last}", "adapter"):
        names = {file.name for file in [*(run / folder).iterdir(), *(other / folder).iterdir()]}
        for name in sorted(names - {"README.md"}):  # the card bears the run folder's name
            pair = [path / folder / name for path in (run, other)]
            if not all(path.exists() for path in pair) or pair[0].read_bytes() != pair[1].read_bytes():
                found.append(f"{folder}/{name}")
    return found
