"""What the machine lacks is said before anything heavy is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from email.message import Message
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest

from qlora_trainer.config import preflight
from qlora_trainer.config.schema import DataConfig, ModelConfig, RunConfig
from qlora_trainer.errors import ConfigError, MissingInputError


def test_cuda_asked_and_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(model=ModelConfig(device="cuda"))
    monkeypatch.setattr(preflight, "cuda_devices", lambda: 0)
    with pytest.raises(ConfigError, match=r"model\.device: cuda is asked for .* leave model\.device out"):
        preflight.check(config, "chat")
    monkeypatch.setattr(preflight, "cuda_devices", lambda: 1)
    preflight.check(config, "chat")


def test_the_driver_is_asked_without_torch() -> None:
    import torch

    assert preflight.cuda_devices() == torch.cuda.device_count()


@pytest.mark.parametrize(
    "path", ["no.json", "./no", "/no/rows", "deep/er/no", [{"path": "no.parquet"}], ["no.csv"]]
)
def test_a_file_that_is_not_there_is_missing(
    path: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingInputError, match=r"data\.path: .*no"):
        preflight.check_data(path, "data.path")


@pytest.mark.parametrize("path", [None, "owner/set", "builtin:restaurant/train", "parts-*.json", "rows.json"])
def test_what_may_be_elsewhere_is_left_to_the_data_room(
    path: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").touch()
    preflight.check_data(path, "data.path")


def test_a_hub_model_without_network_ends_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = RunConfig(
        model=ModelConfig(model_name_or_path="huggyllama/llama-7b"), data=DataConfig(path="tatsu-lab/alpaca")
    )
    with pytest.raises(MissingInputError, match=r"huggyllama/llama-7b.*model_name_or_path=/a/folder"):
        preflight.check(config, "plan")


@pytest.mark.parametrize(
    ("answer", "offline"),
    [
        (URLError("no name"), True),
        (TimeoutError(), True),
        (HTTPError("", 503, "busy", Message(), None), False),
    ],
    ids=["no network", "silence", "busy"],
)
def test_a_silent_hub_is_not_asked_again(
    answer: Exception, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "")

    def urlopen(request: object, timeout: float) -> None:
        raise answer

    monkeypatch.setattr(preflight, "urlopen", urlopen)
    preflight.stay_offline_if_the_hub_is_silent()
    assert os.environ["HF_HUB_OFFLINE"] == ("1" if offline else "")


def test_a_model_that_is_a_folder_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(preflight, "stay_offline_if_the_hub_is_silent", lambda: pytest.fail("asked the hub"))
    preflight.check(RunConfig(model=ModelConfig(model_name_or_path=str(tmp_path))), "plan")


@pytest.mark.parametrize("command", ["train", "plan", "inspect", "evaluate", "chat", "export", "verify"])
def test_a_model_folder_that_cannot_be_is_refused_before_torch_is_imported(
    tmp_path: Path, command: str
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1000000000}')
    output = str(tmp_path / "run")
    config = RunConfig(model=ModelConfig(model_name_or_path=str(tmp_path)), output_dir=output)
    with pytest.raises(MissingInputError, match="num_hidden_layers=1,000,000,000"):
        preflight.check(config, command)
    program = (
        "import sys; from qlora_trainer.config import preflight; from qlora_trainer.model import source; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_path_that_held_a_secret_is_asked_for() -> None:
    config = RunConfig(model=ModelConfig(model_name_or_path="/models/***/base"))
    with pytest.raises(ConfigError, match="held a secret"):
        preflight.check(config, "chat")
