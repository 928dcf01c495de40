"""argv -> command -> exit code: what each kind of ending looks like."""

from __future__ import annotations

import errno
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_trainer import commands
from qlora_trainer.__main__ import main
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import CheckpointError, DataError, DivergedError, PreemptedError

Endings = Callable[[BaseException | None], list[RunConfig]]


@pytest.fixture
def recipes_ends_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Endings:
    """Puts a stand-in where the command `recipes` is imported from; returns the configs it was given."""
    monkeypatch.chdir(tmp_path)

    def install(error: BaseException | None) -> list[RunConfig]:
        seen: list[RunConfig] = []

        def run(config: RunConfig) -> None:
            seen.append(config)
            if error is not None:
                raise error

        module = types.ModuleType("qlora_trainer.commands.recipes")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "qlora_trainer.commands.recipes", module)
        return seen

    return install


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DivergedError("train: loss is NaN at step 3"), 3),
        (DataError("a.jsonl:3: broken"), 65),
        (CheckpointError("step-000200: damaged"), 74),
        (PreemptedError("stopped at step 7; the same command goes on"), 75),
        (OSError(errno.ENOSPC, "No space left on device", "/full/file"), 74),
        (KeyboardInterrupt(), 130),
        (RuntimeError("two\nlines"), 70),
        (AssertionError("an invariant"), 70),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_ending_has_its_code_and_one_line(
    error: BaseException, code: int, recipes_ends_with: Endings, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes_ends_with(error)
    assert main(["recipes"]) == code
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert ("this is a bug" in line) == (code == 70)


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_tracebacks_are_shown_when_asked_for(
    how: str, recipes_ends_with: Endings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes_ends_with(RuntimeError("deep inside"))
    if how == "environment":
        monkeypatch.setenv("QLORA_TRACEBACK", "1")
    assert main(["recipes"] + (["-v"] if how == "flag" else [])) == 70
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_only_rank_zero_speaks_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["recipes", "lora.rr=1"]) == 2
    assert capsys.readouterr().err == ""


def test_what_only_another_rank_met_is_said_by_that_rank(
    recipes_ends_with: Endings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes_ends_with(RuntimeError("only here"))
    monkeypatch.setenv("RANK", "3")
    assert main(["recipes"]) == 70
    assert capsys.readouterr().err.startswith("[rank 3] error: ")


def test_the_command_gets_the_composed_configuration(recipes_ends_with: Endings) -> None:
    seen = recipes_ends_with(None)
    assert main(["recipes", "recipe=tiny", "lora.r=3"]) == 0
    assert seen[0].lora.r == 3 and seen[0].train.max_steps == 4 and seen[0].output_dir == "outputs/tiny"


def test_nothing_at_all_prints_usage_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "usage: " in shown.err and "llama7b_alpaca" in shown.err


def test_help_lists_the_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, summary in commands.available().items():
        assert name in out and summary and summary in out


def test_a_command_is_a_module_with_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plan.py").write_text('"""Says what will happen."""\ndef run(config): pass\n')
    (tmp_path / "helper.py").write_text('"""No command: has no run."""\n')
    monkeypatch.setattr(commands, "__path__", [str(tmp_path)])
    assert commands.available() == {"plan": "Says what will happen."}


def test_recipes_are_listed_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("# My own\ndefaults: [tiny, _self_]\nlora: {r: 5}\n")
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert "mine" in listed and "My own" in listed and "smollm2_demo" in listed
    assert main(["recipes", "recipe=mine"]) == 0
    shown = capsys.readouterr().out
    assert "  r: 5\n" in shown and "  max_steps: 4\n" in shown


def test_a_sweep_runs_every_combination_in_a_folder_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qlora_trainer", "recipes", "-m", "recipe=tiny", "lora.r=8,16"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for number, r in ((1, 8), (2, 16)):
        assert f"[{number}/2] recipes recipe=tiny lora.r={r}" in done.stdout
        assert f"output_dir: outputs/tiny-sweep/lora.r={r}\n" in done.stdout


@pytest.mark.parametrize("reader", ["true", "sleep 3", "head -1"])  # gone before a word, after it, in between
def test_a_reader_that_goes_away_is_no_error(reader: str) -> None:
    command = f"'{sys.executable}' -m qlora_trainer recipes | {reader}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""


def test_a_sweep_inside_a_multi_process_launch_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["-m", "recipes", "lora.r=8,16"]) == 2
    assert "launch each run of it by itself" in capsys.readouterr().err
