"""A config.json is enough, screen and plan.json agree, and what cannot fit ends with exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from qlora_trainer.commands import plan as command
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError
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
    config.lora.lora_dropout = 0.1
    config.plan.gpu = "8GiB"
    config.train.max_length = 2048
    with pytest.raises(ConfigError, match=r"lora\.lora_dropout=0 "):
        command.run(config)
    assert "because of lora.lora_dropout=0.1" in capsys.readouterr().out


def test_importing_the_plan_is_light() -> None:
    code = "import qlora_trainer.plan.plan, qlora_trainer.plan.screen, sys; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
