"""Keys that were set and change nothing are named before anything runs, and no other key is."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_trainer.config import recipes
from qlora_trainer.config.effect import without_effect
from qlora_trainer.config.load import load

NEEDED = ["recipe=tiny", "model.model_name_or_path=m", "data.path=d"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qlora_trainer.config.checks._packages", lambda config, command: [])
    (tmp_path / "d.jsonl").write_text("{}")
    return tmp_path


def idle(line: str, command: str = "train") -> list[str]:
    needed = NEEDED[:2] if command == "chat" else NEEDED
    found = without_effect(load([*needed, *line.split()], command), command)
    return [text.partition(" ")[0] for text in found]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "quantization.method=none quantization.bnb_4bit_use_double_quant=true optim.name=adamw "
            "optim.resident_gib=1 chat.top_p=0.5",
            ["optim.resident_gib", "quantization.bnb_4bit_use_double_quant"],
        ),
        ("quantization.method=fp4 quantization.bnb_4bit_use_double_quant=true", []),
        ("optim.name=paged_adamw_8bit optim.resident_gib=1", []),
        ("track.project=mine", ["track.project"]),
        ("track.project=mine track.report_to=[wandb]", []),
        ("train.num_train_epochs=2", ["train.num_train_epochs"]),  # the recipe says max_steps=4
        ("train.num_train_epochs=2 train.max_steps=-1", []),
        ("model.kernels=reference train.base_gemm=fp8", ["train.base_gemm"]),
        ("data.path=d.jsonl data.streaming=true data.name=en", ["data.name", "data.streaming"]),
        ("data.path=someone/set data.streaming=true data.name=en", []),
        ("evaluate.examples=9", ["evaluate.examples"]),
        ("evaluate.eval_steps=2", ["evaluate.eval_steps"]),  # the recipe does not evaluate
        ("plan.num_processes=2", ["plan.num_processes"]),
        (
            "export.bits=8 chat.temperature=1 evaluate.lm_eval_tasks=[x]",
            [],
        ),  # kept for later
    ],
)
def test_what_a_training_line_sets_in_vain(line: str, expected: list[str]) -> None:
    assert idle(line) == expected
    assert idle(line, "inspect") == expected, "a preview is given the line of the run"


def test_a_preview_reads_its_own_keys_too() -> None:
    assert idle("plan.num_processes=2 plan.gpu=24GiB train.learning_rate=1e-3", "plan") == []


@pytest.mark.parametrize(
    ("command", "line", "expected"),
    [
        ("evaluate", "lora.r=2 evaluate.max_rows=3 evaluate.enabled=false", ["evaluate.enabled", "lora.r"]),
        ("chat", "chat.top_p=0.5 evaluate.max_rows=3", ["chat.top_p", "evaluate.max_rows"]),
        ("chat", "chat.top_p=0.5 chat.temperature=1", []),
        ("export", "export.format=[gguf] export.bits=8 export.gguf_type=q4_0", ["export.bits"]),
        ("export", "export.format=[gptq] export.bits=8 export.desc_act=true export.verify_rows=2", []),
        ("export", "export.verify=false export.verify_rows=2", ["export.verify_rows"]),
        ("export", "export.merge_base=original", ["export.merge_base"]),
        ("export", "export.hub_private=false", ["export.hub_private"]),
        (
            "verify",
            "export.verify=false export.max_kl=2 export.bits=4",
            ["export.bits", "export.verify"],
        ),
        ("recipes", "lora.r=2 plan.num_processes=2", []),
    ],
)
def test_what_another_command_does_not_read(command: str, line: str, expected: list[str]) -> None:
    assert idle(line, command) == expected


def test_the_reason_is_given() -> None:
    config = load([*NEEDED, "optim.name=adamw", "optim.resident_gib=1"])
    assert without_effect(config, "train") == [
        "optim.resident_gib (only with optim.name=paged_adamw_32bit|paged_adamw_8bit)"
    ]
    evaluated = load([*NEEDED, "lora.r=2"], "evaluate")
    assert without_effect(evaluated, "evaluate") == ["lora.r (evaluate does not read it)"]


def test_a_recipe_is_named_for_what_is_its_own_fault(here: Path) -> None:
    (here / "mine.yaml").write_text("defaults: [tiny, _self_]\noptim: {name: adamw, resident_gib: 1}\n")
    line = ["recipe=mine.yaml", *NEEDED[1:]]
    assert len(without_effect(load(line), "train")) == 1
    paged = load([*line, "optim.name=paged_adamw_32bit"])
    assert without_effect(paged, "train") == []
    (here / "mine.yaml").write_text("defaults: [tiny, _self_]\noptim: {resident_gib: 1}\n")
    assert without_effect(load([*line, "optim.name=adamw"]), "train") == [], "the line took it away"


@pytest.mark.parametrize("path", sorted(recipes.builtin_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_sets_nothing_in_vain(path: Path) -> None:
    config = load([f"recipe={path.stem}", *(NEEDED[1:] if path.stem == "tiny" else [])])
    assert without_effect(config, "train") == []
