import io

import peft
import torch
from rich.console import Console

from qlora_trainer.evaluate.held_out import HeldOut
from qlora_trainer.evaluate.match import Question
from qlora_trainer.evaluate.report import comparison, show
from qlora_trainer.evaluate.score import score_base_and_tuned
from qlora_trainer.inference.generate import Sampling
from qlora_trainer.model.forward import ReferenceForward
from qlora_trainer.objectives.sft import sft
from tests import tiny
from tests.batches import collate


def test_base_and_tuned_are_measured_by_switching_the_adapter():
    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    model = peft.get_peft_model(
        tiny.model(), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    batch = collate([[torch.arange(6, 30)], [torch.arange(40, 60)]], supervised_from=8)
    asked = [Question(tuple(range(n, n + 8)), "right", "asked", source=f"/some/{n}.json") for n in (6, 40)]
    base, tuned = score_base_and_tuned(
        model, ReferenceForward(model), HeldOut([batch], asked), tokenizer, [2], Sampling(4)
    )
    with model.disable_adapter():
        model.eval()
        plain = float(sft(ReferenceForward(model)(batch)).detach())
    assert base.loss.nll == plain and tuned.loss.nll != plain
    console = Console(width=120, record=True, file=io.StringIO())
    show(comparison(base, tuned, examples=1), console)
    text = console.export_text()
    assert f"{base.loss.perplexity:.2f}" in text and f"{tuned.loss.perplexity:.2f}" in text
    assert "6.json" in text and "40.json" in text
    assert "exact match" in text and "0.0%" in text and text.count("✗") == 2
