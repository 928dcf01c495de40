"""What is read off a model without weights is what the run finds: the plan's words are the log's."""

from __future__ import annotations

import pytest
import torch

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model.forward import ReferenceForward
from qlora_trainer.model.fuse import fuse
from qlora_trainer.model.fused.describe import describe_model
from qlora_trainer.model.load import BaseOptions, load_base
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.model.outline import outline_adapted
from qlora_trainer.model.skeleton import read_configuration
from qlora_trainer.plan import hardware
from qlora_trainer.plan.plan import RunPlan, make_plan
from tests import tiny
from tests.plan.sizes import architecture_in

CPU = torch.device("cpu")
CASES = {
    "plain": ("llama", {}, "nf4", {}),
    "bias of the attention": ("llama", {"attention_bias": True}, "nf4", {}),
    "bias of the mlp": ("llama", {"mlp_bias": True}, "nf4", {}),
    "biases that are computed": ("qwen2", {}, "nf4", {}),
    "tied": ("gemma", {}, "fp4", {}),
    "one product": ("phi3", {"tie_word_embeddings": True}, "nf4", {"lora_dropout": 0.1}),
    "soft-caps": ("gemma2", {}, "nf4", {}),
    "dropout of the model": ("llama", {"attention_dropout": 0.1}, "nf4", {}),
    "8 bits": ("mistral", {}, "int8", {}),
    "16 bits": ("mistral", {}, "none", {"target_modules": ["v_proj"], "use_rslora": True}),
    "dora": ("qwen3", {}, "nf4", {"use_dora": True}),
    "trained head": ("llama", {}, "nf4", {"modules_to_save": ["lm_head"]}),
    "adapted head": ("llama", {}, "nf4", {"target_modules": ["q_proj", "lm_head"]}),
    "trained norm": ("llama", {}, "nf4", {"modules_to_save": ["model.layers.1.input_layernorm"]}),
    "one layer": ("llama", {}, "nf4", {"target_modules": r"model\.layers\.1\..*_proj"}),
    "another family": ("opt", {}, "nf4", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_plan_and_run_say_the_same(case: str, tmp_path) -> None:
    family, changes, method, lora = CASES[case]
    tiny.save(tmp_path, family, **changes)
    options = BaseOptions(str(tmp_path), method=method)
    model = attach(load_base(options, CPU), LoraOptions(r=4, **lora), seed=0).train()
    config = read_configuration(str(tmp_path))
    outline = outline_adapted(config, options, LoraOptions(r=4, **lora), "cpu")
    assert describe_model(outline) == describe_model(model)

    run = RunConfig()
    run.model.model_name_or_path, run.quantization.method, run.lora.r = str(tmp_path), method, 4
    for key, value in lora.items():
        setattr(run.lora, key, value)
    plan = make_plan(run, hardware.detect("cpu", tmp_path), architecture_in(tmp_path))
    forward, report = fuse(model, activations=plan.policies)
    assert plan.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    said = {line for name, line in report.modules.items() if name != "lm_head"}
    if plan.reference_because is None:
        assert plan.path == "fast" and said == {f"fused, activations {plan.policies[0]}"}
    else:
        assert plan.path == "reference" and f"reference: {plan.reference_because}" in said
    if isinstance(forward, ReferenceForward):
        assert said == {f"reference: {plan.reference_because}"} and plan.head_because is None
    elif plan.head_because is None:
        assert report.modules["lm_head"].startswith("fused")
    else:
        assert report.modules["lm_head"] == f"reference in chunks: {plan.head_because}"


def test_the_plan_names_what_the_recogniser_found(tmp_path) -> None:
    def planned(name: str) -> RunPlan:
        family, changes, method, lora = CASES[name]
        tiny.save(tmp_path, family, **changes)
        run = RunConfig()
        run.model.model_name_or_path, run.quantization.method = str(tmp_path), method
        for key, value in lora.items():
            setattr(run.lora, key, value)
        return make_plan(run, hardware.parse("H100"), architecture_in(tmp_path))

    assert planned("bias of the attention").reference_because == "o_proj has a bias"
    assert planned("bias of the mlp").reference_because == "gate_proj+up_proj has a bias"
    assert "DoRA" in str(planned("dora").reference_because)
    assert planned("8 bits").reference_because == "q_proj is a Linear8bitLt"
    assert planned("trained norm").reference_because == "its norm is a ModulesToSaveWrapper"
    assert planned("trained head").head_because == "it is a ModulesToSaveWrapper"
    assert planned("trained head").path == planned("plain").path == "fast"
