"""A start that is refused leaves every byte of the run as it was; one that goes on says what is otherwise."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_trainer.__main__ import main
from qlora_trainer.system import disk
from qlora_trainer.track.jsonl import read
from tests import tiny

EVALUATED = ["evaluate.enabled=true", "data.eval_fraction=0.2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, rows, and a run of four steps in `run`."""
    folder = tmp_path_factory.mktemp("world")
    tiny.save(folder / "model")
    tiny.save(folder / "other", seed=1)
    for name, word in (("rows", "it is"), ("others", "it was")):
        rows = [{"instruction": f"say {i}", "output": f"{word} {i}!"} for i in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(line(folder)) == 0
    return folder


def line(
    world: Path, *changes: str, model: str = "model", rows: str = "rows", output: str = "run"
) -> list[str]:
    return [
        "recipe=tiny",
        f"model.model_name_or_path={world / model}",
        f"data.path={world / rows}.jsonl",
        f"data.cache_dir={world / 'cache'}",
        f"output_dir={world / output}",
        *EVALUATED,
        *changes,
    ]


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of change of every file."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        (["lora.r=16"], 2, "lora.r was 4 and is now 16"),
        (["seed=7"], 2, "seed was 42 and is now 7"),
        (["lora.init_lora_weights=gaussian"], 2, "lora.init_lora_weights was True"),
        (["train.deterministic=true"], 2, "train.deterministic was False"),
        (["lora.rr=16"], 2, "unknown key"),
        (["model.kernels=reference"], 2, "model.kernels was 'fast' and is now 'reference'"),
        (["model.dtype=bfloat16"], 2, "model.dtype was 'float32' and is now 'bfloat16'"),
        (["data.max_rows=20"], 2, "data was"),
        (["data.path=[{path: ROWS, weight: 2}]"], 2, "data was"),
        (["train.max_steps=2"], 2, "has been trained for 4 steps and 2 are asked for"),
        (["plan.gpu=1GiB", "train.max_length=8192"], 2, "train.max_length was 64"),
        (["checkpoint.resume_from_checkpoint=/nowhere"], 66, "no such folder"),
        (["data.path=/nowhere.jsonl"], 66, "does not exist"),
        (["checkpoint.allow_change=[lora]", "lora.r=2"], 74, "does not fit"),
        (["checkpoint.allow_change=[lara]"], 2, "no field 'lara'"),
    ],
)
def test_a_refused_start_changes_nothing(
    world: Path, changes: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(world / "run")
    changes = [change.replace("ROWS", str(world / "rows.jsonl")) for change in changes]
    assert main(line(world, *changes)) == code
    assert said in capsys.readouterr().err
    assert snapshot(world / "run") == before


def test_another_base_and_other_rows_change_nothing(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(world / "run")
    assert main(line(world, model="other")) == 2
    assert "model.base was" in capsys.readouterr().err
    assert main(line(world, rows="others")) == 2
    assert "data was" in capsys.readouterr().err
    assert snapshot(world / "run") == before


def test_a_plan_that_does_not_fit_changes_nothing(world: Path) -> None:
    before = snapshot(world / "run")
    assert main(line(world, "plan.gpu=0.4GiB")) == 2
    assert snapshot(world / "run") == before


def test_a_full_disk_changes_nothing(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(world / "run")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 70 << 20})())
    monkeypatch.setattr("qlora_trainer.checkpoint.publish.space_needed", lambda *arguments: 1 << 30)
    assert main(line(world)) == 74
    assert snapshot(world / "run") == before


def test_a_second_start_beside_a_running_one_changes_nothing(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(world / "run")
    hold = "import sys; from qlora_trainer.system import disk; from pathlib import Path\n"
    hold += "held = disk.lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(world / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    try:
        assert main(line(world, "checkpoint.save_steps=1")) == 74
    finally:
        other.communicate()
    assert "another process is at work" in capsys.readouterr().err
    assert snapshot(world / "run") == before


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["evaluate", "evaluate.max_rows=0"], 2),
        (["evaluate", "data.eval_fraction=0"], 65),
        (["export", "format=[merged]", "export.bits=99"], 2),
        (["export", "export.format=[gptq]", "export.bits=5"], 2),
        (["verify"], 2),
        (["report", "lora.rr=1"], 2),
        (["chat", "chat.top_p=7"], 2),
    ],
)
def test_a_refused_command_about_a_run_changes_nothing(world: Path, command: list[str], code: int) -> None:
    before = snapshot(world / "run")
    assert main([command[0], f"run={world / 'run'}", *command[1:]]) == code
    assert snapshot(world / "run") == before


@pytest.mark.parametrize("command", [["inspect", "data.format=oasst"], ["plan", "plan.gpu=nothing"]])
def test_a_refused_preview_in_a_runs_folder_changes_nothing(world: Path, command: list[str]) -> None:
    before = snapshot(world / "run")
    assert main([command[0], *line(world), *command[1:]]) != 0
    assert snapshot(world / "run") == before


def test_a_moved_base_and_moved_rows_of_the_same_content_go_on(world: Path) -> None:
    tiny.save(world / "moved")
    (world / "renamed").mkdir()
    (world / "renamed" / "rows.jsonl").write_bytes((world / "rows.jsonl").read_bytes())
    assert main(line(world, "train.max_steps=2", output="moving")) == 0
    assert main(line(world, output="moving", model="moved", rows="renamed/rows")) == 0
    assert [r["step"] for r in read(world / "moving" / "metrics.jsonl") if "loss" in r] == [1, 2, 3, 4]


def test_a_longer_schedule_that_would_jump_is_refused_unless_asked_for(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cosine = ["train.lr_scheduler_type=cosine", "train.learning_rate=1e-3", "train.warmup_ratio=0"]
    assert main(line(world, *cosine, output="cosine")) == 0
    before = snapshot(world / "cosine")
    capsys.readouterr()
    assert main(line(world, *cosine, "train.max_steps=8", output="cosine")) == 2
    jump = "the learning rate jumps from 0 to 0.0005 after step 4"
    assert jump in capsys.readouterr().err
    assert snapshot(world / "cosine") == before
    epochs = ["train.max_steps=-1", "train.num_train_epochs=1"]
    assert main(line(world, *cosine, *epochs, output="cosine")) == 2
    asked = [*cosine, "train.max_steps=8", "checkpoint.allow_change=[train.max_steps]"]
    assert main(line(world, *asked, output="cosine")) == 0
    assert f"laid out for 4 steps, of 8 now: {jump}" in capsys.readouterr().err
    rates = [
        record["learning_rate"] for record in read(world / "cosine" / "metrics.jsonl") if "loss" in record
    ]
    assert len(rates) == 8 and rates[4] == pytest.approx(5e-4) and rates[7] < rates[6] < rates[5]


def test_a_constant_schedule_is_extended_without_asking(world: Path) -> None:
    assert main(line(world, "train.max_steps=2", output="constant")) == 0
    assert main(line(world, output="constant")) == 0
    assert [r["step"] for r in read(world / "constant" / "metrics.jsonl") if "loss" in r] == [1, 2, 3, 4]


def test_starting_over_keeps_all_that_was_there(world: Path) -> None:
    assert main(line(world, "train.max_steps=2", output="over")) == 0
    kept = {name: value[0] for name, value in snapshot(world / "over").items()}
    assert main(line(world, "lora.r=2", "checkpoint.resume_from_checkpoint=never", output="over")) == 0
    old = {name: value[0] for name, value in snapshot(world / "over" / "old-1").items()}
    products = ("checkpoints", "adapter", "metrics.jsonl", "evaluation.json", "config.yaml")
    assert old and old == {name: value for name, value in kept.items() if name.startswith(products)}


def test_the_only_step_of_a_run_learns_something(world: Path) -> None:
    from safetensors.torch import load_file

    assert main(line(world, "train.max_steps=1", output="single")) == 0
    adapter = load_file(world / "single" / "adapter" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)


def test_a_finished_runs_status_is_in_no_phase(world: Path) -> None:
    status = json.loads((world / "run" / "status.json").read_text())
    assert status["state"] == "done" and "phase" not in status


def test_lines_of_metrics_that_are_no_records_cost_only_themselves(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = world / "torn"
    assert main(line(world, output="torn")) == 0
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    bad = [b'{"step": 2, "lo\n', b"null\n", b"\xff\xfe\n"]
    (folder / "metrics.jsonl").write_bytes(b"".join([lines[0], *bad, *lines[2:]]))
    for name in ("plan.json", "status.json", "evaluation.json", "report.html"):
        (folder / name).write_bytes(b'{"sessions": 5, "first_step"')
    capsys.readouterr()
    assert main(["report", f"run={folder}"]) == 0
    assert main(line(world, "train.max_steps=6", output="torn")) == 0
    said = capsys.readouterr().err
    assert said.count("3 lines are no records and kept in metrics.jsonl.bad") == 1
    assert (folder / "metrics.jsonl.bad").read_bytes() == b"".join(bad)
    assert [r["step"] for r in read(folder / "metrics.jsonl") if "loss" in r] == [1, 3, 4, 5, 6]
    assert main(line(world, "train.max_steps=7", output="torn")) == 0
    assert "no record" not in capsys.readouterr().err
