"""Canary secrets in the environment, the recipe, the command line and exceptions: none comes out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from qlora_trainer.jobs.training import facts_of_start
from qlora_trainer.train.distributed import Ranks
from qlora_trainer.train.signals import Status
from tests.faults.scene import Scene

ENVIRONMENT = {
    "HF_TOKEN": "hf_Canary1CanaryCanaryCanaryCanaryX",
    "WANDB_API_KEY": "ca1a2y0000111122223333444455556666777788",
    "AWS_SECRET_ACCESS_KEY": "canary/aws/wJalrXUtnFEMIK7MDENGbPxRf",
    "MY_SERVICE_PASSWORD": "canary-password-9f8e7d",
}
IN_LINE = "hf_Canary2CanaryCanaryCanaryCanaryX"  # known by its shape
IN_ADDRESS = "canary-in-address-4711"
SECRETS = [*ENVIRONMENT.values(), IN_LINE, IN_ADDRESS]


def leaks(scene: Scene, *folders: Path, text: str) -> list[str]:
    """Where a secret came out: printed, or in any file (binary ones too)."""
    found = [f"printed: {secret}" for secret in SECRETS if secret in text]
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file():
                data = file.read_bytes()
                found += [f"{file.relative_to(folder)}: {s}" for s in SECRETS if s.encode() in data]
    return found


def test_a_whole_run_with_a_tracker_writes_no_secret(scene: Scene) -> None:
    recipe = scene.folder / "secret.yaml"
    recipe.write_text(f"defaults: [tiny, _self_]\ntrack:\n  project: {IN_LINE}\n")
    keys: dict[str, Any] = {"recipe": recipe, "track.report_to": "[wandb]"}
    text = scene.train("secrets", env=ENVIRONMENT | {"WANDB_MODE": "offline"}, **keys)
    run = scene.folder / "secrets"
    assert any(run.rglob("*.wandb")), "the tracker's own file is looked at too"
    assert leaks(scene, run, text=text) == []


def test_the_command_and_the_settings_are_told_without_their_secrets(scene: Scene) -> None:
    """What tells of a run has its command line and all its keys: there, and masked."""
    text = scene.train("told", **{"track.project": IN_LINE})
    run = scene.folder / "told"
    assert f"output_dir={run} " in scene.status("told")["command"] + " "
    assert "track.project=***" in scene.status("told")["command"]
    assert "project: '***'" in (run / "adapter" / "README.md").read_text()
    assert leaks(scene, run, text=text) == []


def test_a_secret_is_masked_before_it_is_quoted_and_again_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a shell would need it, a secret with a quote in it is another text than the environment's."""
    secret = "canary's-password-4711"
    monkeypatch.setenv("MY_SERVICE_PASSWORD", secret)
    monkeypatch.setattr(sys, "argv", ["qlora_trainer", f"track.project={secret}"])
    assert "4711" not in facts_of_start(Ranks(torch.device("cpu")))["command"]
    status = Status()
    status.note(command=f"python -m qlora_trainer track.project={secret}")
    status.write_to(tmp_path / "status.json")
    assert "4711" not in (tmp_path / "status.json").read_text()


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({"data.path": f"https://user:{IN_ADDRESS}@example.invalid/rows.json"}, (2, 65, 66)),
        ({"data.path": f"/nowhere/{IN_LINE}.json"}, (66,)),
        ({"model.model_name_or_path": f"https://user:{IN_ADDRESS}@example.invalid/m"}, (2, 66)),
        ({"hub.token": IN_LINE}, (2,)),
        ({"lora.r": IN_LINE}, (2,)),
        ({"output_dir": f"/proc/{IN_LINE}"}, (74,)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_error_shows_no_secret(scene: Scene, keys: dict[str, Any], code: tuple[int, ...]) -> None:
    run = scene.start("refused", env=ENVIRONMENT, **keys)
    assert run.wait() in code, run.text()
    assert leaks(scene, text=run.text()) == []


def test_a_bug_that_quotes_a_secret_shows_none_with_and_without_a_traceback(scene: Scene) -> None:
    message = f"cannot reach {ENVIRONMENT['MY_SERVICE_PASSWORD']} with {IN_LINE}"
    text = scene.train("buggy", ("bug", message), env=ENVIRONMENT, expect=70)
    assert "RuntimeError" in text and "***" in text
    assert leaks(scene, scene.folder / "buggy", text=text) == []
    assert scene.status("buggy")["state"] == "failed"


def test_the_canaries_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file.bin").write_bytes(b"\0" + IN_LINE.encode() + b"\0")
    assert leaks(None, tmp_path, text=f"x{IN_ADDRESS}x") == [  # type: ignore[arg-type]
        f"printed: {IN_ADDRESS}",
        f"deep/file.bin: {IN_LINE}",
    ]


def test_no_secret_is_passed_to_another_process_on_its_command_line(scene: Scene) -> None:
    """Anyone on the machine reads command lines; a tracker's service must get its key another way."""
    run = scene.start(
        "watched",
        ("slow_phase", "saving", 2),
        env=ENVIRONMENT | {"WANDB_MODE": "offline"},
        track__report_to="[wandb]",
    )
    run.wait_for("in saving")
    lines = str([process.info["cmdline"] for process in psutil.process_iter(["cmdline"])])
    assert run.wait() == 0
    assert not [secret for secret in ENVIRONMENT.values() if secret in lines]
