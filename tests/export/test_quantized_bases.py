"""Every kind of base trains, its adapter comes back onto it, and what else it can leave as is said early."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from qlora_trainer.errors import ConfigError
from qlora_trainer.export.adapter import TrainedOn, export_adapter
from qlora_trainer.export.formats import FORMATS
from qlora_trainer.export.quantize import QuantizeOptions, quantize
from qlora_trainer.export.verify import verify
from qlora_trainer.inference.load import load
from qlora_trainer.inference.records import read_json
from qlora_trainer.model.forward import ReferenceForward
from qlora_trainer.model.load import BaseOptions, load_base
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.objectives.sft import sft
from tests import tiny
from tests.batches import collate, documents
from tests.export import runs
from tests.export.test_merge import logits
from tests.export.test_verify import exporter, sample, yardstick

needs_gptqmodel = pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is None, reason="needs the extra `quantize`"
)


GPTQ_AND_AWQ = [pytest.param(method, marks=needs_gptqmodel) for method in ("gptq", "awq")]


def base_held_as(tmp_path, held):
    """A base on disk and its method: plain weights, or after `stored-` a checkpoint quantized that way."""
    method = held.removeprefix("stored-")
    if held == method and method not in ("gptq", "awq"):
        return tiny.save(tmp_path / "base", intermediate_size=128), method
    plain = tiny.save(tmp_path / "plain", intermediate_size=128, num_key_value_heads=4)
    if method not in ("gptq", "awq"):
        return runs.store(plain, tmp_path / "base", method), method
    rows = [document.tolist() for document in documents([64] * 4)]
    options = QuantizeOptions(method, group_size=32, sym=method == "gptq")
    quantize(plain, tmp_path / "base", options, rows, 2, "cpu", tmp_path / "log.txt")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base", method


@pytest.mark.parametrize(
    "held", ["none", "nf4", "fp4", "int8", "stored-nf4", "stored-fp4", "stored-int8", *GPTQ_AND_AWQ]
)
def test_every_base_trains_and_its_adapter_comes_back(tmp_path, held):
    base, method = base_held_as(tmp_path, held)
    options = BaseOptions(str(base), method=method)
    model = attach(load_base(options, runs.CPU), LoraOptions(r=4, dtype=torch.float32), seed=1)
    assert sum(name.endswith("lora_B.default.weight") for name, _ in model.named_parameters()) == 14
    forward = ReferenceForward(model.train())
    batch = collate([[document] for document in documents([20, 24])])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = sft(forward(batch)) / batch.n_supervised
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


def adapter_on(base, tmp_path, method):
    """A run whose adapter was never trained, but moved, on the base in a folder."""
    options = BaseOptions(str(base), method=method)
    model = attach(load_base(options, runs.CPU), LoraOptions(r=4, dtype=torch.float32), seed=1)
    runs.stir(model, 0.15)
    trained = TrainedOn.with_options(options, runs.CPU)
    adapter = export_adapter(model, tiny.tokenizer(), tmp_path / "run" / "adapter", trained)
    return runs.Run(base, adapter, model.eval(), options, tiny.tokenizer())


@pytest.mark.parametrize("held", ["stored-fp4", *GPTQ_AND_AWQ])
def test_the_adapter_of_a_stored_base_is_verified_by_plain_peft(tmp_path, held):
    base, method = base_held_as(tmp_path, held)
    run = adapter_on(base, tmp_path, method)
    yard = replace(
        yardstick(run), trained=read_json(run.adapter / "training.json") | {"stored_quantized": True}
    )
    folder = exporter(run).export("adapter")
    *_, found = verify(yard, {"adapter": folder}, sample(), max_new_tokens=4)
    assert found.passed, found.failures


@pytest.mark.parametrize(
    ("held", "merged"),
    [
        *((held, True) for held in ("none", "nf4", "fp4", "int8", "stored-nf4", "stored-fp4", "stored-int8")),
        *(pytest.param(method, False, marks=needs_gptqmodel) for method in ("gptq", "awq")),
    ],
)
def test_what_each_base_can_leave_as_is_said_before_loading(tmp_path, monkeypatch, held, merged):
    monkeypatch.setattr("qlora_trainer.export.quantize.require_library", lambda: None)
    base, method = base_held_as(tmp_path, held)
    run = adapter_on(base, tmp_path, method)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)  # no weights are loaded from here on
    exporter(run).check(["adapter"])
    assert (exporter(run).export("adapter") / "adapter_model.safetensors").is_file()
    for kind in FORMATS[1:]:
        if merged:
            exporter(run, group_size=32).check([kind])
        else:
            with pytest.raises(ConfigError, match=rf"stored as {method}: nothing can be merged"):
                exporter(run, group_size=32).check([kind])
    original = exporter(run, merge_base="original")
    if "stored" in held:
        with pytest.raises(ConfigError, match=r"merge_base=original: .* is itself quantized"):
            original.check(["merged"])
    elif merged:
        original.check(["merged"])


def test_a_method_that_the_checkpoint_is_not_is_named(tmp_path):
    base, _ = base_held_as(tmp_path, "stored-nf4")
    with pytest.raises(ConfigError, match=r"already stored as nf4: set quantization\.method=nf4"):
        load_base(BaseOptions(str(base), method="int8"), runs.CPU)
