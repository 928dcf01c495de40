"""Adapters: where they go, what they hold, and that the first forward is the base's."""

import pytest
import torch

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.load import BaseOptions, load_base
from qlora_trainer.model.lora import LoraOptions, attach
from tests import tiny

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture
def base(tmp_path):
    return load_base(BaseOptions(str(tiny.save(tmp_path))), CPU)


def test_adapters_are_bfloat16_on_every_linear_layer_but_the_head(base):
    before = base(input_ids=IDS).logits
    model = attach(base, LoraOptions(r=4), seed=1)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 7 * 2  # layers x linears x (A, B)
    assert all(p.dtype == torch.bfloat16 for p in trainable.values())
    assert not any("lm_head" in name for name in trainable)
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_the_seed_alone_decides_the_initial_adapter(tmp_path):
    def adapter(seed):
        folder = str(tiny.save(tmp_path / str(seed)))
        model = attach(load_base(BaseOptions(folder), CPU), LoraOptions(r=4), seed)
        return [p.detach().clone() for n, p in sorted(model.named_parameters()) if "lora_A" in n]

    first, same, other = adapter(1), adapter(1), adapter(2)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}]
)
def test_variants_train(base, options):
    model = attach(base, LoraOptions(r=4, **options), seed=1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    if "modules_to_save" in options:
        assert any("lm_head" in n and p.requires_grad for n, p in model.named_parameters())


def test_a_target_that_is_not_there_names_those_that_are(base):
    with pytest.raises(ConfigError, match=r"down_proj.*q_proj"):
        attach(base, LoraOptions(target_modules=["query"]), seed=1)
    with pytest.raises(ConfigError, match="'down_proj' is quantized"):
        attach(base, LoraOptions(modules_to_save=["down_proj"]), seed=1)
    with pytest.raises(ConfigError, match="'embed'"):
        attach(base, LoraOptions(modules_to_save=["embed"]), seed=1)
