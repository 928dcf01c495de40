"""PiSSA and OLoRA change the base in memory only: what is stored is plain LoRA on the original base."""

import json
import shutil

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_trainer.__main__ import main
from qlora_trainer.errors import ConfigError
from qlora_trainer.evaluate.held_out import HeldOut
from qlora_trainer.evaluate.score import score_base_and_tuned
from qlora_trainer.export.base import Base, Held
from qlora_trainer.export.delta import read_updates
from qlora_trainer.export.merge import Merge
from qlora_trainer.inference.load import load, put_adapter
from qlora_trainer.model.forward import ReferenceForward
from qlora_trainer.model.load import BaseOptions, load_base
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.model.residual import adapter_tensors, base_alone, take_adapter
from qlora_trainer.objectives.sft import sft
from qlora_trainer.track.jsonl import read
from tests import batches, tiny
from tests.export import runs

CPU = torch.device("cpu")
IDS = torch.arange(6, 60)[None]
INITS = ["pissa", "pissa_niter_4", "olora"]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def made(tmp_path, init, dtype=torch.float32, **options):
    lora = LoraOptions(r=4, init_lora_weights=init, dtype=dtype, **options)
    return runs.make(tmp_path, method="none", lora=lora)


def merged(run, folder):
    base = Base(str(run.base), None, Held("none", False, torch.float32), CPU)
    folder.mkdir()
    Merge.plan(base, read_updates(run.adapter), torch.float32).write(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("init", INITS)
def test_the_first_loss_is_the_base_s_and_the_weight_is_a_residual(tmp_path, init):
    base = load_base(BaseOptions(str(tiny.save(tmp_path)), method="none"), CPU)
    before, weight = logits(base), base.model.layers[0].mlp.up_proj.weight.clone()
    lora = LoraOptions(r=4, lora_alpha=8, init_lora_weights=init, dtype=torch.float32)
    model = attach(base, lora, seed=1)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert torch.allclose(logits(model), before, atol=1e-5)
    # PiSSA: what is left has none of the four largest singular values
    left, whole = (torch.linalg.svdvals(w.float()) for w in (layer.base_layer.weight, weight))
    assert (layer.base_layer.weight - weight).abs().max() > 0.01
    if init == "pissa":
        assert left[0] < 1.02 * whole[4] < 0.98 * whole[0]


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_what_is_stored_is_plain_lora_of_twice_the_rank_on_the_original_base(tmp_path, init, options):
    run = made(tmp_path, init, **options)
    trained = logits(run.model)
    plain = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    original = logits(plain)
    assert (trained - original).abs().max() > 0.3
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["r"] == 8 and config["init_lora_weights"] is True
    # any reader of LoRA: plain PEFT, this program, and the merge
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(plain, run.adapter)), trained, atol=1e-4)
    assert torch.allclose(logits(load(run.adapter).model), trained, atol=1e-4)
    assert torch.allclose(logits(merged(run, tmp_path / "merged")), trained, atol=1e-4)


def test_a_light_tuning_in_bfloat16_is_not_drowned_by_what_cancels(tmp_path):
    run = runs.make(tmp_path, method="none", lora=LoraOptions(r=4, init_lora_weights="pissa"), scale=2e-3)
    trained, found = (logits(m) for m in (load(run.adapter).model, merged(run, tmp_path / "merged")))
    original = logits(AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32))
    assert (trained - found).abs().max() < 1e-3 * (trained - original).abs().max()


def test_the_base_alone_is_the_original_with_all_that_was_trained_switched_off(tmp_path):
    run = made(tmp_path, "pissa", use_dora=True, modules_to_save=["lm_head"])
    original = logits(AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32))
    trained = logits(run.model)
    with base_alone(run.model):
        assert torch.allclose(logits(run.model), original, atol=1e-5)
    assert torch.equal(logits(run.model), trained)
    rows = HeldOut([batches.collate([batches.documents([34])])])
    base, tuned = score_base_and_tuned(run.model, ReferenceForward(run.model), rows, run.tokenizer, [5])
    plain = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    assert base.loss.loss == pytest.approx(measured(plain, rows), abs=1e-5)
    assert abs(tuned.loss.loss - base.loss.loss) > 0.01


def measured(model, rows):
    with torch.no_grad():
        (batch,) = rows.batches
        return float(sft(ReferenceForward(model.eval())(batch))) / float(batch.loss_weights[:, 1:].sum())


def test_a_resumed_run_takes_the_first_values_from_its_checkpoint(tmp_path):
    run = made(tmp_path, "pissa")
    stored = {name: tensor.clone() for name, tensor in adapter_tensors(run.model).items()}
    name = next(name for name in stored if name.endswith("lora_A.weight"))
    stored[name][4:] += 0.01  # as another machine's decomposition may differ
    options = LoraOptions(r=4, init_lora_weights="pissa", dtype=torch.float32)
    again = attach(load_base(run.options, CPU), options, seed=1, stored=stored)
    take_adapter(again, stored)
    found = adapter_tensors(again)
    assert stored.keys() == found.keys()
    assert all(torch.equal(stored[key], found[key]) for key in stored)
    layer = again.get_submodule(name.removesuffix(".lora_A.weight"))
    other = run.model.get_submodule(name.removesuffix(".lora_A.weight"))
    assert not torch.equal(layer.base_layer.weight, other.base_layer.weight)
    assert torch.equal(layer.lora_A["default"].weight, other.lora_A["default"].weight)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_of_plain_peft_is_merged_onto_the_residual_it_learned_on(tmp_path, init):
    run = runs.make(tmp_path, method="none")
    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    original = logits(base)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=init, target_modules=["q_proj", "up_proj"])
    model = peft.get_peft_model(base, config).eval()
    runs.stir(model, 0.05)
    shutil.rmtree(run.adapter)
    model.save_pretrained(run.adapter)
    trained = logits(model)
    assert torch.allclose(logits(merged(run, tmp_path / "merged")), trained, atol=1e-4)
    loaded = put_adapter(load_base(run.options, CPU), run.adapter)
    assert torch.allclose(logits(loaded), trained, atol=1e-4)
    with base_alone(loaded):
        assert torch.allclose(logits(loaded), original, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga"])
def test_what_cannot_be_computed_again_is_refused_with_the_way_out(tmp_path, init):
    run = runs.make(tmp_path, method="none")
    path = run.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": init}))
    with pytest.raises(ConfigError, match=f"{init}.*path_initial_model_for_weight_conversion"):
        read_updates(run.adapter)
    with pytest.raises(ConfigError, match=init):
        put_adapter(load_base(run.options, CPU), run.adapter)


def test_layers_without_such_a_beginning_are_named(tmp_path):
    options = BaseOptions(str(tiny.save(tmp_path, tie_word_embeddings=True)), method="none")
    for targets in (["embed_tokens", "q_proj"], ["lm_head"]):
        with pytest.raises(ConfigError, match=rf"{targets[0]} is an embedding or shares"):
            lora = LoraOptions(r=4, init_lora_weights="pissa", target_modules=targets)
            attach(load_base(options, CPU), lora, seed=1)
    with pytest.raises(ConfigError, match=r"lora\.r=65"):
        attach(load_base(options, CPU), LoraOptions(r=65, init_lora_weights="olora"), seed=1)


def test_a_run_resumes_to_the_same_bytes_and_is_compared_with_the_original_base(tmp_path):
    tiny.save(tmp_path / "model")
    rows = [{"instruction": f"say {i}", "output": f"it is {i}!"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = {"model.model_name_or_path": "model", "data.path": "rows.jsonl", "data.cache_dir": "cache"}
    line = ["recipe=tiny", *(f"{key}={tmp_path / name}" for key, name in inputs.items())]
    line += ["quantization.method=none", "train.lr_scheduler_type=constant", "train.warmup_ratio=0"]
    line += ["data.eval_fraction=0.2", "evaluate.enabled=true"]
    pissa = [*line, "lora.init_lora_weights=pissa"]
    assert main([*pissa, f"output_dir={tmp_path / 'whole'}"]) == 0
    assert main([*pissa, f"output_dir={tmp_path / 'parts'}", "train.max_steps=2"]) == 0
    assert main([*pissa, f"output_dir={tmp_path / 'parts'}"]) == 0
    for file in ("adapter/adapter_model.safetensors", "checkpoints/step-000004/adapter_model.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    assert main([*line, f"output_dir={tmp_path / 'plain'}", "train.max_steps=1"]) == 0
    base, original = (
        next(iter(json.loads((tmp_path / name / "evaluation.json").read_text()).values()))["base"]
        for name in ("whole", "plain")
    )
    assert base["loss"] == pytest.approx(original["loss"], abs=1e-4)
    losses = [read(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in ("whole", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # of the first step, which is the base's
    # evaluated anew from the stored adapter: the same two models
    before = json.loads((tmp_path / "whole" / "evaluation.json").read_text())
    assert main(["evaluate", f"run={tmp_path / 'whole'}"]) == 0
    after = json.loads((tmp_path / "whole" / "evaluation.json").read_text())
    for source, sides in before.items():
        for side in ("base", "tuned"):
            assert after[source][side]["loss"] == pytest.approx(sides[side]["loss"], abs=1e-3)
