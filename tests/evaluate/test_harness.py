from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from qlora_trainer.errors import ConfigError, MissingInputError
from qlora_trainer.evaluate.harness import Harness, table
from qlora_trainer.model.lora import LoraOptions, attach
from tests import tiny

CHOICES = ["Paris", "Tokyo", "Cairo", "Delhi"]  # of one length: the shortest would always win
COUNTRIES = ["France", "Japan", "Egypt", "India"]
with_library = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs the extra eval (lm-eval), which is not here"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A task of four questions, as the library's users write them."""
    rows = [{"country": c, "choices": CHOICES, "answer": i} for i, c in enumerate(COUNTRIES)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "capitals.yaml").write_text(
        f"""
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
    )
    return tmp_path


def _accuracy(model: torch.nn.Module) -> float:
    """The same questions by hand: the choice whose tokens are likeliest after the question."""
    right = 0
    for answer, country in enumerate(COUNTRIES):
        question = tiny.tokenizer()(f"The capital of {country} is", add_special_tokens=False).input_ids
        scores = []
        for choice in CHOICES:
            ids = tiny.tokenizer()(f" {choice}", add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([question + ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[len(question) - 1 + i, token]) for i, token in enumerate(ids)))
        right += max(range(4), key=scores.__getitem__) == answer
    return right / 4


@with_library
def test_a_task_of_ones_own_is_measured_with_the_adapter_off_and_on(folder: Path) -> None:
    model = attach(tiny.model(), LoraOptions(r=4), seed=0).float().eval()
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    with model.disable_adapter():
        base = _accuracy(model)
    tuned = _accuracy(model)
    assert base != tuned, "the adapter of this test must matter"
    found = Harness(["capitals"], str(folder)).measure(model, tiny.tokenizer(), batch_size=2, max_rows=None)
    assert found["capitals"]["rows"] == 4
    acc = found["capitals"]["metrics"]["acc"]
    assert (acc["base"], acc["tuned"]) == (base, tuned) and acc["tuned_error"] is not None
    console = Console(width=100, record=True)
    console.print(table(found))
    assert f"{tuned:.4f} ± " in console.export_text()
    limited = Harness(["capitals"], str(folder)).measure(model, tiny.tokenizer(), batch_size=1, max_rows=2)
    assert limited["capitals"]["rows"] == 2


@with_library
def test_an_unknown_task_is_named_with_its_nearest(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no task is called 'capitls'; did you mean capitals"):
        Harness(["capitls"], str(folder))


@with_library
def test_data_that_cannot_be_had_are_one_line() -> None:
    model = attach(tiny.model(), LoraOptions(r=4), seed=0)
    with pytest.raises(MissingInputError, match=r"the data of arc_easy cannot be had: [^\n]+$"):
        Harness(["arc_easy"]).measure(model, tiny.tokenizer(), batch_size=1, max_rows=1)


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"evaluate\.lm_eval_path: no folder"):
        Harness(["capitals"], str(tmp_path / "none"))
