"""A config.json is enough, screen and plan.json agree, and what cannot fit ends with exit code 2."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from qlora_trainer.__main__ import main
from qlora_trainer.commands import plan as command
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError
from qlora_trainer.plan import memory
from tests import tiny
from tests.plan.sizes import LLAMA3_8B


@pytest.fixture
def config(tmp_path) -> RunConfig:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA3_8B))
    made = RunConfig(output_dir=str(tmp_path / "run"))
    made.model.model_name_or_path = str(folder)
    made.plan.gpu = "RTX 4090"
    return made


@pytest.fixture
def line(tmp_path) -> list[str]:
    tiny.save(tmp_path / "model")
    rows = [{"instruction": f"say {i}", "output": f"it is {i}!"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["recipe=tiny", f"model.model_name_or_path={tmp_path / 'model'}", f"output_dir={tmp_path / 'run'}"]
    line += [f"data.path={tmp_path / 'rows.jsonl'}", f"data.cache_dir={tmp_path / 'cache'}"]
    return [*line, "train.max_steps=6"]


def test_plan_needs_only_a_config_json(config: RunConfig, capsys) -> None:
    command.run(config)
    assert "plan: fits" in capsys.readouterr().out
    with open(f"{config.output_dir}/plan.json") as file:
        assert json.load(file)["fits"]


def test_plan_that_cannot_fit_is_shown_and_refused(config: RunConfig, capsys) -> None:
    config.plan.gpu = "5GiB"
    with pytest.raises(ConfigError) as caught:
        command.run(config)
    assert caught.value.exit_code == 2
    assert "does not fit" in capsys.readouterr().out


def test_plan_names_what_keeps_the_fast_path_off(config: RunConfig, capsys) -> None:
    config.model.kernels = "reference"
    config.plan.gpu = "8GiB"
    config.train.max_length = 2048
    with pytest.raises(ConfigError, match=r"model\.kernels=auto "):
        command.run(config)
    assert "reference, because model.kernels=reference" in capsys.readouterr().out


def test_planning_and_looking_first_does_not_stand_in_the_way_of_training(line, tmp_path, capsys) -> None:
    assert main(["plan", *line, "train.max_steps=-1"]) == 0
    assert "10 steps" in capsys.readouterr().out  # 40 rows, read because they are here
    assert main(["inspect", *line]) == 0
    assert main(line) == 0
    measured = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert main(["plan", *line, "plan.gpu=24GiB"]) == 0  # what the run has recorded stays
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == measured
    assert (tmp_path / "run" / "plan-preview.json").exists()


def test_several_processes_are_planned_together(config: RunConfig, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    config.plan.num_processes = 4
    config.output_dir = None
    command.run(config)
    assert "accumulated x 4 processes = 32,768 tokens" in " ".join(capsys.readouterr().out.split())


def test_a_model_that_nobody_knows_is_planned_with_a_wider_margin(config: RunConfig, capsys) -> None:
    file = f"{config.model.model_name_or_path}/config.json"
    with open(file, "w") as stream:
        json.dump(LLAMA3_8B | {"model_type": "llama9"}, stream)
    command.run(config)
    assert "memory within 20%" in capsys.readouterr().out
    with open(f"{config.output_dir}/plan.json") as stream:
        assert json.load(stream)["margin"] == 0.2


def test_a_run_ends_with_predicted_beside_measured(line: list[str], tmp_path) -> None:
    command = [sys.executable, "-m", "qlora_trainer", *line]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    (memory,) = re.findall(r"^memory .*", done.stderr, re.MULTILINE)
    assert "GiB of RAM" in memory and "planned" in memory and "off by" not in memory
    assert re.search(r"^speed .* tokens/s in the median step", done.stderr, re.MULTILINE)
    measured = json.loads((tmp_path / "run" / "plan.json").read_text())["measured"]
    assert measured["peak_host"] > 200 << 20 and measured["tokens_per_second"] > 0


def test_a_wrong_plan_is_called_wrong(line: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setitem(memory.CONTEXT, "cpu", 12 << 30)  # planted: no process is as large
    assert main(line) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "the plan is off by more than 20%" in said
