"""What the schema says of who reads a key is so: every command is watched while it works."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.__main__ import main
from qlora_trainer.config import frozen
from qlora_trainer.config.effect import LATER
from qlora_trainer.config.schema import FACTS, RunConfig
from tests import tiny

# Read by code that serves several commands, and of no effect in this one.
READ_ALONG = {
    "train": {"export.format"},  # the plan says whether merging is ahead
    "evaluate": {"data.num_workers"},  # the data room is given its whole section
    "export": {"data.num_workers"},
    "verify": {"data.num_workers"},
    "chat": set(),
}
# Of effect only where something is that these runs have not: a hub, W&B, lm-evaluation-harness …
NOT_TRIED = {
    "train": {"track.project"},
    "evaluate": {"evaluate.lm_eval_path"},
    "export": {"export.hub_private"},
    "verify": set(),
    "chat": set(),
}
NAMES = {"recipe", "output_dir", "run"}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Dotted keys that are looked at as attributes of a configuration."""
    sections = {
        type(value): name
        for name, value in vars(RunConfig()).items()
        if hasattr(value, "__dataclass_fields__")
    }
    found: set[str] = set()

    def recorded(self: Any, name: str) -> Any:
        base = next(cls for cls in type(self).__mro__ if cls.__module__ == RunConfig.__module__)
        key = f"{sections[base]}.{name}" if base in sections else name
        if key in FACTS:
            found.add(key)
        return object.__getattribute__(self, name)

    monkeypatch.setattr(frozen._Frozen, "__getattribute__", recorded, raising=False)
    yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readers")
    tiny.save(folder / "model")
    rows = [{"instruction": f"say {i}", "output": f"it is {i}!"} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def check(command: str, reads: set[str]) -> None:
    declared = {key for key, facts in FACTS.items() if command in facts.by} - NAMES
    assert reads - declared - NAMES <= READ_ALONG[command]
    assert declared - reads <= NOT_TRIED[command]


def test_readers_are_as_the_schema_says(
    folder: Path, reads: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [f"model.model_name_or_path={folder / 'model'}", f"data.path={folder / 'rows.jsonl'}"]
    given += [f"data.cache_dir={folder / 'cache'}", "data.eval_fraction=0.2", f"output_dir={folder / 'run'}"]
    given += ["evaluate.enabled=true", "evaluate.task=exact_match", "evaluate.max_new_tokens=2"]
    given += ["recipe=tiny", "train.max_steps=-1", "train.num_train_epochs=0.2"]
    assert main(given) == 0
    assert main(given) == 0  # resumed, which reads what may change
    check("train", reads)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    monkeypatch.setattr("qlora_trainer.jobs.verification.verify", lambda *given, **keywords: [])  # takes long
    commands = {
        "evaluate": [],
        "chat": ["chat.max_new_tokens=2"],
        "export": ["export.format=[merged]", "export.verify_rows=2", "export.verify_questions=1"],
        "verify": ["export.verify_rows=2", "export.verify_questions=1"],
    }
    assert tuple(commands) == LATER
    for command, more in commands.items():
        reads.clear()
        assert main([command, f"run={folder / 'run'}", *more]) == 0
        check(command, reads)
