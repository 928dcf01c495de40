"""`per_device_train_batch_size=auto`: the same tokens a step, whatever is chosen, and chosen once a run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qlora_trainer.__main__ import main
from qlora_trainer.plan import hardware
from qlora_trainer.plan import plan as planning
from qlora_trainer.plan.micro_batch import divisors
from qlora_trainer.plan.plan import RunPlan, make_plan
from qlora_trainer.plan.settings import DataFacts, expected_longest
from qlora_trainer.track.jsonl import read
from tests import tiny
from tests.plan.sizes import llama3_8b
from tests.plan.test_plan import config

AUTO = ("train.per_device_train_batch_size", "auto")
STEP = ("train.gradient_accumulation_steps", 24)
SHORT = ("train.max_length", 128)


def plan(gpu: str, *overrides: tuple[str, object], data: DataFacts | None = None) -> RunPlan:
    return make_plan(config(AUTO, STEP, *overrides), hardware.parse(gpu), llama3_8b(), data)


@pytest.mark.parametrize("gpu", ["H100", "A100 40GB", "24GiB", "8GiB", "4GiB"])
def test_rows_of_a_step_stay(gpu: str) -> None:
    found = plan(gpu)
    assert found.rows * found.accumulation == 24
    assert found == plan(gpu)


def test_short_rows_run_together_where_launching_takes_longer_than_computing() -> None:
    found = plan("H100", SHORT)
    assert found.rows > 1 and found.fits
    alone = make_plan(config(STEP, SHORT), hardware.parse("H100"), llama3_8b())
    assert found.seconds_per_step < 0.6 * alone.seconds_per_step
    assert found.tokens_per_step == alone.tokens_per_step


def test_no_other_micro_batch_that_fits_is_faster() -> None:
    for gpu in ("H100", "RTX 4090", "A10"):
        chosen = plan(gpu, ("train.max_length", 512))
        for rows in divisors(24):
            overrides = (
                ("train.max_length", 512),
                ("train.per_device_train_batch_size", rows),
                ("train.gradient_accumulation_steps", 24 // rows),
            )
            other = make_plan(config(*overrides), hardware.parse(gpu), llama3_8b())
            assert not other.fits or chosen.seconds_per_step <= 1.01 * other.seconds_per_step


def test_a_card_that_holds_one_row_gets_one() -> None:
    found = plan("12GiB", ("model.kernels", "reference"))
    assert found.fits and found.rows == 1
    assert "auto: 1 of" in " ".join(found.notes)
    refused = plan("4GiB")
    assert not refused.fits and (refused.rows, refused.accumulation) == (1, 24)


def test_rows_that_would_be_padded_stay_alone() -> None:
    """On a card that computes as fast alone, what differs is the padding."""
    lengths = tuple(np.linspace(64, 2048, 256, dtype=int).tolist())
    tokens = round(1000 * float(np.mean(lengths)))
    data = DataFacts(documents=1000, tokens=tokens, supervised=tokens, longest=2048, lengths=lengths)
    assert plan("RTX 4090", data=data).rows == 1
    padded = make_plan(
        config(("train.per_device_train_batch_size", 4)), hardware.parse("H100"), llama3_8b(), data
    )
    assert padded.tokens_per_step == pytest.approx(16 * expected_longest(lengths, 4))


def test_expected_longest_is_that_of_real_draws() -> None:
    rng = np.random.default_rng(0)
    documents = rng.lognormal(5, 0.8, 20_000)
    lengths = tuple(np.quantile(documents, (np.arange(256) + 0.5) / 256))
    for rows in (1, 4, 16):
        drawn = rng.choice(documents, (20_000, rows)).max(axis=1).mean()
        assert expected_longest(lengths, rows) == pytest.approx(drawn, rel=0.03)


@pytest.fixture(scope="module")
def line(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save(folder / "model")
    rows = [{"instruction": f"say {i}", "output": f"it is {i}!" * (1 + i % 3)} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "recipe=tiny",
        f"model.model_name_or_path={folder / 'model'}",
        f"data.path={folder / 'rows.jsonl'}",
        f"data.cache_dir={folder / 'cache'}",
    ]


AUTOMATIC = ["train.per_device_train_batch_size=auto", "train.gradient_accumulation_steps=4"]


def choose(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(planning, "pick", lambda *_: rows)


def steps(folder) -> list[tuple[float, float]]:
    return [(r["loss"], r["grad_norm"]) for r in read(folder / "metrics.jsonl")]


def test_auto_trains_what_its_choice_trains(tmp_path, line, monkeypatch) -> None:
    choose(monkeypatch, 2)
    given = ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2"]
    assert main([*line, *AUTOMATIC, f"output_dir={tmp_path / 'auto'}"]) == 0
    assert main([*line, *given, f"output_dir={tmp_path / 'given'}"]) == 0
    assert steps(tmp_path / "auto") == steps(tmp_path / "given") and len(steps(tmp_path / "auto")) == 4
    recorded = json.loads((tmp_path / "auto" / "plan.json").read_text())
    assert (recorded["rows"], recorded["accumulation"]) == (2, 2)


def test_a_resumed_run_keeps_its_micro_batch(tmp_path, line, monkeypatch, capsys) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    choose(monkeypatch, 2)
    assert main([*line, *AUTOMATIC, f"output_dir={whole}"]) == 0
    assert main([*line, *AUTOMATIC, f"output_dir={resumed}", "train.max_steps=2"]) == 0
    choose(monkeypatch, 4)  # as another machine would
    assert main([*line, *AUTOMATIC, f"output_dir={resumed}"]) == 0
    assert steps(resumed) == steps(whole)
    adapter = "adapter/adapter_model.safetensors"
    assert (resumed / adapter).read_bytes() == (whole / adapter).read_bytes()
    other = ["train.per_device_train_batch_size=auto", "train.gradient_accumulation_steps=8"]
    assert main([*line, *other, f"output_dir={resumed}"]) == 2
    assert "train.gradient_accumulation_steps was 2 and is now 4" in capsys.readouterr().err


def test_plan_and_inspect_take_auto(tmp_path, line, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *line, *AUTOMATIC, "plan.gpu=24GiB"]) == 0
    assert main(["inspect", *line, *AUTOMATIC]) == 0
    assert main(["recipes", *line, *AUTOMATIC]) == 0
    assert "per_device_train_batch_size: auto" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["0", "many", "1.5", "true"])
def test_nonsense_is_refused(line, value: str, capsys) -> None:
    assert main(["plan", *line, f"train.per_device_train_batch_size={value}"]) == 2
    assert "train.per_device_train_batch_size" in capsys.readouterr().err
