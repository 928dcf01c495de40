"""Every kind of stored base trains, and its adapter is exported and loads back onto it."""

import importlib.util

import pytest
import torch

from qlora_trainer.errors import ConfigError
from qlora_trainer.export.adapter import TrainedOn, export_adapter
from qlora_trainer.export.quantize import QuantizeOptions, quantize
from qlora_trainer.inference.load import load
from qlora_trainer.model.forward import ReferenceForward
from qlora_trainer.model.load import BaseOptions, load_base
from qlora_trainer.model.lora import LoraOptions, attach
from tests import tiny
from tests.batches import collate, documents
from tests.export import runs
from tests.export.test_merge import logits
from tests.export.test_verify import exporter

needs_gptqmodel = pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is None, reason="needs the extra `quantize`"
)


def stored_base(tmp_path, method):
    """A base on disk: plain weights for `none`, else a checkpoint already quantized that way."""
    if method in ("none", "plain-nf4", "plain-int8"):
        return tiny.save(tmp_path / "base", intermediate_size=128)
    if method in ("gptq", "awq"):
        plain = tiny.save(tmp_path / "plain", intermediate_size=128, num_key_value_heads=4)
        rows = [document.tolist() for document in documents([64] * 4)]
        options = QuantizeOptions(method, group_size=32, sym=method == "gptq")
        quantize(plain, tmp_path / "base", options, rows, 2, "cpu", tmp_path / "log.txt")
        return tmp_path / "base"
    return exporter(runs.make(tmp_path / "first")).export(method)  # our own export, trained on again


@pytest.mark.parametrize(
    "method",
    [
        "none",
        "nf4",
        "int8",
        pytest.param("gptq", marks=needs_gptqmodel),
        pytest.param("awq", marks=needs_gptqmodel),
    ],
)
def test_a_stored_base_trains_and_its_adapter_comes_back(tmp_path, method):
    base = stored_base(tmp_path, method)
    options = BaseOptions(str(base), method=method)
    model = attach(load_base(options, runs.CPU), LoraOptions(r=4, dtype=torch.float32), seed=1)
    assert sum(name.endswith("lora_B.default.weight") for name, _ in model.named_parameters()) == 14
    forward = ReferenceForward(model.train())
    batch = collate([[document] for document in documents([20, 24])])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = forward(batch) / batch.n_supervised
        loss.backward()
        assert all(parameter.grad is not None for parameter in trainable)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1

    trained = TrainedOn.with_options(options, runs.CPU)
    folder = export_adapter(model, tiny.tokenizer(), tmp_path / "run" / "adapter", trained)
    # GPTQModel's CPU kernels pack their weights anew for inference and round scales in doing so.
    packed = 5e-3 if method in ("gptq", "awq") else 0.0
    assert torch.allclose(logits(load(folder).model), logits(model.eval()), rtol=0, atol=packed)


@needs_gptqmodel
def test_nothing_is_merged_into_gptq(tmp_path):
    base = stored_base(tmp_path, "gptq")
    model = attach(load_base(BaseOptions(str(base), method="gptq"), runs.CPU), LoraOptions(r=4), seed=1)
    trained = TrainedOn.with_options(BaseOptions(str(base), method="gptq"), runs.CPU)
    adapter = export_adapter(model, tiny.tokenizer(), tmp_path / "run" / "adapter", trained)
    run = runs.Run(base, adapter, model, BaseOptions(str(base), method="gptq"), tiny.tokenizer())
    with pytest.raises(ConfigError, match=r"stored as gptq: nothing can be merged"):
        exporter(run).check(["merged"])
    assert (exporter(run).export("adapter") / "adapter_model.safetensors").is_file()


def test_a_method_that_the_checkpoint_is_not_is_named(tmp_path):
    base = stored_base(tmp_path, "nf4")
    with pytest.raises(ConfigError, match=r"already stored as nf4: set quantization\.method=nf4"):
        load_base(BaseOptions(str(base), method="int8"), runs.CPU)
