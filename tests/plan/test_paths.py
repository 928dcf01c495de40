"""The formulas of the reference path are what autograd really saves, to the byte."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_trainer.plan.fast_path import FastPath
from qlora_trainer.plan.reference_path import ReferencePath
from tests import tiny
from tests.plan.sizes import llama3_8b_shape, settings, shape_in

SIZES = {"hidden_size": 128, "intermediate_size": 320}
CHANGES = {
    "opt": {"hidden_size": 128, "ffn_dim": 320, "word_embed_proj_dim": 128},
    "qwen3": SIZES | {"head_dim": 48},
    "gemma": SIZES | {"head_dim": 48},
}
ROWS, LENGTH = 2, 48


def bytes_saved(folder, dtype: torch.dtype, targets) -> int:
    """Bytes of storage that the forward pass of a quantized, adapted model keeps for backward."""
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        ),
    )
    config = peft.LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model.requires_grad_(False), config, autocast_adapter_dtype=False).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            saved[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tokens = torch.randint(6, 260, (ROWS, LENGTH))
        model(input_ids=tokens, use_cache=False, logits_to_keep=torch.tensor([LENGTH - 1]))
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize(
    ("architecture", "dtype", "targets"),
    [
        ("llama", torch.bfloat16, "all-linear"),
        ("llama", torch.float32, "all-linear"),
        ("llama", torch.bfloat16, ("q_proj", "v_proj")),
        ("qwen3", torch.bfloat16, "all-linear"),
        ("gemma", torch.bfloat16, "all-linear"),
        ("phi3", torch.bfloat16, "all-linear"),
        ("opt", torch.bfloat16, "all-linear"),
    ],
)
def test_reference_path_saves_what_the_formula_says(tmp_path, architecture, dtype, targets) -> None:
    measured = []
    for layers in (2, 3):
        folder = tmp_path / str(layers)
        changes = CHANGES.get(architecture, SIZES)
        tiny.model(architecture, num_hidden_layers=layers, **changes).save_pretrained(folder)
        measured.append(bytes_saved(folder, dtype, targets if isinstance(targets, str) else list(targets)))
    shape = shape_in(folder, target_modules=targets if isinstance(targets, str) else list(targets))
    wanted = settings(fast=False, rows=ROWS, length=LENGTH, r=8, dtype_bytes=dtype.itemsize)
    predicted = ReferencePath(shape, wanted).kept("none")
    # Gemma keeps float32 copies of its norms' factors, a few bytes a token here.
    assert measured[1] - measured[0] == pytest.approx(predicted, rel=0.005)


def test_fast_path_saves_the_least() -> None:
    """PEERS' floors for the 8B shape: 3.0, 1.2 and 0.26 MB a token."""
    wanted = settings(rows=1, length=1)
    fast, reference = (path(llama3_8b_shape(), wanted) for path in (FastPath, ReferencePath))
    megabytes = {policy: 32 * fast.kept(policy) / 1e6 for policy in fast.policies}
    assert megabytes == pytest.approx(
        {"none": 3.02, "mlp": 1.18, "full": 0.262, "offload": 0.0, "full_offload": 0.0}, rel=0.02, abs=0.02
    )
    assert 32 * reference.kept("none") / 1e6 == pytest.approx(5.9, rel=0.01)
