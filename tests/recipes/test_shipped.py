"""Every recipe that comes with the package composes, and its header says what to expect."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import yaml

from qlora_trainer.config import checks, recipes
from qlora_trainer.config.load import load

SHIPPED = sorted(recipes.builtin_folder().glob("*.yaml"))
FIELDS = ("Reproduces:", "Hardware:", "Time:", "Memory:", "Expected loss:")
ROOT = Path(__file__).parents[2]


def test_there_are_recipes() -> None:
    assert {"smollm2_demo", "llama7b_alpaca", "llama7b_guanaco", "tiny"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_it_composes_without_a_problem(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "_packages", lambda config, command: [])  # an extra may not be installed here
    own = [] if path.stem != "tiny" else ["model.model_name_or_path=m", "data.path=d"]
    config = load([f"recipe={path.stem}", *own])
    assert config.recipe == path.stem and config.output_dir == f"outputs/{path.stem}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_its_header_says_what_to_expect(path: Path) -> None:
    header = recipes.header(path)
    assert header[0] and len(header[0]) < 120, "the first line is what `recipes` lists"
    for field in FIELDS:
        assert any(line.startswith(field) and line.removeprefix(field).strip() for line in header), field


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_it_sets_nothing_to_the_value_it_would_inherit(path: Path) -> None:
    *parents, recipe = recipes.load(path.stem)
    inherited = {key: value for parent in parents for key, value in parent.values.items()}
    repeated = [key for key, value in recipe.values.items() if inherited.get(key, object()) == value]
    assert not repeated


def test_llama7b_alpaca_has_the_papers_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("llama7b_alpaca", "llama7b_guanaco"):
        config = load([f"recipe={name}"])
        lora, train = config.lora, config.train
        assert lora.target_modules == "all-linear"
        assert (config.quantization.method, config.quantization.bnb_4bit_use_double_quant) == ("nf4", True)
        assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (
            64,
            16,
            0.1,
            "all-linear",
        )
        assert (train.learning_rate, train.lr_scheduler_type, train.max_grad_norm) == (2e-4, "constant", 0.3)
        assert (train.warmup_ratio, train.group_by_length) == (0.03, True)
        # rows of a step, of which the plan says how many run at once
        assert (train.per_device_train_batch_size, train.gradient_accumulation_steps) == ("auto", 16)
        assert config.optim.name == "paged_adamw_32bit" and config.optim.adam_beta2 == 0.999


def test_a_wheel_carries_the_recipes_and_what_pages_are_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hatchling = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(ROOT)
    wheel = tmp_path / hatchling.build_wheel(str(tmp_path))
    with zipfile.ZipFile(wheel) as archive:
        carried = {name for name in archive.namelist() if name.startswith("qlora_trainer/recipes/")}
        assert carried == {f"qlora_trainer/recipes/{path.name}" for path in SHIPPED}
        assert "qlora_trainer/commands/recipes.py" in archive.namelist()
        pages = (ROOT / "qlora_trainer" / "track" / "report_page", ROOT / "qlora_trainer" / "data")
        for path in [*pages[0].iterdir(), pages[1] / "page.html"]:
            assert str(path.relative_to(ROOT)) in archive.namelist()
        assert "qlora_trainer/track/report_page/uPlot.LICENSE" in archive.namelist()
        for name in carried:
            yaml.safe_load(archive.read(name))
