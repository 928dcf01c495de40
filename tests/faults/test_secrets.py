"""Canary secrets in the environment, the recipe, the command line and exceptions: none comes out."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from qlora_trainer.jobs.training import facts_of_start
from qlora_trainer.system.redact import MASK
from qlora_trainer.train.distributed import Ranks
from qlora_trainer.train.signals import Status
from tests import tiny
from tests.faults.scene import Scene

ENVIRONMENT = {
    "HF_TOKEN": "hf_Canary1CanaryCanaryCanaryCanaryX",
    "WANDB_API_KEY": "ca1a2y0000111122223333444455556666777788",
    "AWS_SECRET_ACCESS_KEY": "canary/aws/wJalrXUtnFEMIK7MDENGbPxRf",
    "MY_SERVICE_PASSWORD": "canary-password-9f8e7d",
    "DB_PASS": "canary-db-pass-01",
    "REDIS_PWD": "canary-redis-pwd-02",
    "DATABASE_URL": "postgres://anna:canary-url-password-03@db.example.com/x",
    "STORAGE_CONNECTION_STRING": "Endpoint=sb://x;SharedAccessKey=canary-shared-key-04;",
}
IN_LINE = "hf_Canary2CanaryCanaryCanaryCanaryX"  # known by its shape
IN_ADDRESS = "canary-in-address-4711"
IN_RECIPE = "sk-canary3Canary3Canary3Canary3"
IN_ASSIGNMENT = "canary-assigned-4712"
IN_ROW = "ghp_Canary4Canary4Canary4Canary4Canary4"
PARTS = ["canary-url-password-03", "canary-shared-key-04"]
SECRETS = [*ENVIRONMENT.values(), *PARTS, IN_LINE, IN_ADDRESS, IN_RECIPE, IN_ASSIGNMENT, IN_ROW]
DRAWN = re.compile(r"[\s\u2500-\u257f]")  # what a table puts between the halves of a long word


def leaks(*folders: Path, text: str) -> list[str]:
    """Where a secret came out: printed, even in pieces, in any file (binary too) or in a file's name."""
    whole = DRAWN.sub("", text)
    found = [f"printed: {secret}" for secret in SECRETS if secret in whole]
    for folder in folders:
        for file in folder.rglob("*"):
            place = str(file.relative_to(folder))
            data = file.read_bytes() if file.is_file() else b""
            found += [f"{place}: {s}" for s in SECRETS if s in place or s.encode() in data]
    return found


def test_no_command_writes_a_secret_anywhere(scene: Scene, tmp_path: Path) -> None:
    """A canary for each way in: environment, path, URL, recipe, command line, rows and names of data.

    Every byte of the run's folder and of the caches is looked at, the tracker's own file too, and what was
    printed. The one exception is what the model learns: a secret in a row's text is in the tokens.
    """
    base = tiny.save(tmp_path / ENVIRONMENT["DB_PASS"] / f"model-{IN_LINE}")
    data = tmp_path / ENVIRONMENT["MY_SERVICE_PASSWORD"]
    held_out = tmp_path / "canary-url-password-03" / "held_out.jsonl"
    for folder in (data, held_out.parent):
        folder.mkdir()
    good = {"messages": [{"role": "user", "content": f"my token is {IN_ROW}"}]}
    good["messages"].append({"role": "assistant", "content": "blue"})
    bad = {"messages": [{"role": IN_LINE, "content": "red"}]}
    other = {"messages": [{"role": "user", "content": f"and mine {IN_ROW}"}, good["messages"][1]]}
    for file, rows in ((data / f"{IN_LINE}.jsonl", [*[good] * 12, bad]), (held_out, [other] * 2)):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"defaults: [tiny, _self_]\ntrack:\n  project: {IN_RECIPE}\nchat:\n"
        f"  system: see https://anna:{IN_ADDRESS}@example.com and password={IN_ASSIGNMENT}\n"
    )
    run = tmp_path / f"run-{ENVIRONMENT['REDIS_PWD']}"
    caches = {"data.cache_dir": tmp_path / "cache", "XDG_CACHE_HOME": tmp_path / "home"}
    env = ENVIRONMENT | {"WANDB_MODE": "offline", "XDG_CACHE_HOME": str(caches.pop("XDG_CACHE_HOME"))}
    where = {"model.model_name_or_path": base, "data.path": data, "data.eval_path": held_out, **caches}
    keys = where | {
        "recipe": recipe,
        "output_dir": run,
        "data.on_bad_row": "skip",
        "train.max_steps": 2,
        "train.max_length": 96,
        "track.report_to": "[wandb]",
        "evaluate.enabled": "true",
        "evaluate.task": "exact_match",
        "evaluate.max_new_tokens": 2,
        "export.verify_questions": 1,
    }
    again = [f"{key}={value}" for key, value in where.items()]

    def command(name: str, *arguments: str, code: int = 0) -> str:
        started = scene.runner.start(name, *arguments, env=env, hooks=[["probe_here"]])  # type: ignore[union-attr]
        assert started.wait(120) == code, started.text()
        return started.text()

    line = [f"{key}={value}" for key, value in keys.items()]
    said = command("inspect", *line)
    said += command("train", *line)
    said += command("train", *line)  # resumes, and finds its own folder again
    said += command("evaluate", f"run={run}", *again)
    said += command("export", f"run={run}", "format=[adapter,gguf]", "export.gguf_type=f16", *again)
    said += command("report", f"run={run}")
    made = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    for file in ("config.yaml", "report.html", "inspect.html", "evaluation.json", "adapter/README.md"):
        assert file in made
    assert any(run.rglob("*.wandb")) and (tmp_path / "home").is_dir() and (tmp_path / "cache").is_dir()
    assert leaks(run, tmp_path / "home", tmp_path / "cache", text=said) == []
    for masked in (run / "status.json", run / "adapter" / "README.md", run / "config.yaml"):
        assert MASK in masked.read_text()
    # What the files do not say has to be given again, and that is said.
    assert "model.model_name_or_path" in command("evaluate", f"run={run}", *again[1:], code=2)
    assert "data.eval_path" in command("evaluate", f"run={run}", again[0], code=2)


def test_the_command_and_the_settings_are_told_without_their_secrets(scene: Scene) -> None:
    """What tells of a run has its command line and all its keys: there, and masked."""
    text = scene.train("told", **{"track.project": IN_LINE})
    run = scene.folder / "told"
    assert f"output_dir={run} " in scene.status("told")["command"] + " "
    assert "track.project=***" in scene.status("told")["command"]
    assert "project: '***'" in (run / "adapter" / "README.md").read_text()
    assert leaks(run, text=text) == []


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
    assert leaks(text=run.text()) == []


def test_a_bug_that_quotes_a_secret_shows_none_with_and_without_a_traceback(scene: Scene) -> None:
    message = f"cannot reach {ENVIRONMENT['MY_SERVICE_PASSWORD']} with {IN_LINE}"
    text = scene.train("buggy", ("bug", message), env=ENVIRONMENT, expect=70)
    assert "RuntimeError" in text and "***" in text
    assert leaks(scene.folder / "buggy", text=text) == []
    assert scene.status("buggy")["state"] == "failed"


def test_the_canaries_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file.bin").write_bytes(b"\0" + IN_LINE.encode() + b"\0")
    assert leaks(tmp_path, text=f"x{IN_ADDRESS}x") == [
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
