import peft
import torch
from rich.console import Console

from qlora_trainer.evaluate.report import comparison, show
from qlora_trainer.evaluate.score import HeldOut, score_base_and_tuned
from qlora_trainer.model.forward import ReferenceForward
from tests import tiny
from tests.batches import collate


def test_base_and_tuned_are_measured_by_switching_the_adapter():
    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    model = peft.get_peft_model(
        tiny.model(), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    batch = collate([[torch.arange(6, 30)], [torch.arange(40, 60)]], supervised_from=8)
    held_out = HeldOut.of([batch], tokenizer, [2], "exact_match")
    assert len(held_out.questions) == 2
    base, tuned = score_base_and_tuned(model, ReferenceForward(model), held_out, tokenizer, [2])
    with model.disable_adapter():
        model.eval()
        plain = float(ReferenceForward(model)(batch).detach())
    assert base.loss.nll == plain and tuned.loss.nll != plain
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    show(comparison(base, tuned, examples=1), console)
    text = console.export_text()
    assert f"{base.loss.perplexity:.2f}" in text and f"{tuned.loss.perplexity:.2f}" in text
    assert "exact match" in text and "0.0%" in text and text.count("✗") == 2
