"""A merged export is base + adapter to the last rounding, or its first wrong tensor is named."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.export.base import Base, Held
from qlora_trainer.export.delta import read_updates
from qlora_trainer.export.equality import compare
from qlora_trainer.export.merge import Merge
from qlora_trainer.inference.load import load
from qlora_trainer.model.lora import LoraOptions
from tests.export import runs

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def merged(run, folder, dtype):
    held = Held(run.options.method, run.options.double_quant, run.options.dtype)
    folder.mkdir()
    base = Base(str(run.base), None, held, runs.CPU)
    Merge.plan(base, read_updates(run.adapter), dtype).write(folder)
    return folder / "model.safetensors"


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("architecture", "method", "lora", "changes"),
    [
        ("llama", "nf4", LoraOptions(r=4), {}),
        ("llama", "int8", LoraOptions(r=4, use_rslora=True), {}),
        ("qwen2", "nf4", LoraOptions(r=4, use_dora=True), {}),
        ("llama", "none", LoraOptions(r=4, init_lora_weights="pissa"), {}),
        ("opt", "nf4", LoraOptions(r=4), {}),
        ("llama", "nf4", LoraOptions(r=4, modules_to_save=["lm_head"]), {"tie_word_embeddings": True}),
        ("llama", "nf4", LoraOptions(r=4, target_modules=["embed_tokens", "q_proj"]), {}),
        ("llama", "nf4", LoraOptions(r=4), {"tie_word_embeddings": True}),
    ],
)
def test_right_merges_are_equal_and_a_weight_off_by_two_roundings_is_not(
    tmp_path, architecture, method, lora, changes, dtype
):
    run = runs.make(tmp_path, architecture, method, lora, **changes)
    path = merged(run, tmp_path / "merged", dtype)
    model = load(run.adapter).model
    found = compare(model, path.parent)
    stored = load_file(path)
    # what is tied is compared with both of its names
    assert found.tensors == len(model.get_base_model().state_dict()) - count(
        model, "lora_", "original_module"
    )
    assert (found.unequal, found.strays, found.largest) == ([], [], 0.0)
    name = next(name for name in stored if name.endswith("q_proj.weight"))
    weight = stored[name].flatten()
    place = int(weight.abs().argmax())
    weight[place] *= 1 + 3 * torch.finfo(dtype).eps if dtype != F32 else 1 + 1e-4
    save_file(stored, path)
    found = compare(model, path.parent)
    assert found.unequal == [name] and found.largest > 0


def count(model, *parts):
    return sum(any(part in name for part in parts) for name in model.get_base_model().state_dict()) + sum(
        any(end in name for end in (".absmax", ".quant_map", ".nested_", ".quant_state", ".SCB", "_format"))
        for name in model.get_base_model().state_dict()
    )


def test_what_is_missing_of_another_shape_or_not_a_number_is_named(tmp_path):
    run = runs.make(tmp_path, method="none")
    path = merged(run, tmp_path / "merged", F32)
    model, whole = load(run.adapter).model, load_file(path)

    def found(change):
        tensors = dict(whole)
        change(tensors)
        save_file(tensors, path)
        return compare(model, path.parent)

    assert found(lambda t: t.pop("model.norm.weight")).unequal == ["model.norm.weight"]
    assert found(lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:-1].clone()})).unequal == [
        "lm_head.weight"
    ]
    nan = whole["model.norm.weight"] * float("nan")
    assert found(lambda t: t.update({"model.norm.weight": nan})).unequal == ["model.norm.weight"]
    assert found(lambda t: t.update({"model.old.weight": torch.ones(2)})).strays == ["model.old.weight"]
