"""Two processes by accelerate's launcher: the losses of one, files from rank 0 only, never silently one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests import tiny

KEYS = ["recipe=tiny", "lora.dtype=float32", "checkpoint.save_steps=2", "train.learning_rate=1e-2"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # what it would only warn about


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save(folder / "model")
    rows = [{"instruction": f"say {i} {'again ' * (i % 5)}", "output": f"it is {i}!"} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"model.model_name_or_path={folder / 'model'}", f"data.path={folder / 'rows.jsonl'}"]


def launch(prefix, inputs, folder, *keys):
    # 30 rows in steps of 4: the last step of an epoch is uneven, and is in these steps.
    command = [
        *prefix,
        "-m",
        "qlora_trainer",
        *KEYS,
        *inputs,
        f"output_dir={folder}",
        "train.max_steps=9",
        *keys,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder.parent / "cache")}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder.parent, timeout=300
    )


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one(tmp_path, inputs):
    one = launch([sys.executable], inputs, tmp_path / "one", "train.gradient_accumulation_steps=2")
    two = launch([*LAUNCH, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"], inputs,
                 tmp_path / "two", "train.gradient_accumulation_steps=1")  # fmt: skip
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    assert len(losses(tmp_path / "one")) == 9
    assert two.stderr.count("\ntrained ") == one.stderr.count("\ntrained ") == 1
    assert sorted(os.listdir(tmp_path / "one")) == sorted(os.listdir(tmp_path / "two"))


def test_several_asked_and_one_started_is_refused(tmp_path, inputs):
    result = launch([*LAUNCH, "--num_processes", "2"], inputs, tmp_path / "run")
    assert result.returncode != 0
    assert "accelerate launch --multi_gpu" in result.stderr
    assert not (tmp_path / "run").exists()
