"""Our loop against a loop anybody would write with transformers, PEFT and bitsandbytes."""

from __future__ import annotations

from functools import partial

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, get_cosine_schedule_with_warmup

from qlora_trainer.model.forward import ReferenceForward
from qlora_trainer.model.load import BaseOptions, load_base
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.objectives.sft import sft
from qlora_trainer.optim import make_optimizer
from qlora_trainer.optim.schedule import learning_rate
from qlora_trainer.train.distributed import Ranks
from qlora_trainer.train.health import MemoryGuard
from qlora_trainer.train.job import Job, MicroStep, Progress
from qlora_trainer.train.loop import train
from tests import tiny
from tests.train.test_loop import Loader

STEPS, PEAK, WARMUP, SEED = 20, 5e-3, 2, 11
CPU = torch.device("cpu")


def plain_loop(folder: str, loader: Loader) -> list[float]:
    """No line of ours but the data."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )
    torch.manual_seed(SEED)
    config = peft.LoraConfig(
        r=4, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=PEAK, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    losses = []
    for step in range(STEPS):
        (batch,) = loader.step(*divmod(step, loader.length)).micro_batches
        mask = (batch.document_ids >= 0).long()
        loss = model(input_ids=batch.input_ids, attention_mask=mask, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 0.3)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def our_loop(folder: str, loader: Loader, name: str, dtype: torch.dtype) -> list[float]:
    model = attach(load_base(BaseOptions(folder), CPU), LoraOptions(r=4, dtype=dtype), SEED)
    model.train()
    optimizer = make_optimizer(name, model.named_parameters())
    micro_step = MicroStep(ReferenceForward(model), sft, CPU)
    records: list[dict] = []
    schedule = partial(learning_rate, "cosine", peak=PEAK, warmup=WARMUP, total=STEPS)
    train(
        Job(
            Progress(), micro_step, optimizer, loader, Ranks(CPU), MemoryGuard(CPU), schedule,
            total_steps=STEPS, max_grad_norm=0.3, log=records.append, save=lambda progress: None,
        )
    )  # fmt: skip
    return [record["loss"] for record in records]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def plain(folder):
    return plain_loop(folder, Loader(new_every_epoch=False))


def test_loss_curve_equals_a_plain_loop(folder, plain):
    ours = our_loop(folder, Loader(new_every_epoch=False), "paged_adamw_32bit", torch.float32)
    assert plain[-1] < plain[0] - 0.01, "the plain loop does not learn: the comparison would show nothing"
    assert ours == pytest.approx(plain, rel=1e-6)


def test_accumulation_keeps_to_the_plain_loop(folder, plain):
    assert our_loop(folder, Loader(4, new_every_epoch=False), "adamw", torch.float32) == pytest.approx(
        plain, rel=1e-6
    )


def test_bfloat16_adapters_and_8bit_moments_stay_close(folder, plain):
    assert our_loop(folder, Loader(new_every_epoch=False), "adamw", torch.bfloat16) == pytest.approx(
        plain, rel=2e-3
    )
    assert our_loop(
        folder, Loader(new_every_epoch=False), "paged_adamw_8bit", torch.float32
    ) == pytest.approx(plain, rel=2e-3)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_every_architecture_takes_two_steps(tmp_path, architecture, method):
    folder = str(tiny.save(tmp_path, architecture))
    model = attach(load_base(BaseOptions(folder, method=method), CPU), LoraOptions(r=4), SEED)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer("paged_adamw_32bit", model.named_parameters())
    micro_step = MicroStep(ReferenceForward(model), sft, CPU)
    records: list[dict] = []
    train(
        Job(
            Progress(), micro_step, optimizer, Loader(new_every_epoch=False), Ranks(CPU), MemoryGuard(CPU),
            lambda step: 1e-2, total_steps=2, max_grad_norm=0.3, log=records.append,
            save=lambda progress: None,
        )
    )  # fmt: skip
    assert all(record["loss"] > 0 and record["grad_norm"] > 0 for record in records)
    changed = [n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert len(changed) == len(before)  # A of layer i moves once B has, in the second step
