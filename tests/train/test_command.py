"""`train` as a user runs it, on a tiny model: files, resuming, evaluation, and no key without effect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_trainer.__main__ import main
from qlora_trainer.track.jsonl import read
from tests import tiny


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save(folder / "model")
    rows = [{"instruction": f"say {i}", "output": f"it is {i}!"} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"model.model_name_or_path={folder / 'model'}",
        f"data.path={folder / 'rows.jsonl'}",
        f"data.cache_dir={folder / 'cache'}",
    ]


EVALUATED = [
    "evaluate.enabled=true",
    "data.eval_fraction=0.2",
    "evaluate.eval_steps=2",
    "evaluate.examples=2",
]


def test_a_run_leaves_everything_it_promises(tmp_path, inputs, capsys):
    folder = tmp_path / "run"
    task = ["evaluate.task=exact_match", "evaluate.max_new_tokens=4"]
    assert main(["recipe=tiny", *inputs, *EVALUATED, *task, f"output_dir={folder}"]) == 0
    assert {
        "config.yaml",
        "plan.json",
        "status.json",
        "metrics.jsonl",
        "report.html",
        "checkpoints",
        "adapter",
    } <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert "measured" in json.loads((folder / "plan.json").read_text())
    records = read(folder / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in records if "eval_loss" in r] == [2, 4]
    (scores,) = json.loads((folder / "evaluation.json").read_text()).values()
    assert scores["tuned"]["loss"] == pytest.approx(records[-1]["eval_loss"], rel=1e-5)
    assert scores["base"]["loss"] > scores["tuned"]["loss"]
    output = capsys.readouterr()
    assert "exact match" in output.out and "run=" in output.err
    assert "without effect" not in output.err


def test_the_same_line_again_goes_on_and_a_finished_run_stays(tmp_path, inputs, capsys):
    line = ["recipe=tiny", *inputs, f"output_dir={tmp_path / 'run'}"]
    assert main([*line, "train.max_steps=2"]) == 0
    assert main(line) == 0
    assert [r["step"] for r in read(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert "step 2 of 4" in capsys.readouterr().err
    weights = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert main(line) == 0
    assert "nothing left to do" in capsys.readouterr().err
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("key", ["lora.r=8", "train.learning_rate=1e-3", "data.max_rows=20"])
def test_a_resume_with_another_arithmetic_is_refused(tmp_path, inputs, capsys, key):
    line = ["recipe=tiny", *inputs, f"output_dir={tmp_path / 'run'}"]
    assert main([*line, "train.max_steps=2"]) == 0
    assert main([*line, key]) == 2
    error = capsys.readouterr().err
    assert key.partition("=")[0].removesuffix(".max_rows") in error and "allow_change" in error


def test_held_out_rows_that_are_trained_on_are_refused_or_counted(tmp_path, inputs, capsys):
    rows = Path(inputs[1].partition("=")[2])
    line = ["recipe=tiny", *inputs, "evaluate.enabled=true", f"output_dir={tmp_path / 'run'}"]
    assert main([*line, f"data.eval_path={rows}"]) == 65
    assert "data.eval_path: all 40 held-out documents are training documents too" in capsys.readouterr().err
    held = tmp_path / "held"
    held.mkdir()
    (held / "dev.jsonl").write_text(rows.read_text() + '{"instruction": "new", "output": "new"}\n')
    (held / "train.jsonl").write_text(rows.read_text())
    assert main([*line, f"data.eval_path={held}", "evaluate.max_rows=2", "evaluate.examples=0"]) == 0
    error = capsys.readouterr().err
    assert "40 of 41 held-out documents are training documents too" in error
    assert f"{held}: train.jsonl not read" in error
    [part] = [
        part
        for part in json.loads((tmp_path / "run/status.json").read_text())["data"]
        if part["role"] != "training"
    ]
    assert "train.jsonl not read" in part["remarks"][0]
    assert "train.jsonl not read" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("packing", [False, True])
def test_the_fast_and_the_reference_path_learn_alike(tmp_path, inputs, packing):
    losses = {}
    for kernels in ("auto", "reference"):
        folder = tmp_path / kernels
        keys = [f"model.kernels={kernels}", f"train.packing={packing}", "lora.dtype=float32"]
        keys += ["train.learning_rate=1e-2", f"output_dir={folder}"]
        assert main(["recipe=tiny", *inputs, *EVALUATED, *keys]) == 0
        losses[kernels] = [r.get("loss", r.get("eval_loss")) for r in read(folder / "metrics.jsonl")]
    assert len(losses["auto"]) == 6 and losses["auto"][-1] < losses["auto"][0]
    assert losses["auto"] == pytest.approx(losses["reference"], rel=1e-5)
