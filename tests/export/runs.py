"""A finished run in miniature: a tiny base on disk, held as asked, with a random adapter on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from qlora_trainer.errors import CheckpointError
from qlora_trainer.export import probe
from qlora_trainer.export.adapter import TrainedOn, export_adapter
from qlora_trainer.model.load import BaseOptions, load_base
from qlora_trainer.model.lora import LoraOptions, attach
from tests import tiny

CPU = torch.device("cpu")


@dataclass
class Run:
    base: Path
    adapter: Path
    model: peft.PeftModel
    options: BaseOptions
    tokenizer: PreTrainedTokenizerFast


def make(
    tmp_path: Path,
    architecture: str = "llama",
    method: str = "nf4",
    lora: LoraOptions | None = None,
    dtype: torch.dtype = torch.float32,
    scale: float = 0.15,
    **changes: object,
) -> Run:
    """Saves a tiny base, loads it as `method`, and exports an adapter that `scale` moves away from it."""
    if architecture != "opt":
        # bitsandbytes 0.50 repacks for AVX512 in plain processes and needs whole blocks of 64 a row.
        changes = {"intermediate_size": 128} | changes
    base = tiny.save(tmp_path / "base", architecture, **changes)
    options = BaseOptions(str(base), method=method, dtype=dtype, compute_dtype=dtype)
    model = attach(load_base(options, CPU), lora or LoraOptions(r=4, lora_alpha=8), seed=1)
    stir(model, scale)
    adapter = export_adapter(
        model, tiny.tokenizer(), tmp_path / "run" / "adapter", TrainedOn.with_options(options, CPU)
    )
    return Run(base, adapter, model.eval(), options, tiny.tokenizer())


def store(plain: Path, folder: Path, method: str) -> Path:
    """The model in `plain` as a ready bitsandbytes checkpoint: nf4 | fp4 | int8."""
    options = BitsAndBytesConfig(
        load_in_4bit=method != "int8",
        load_in_8bit=method == "int8",
        bnb_4bit_quant_type="nf4" if method == "int8" else method,
        bnb_4bit_use_double_quant=method != "int8",
    )
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=options)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def load_gguf(folder: Path) -> PreTrainedModel:
    """The one GGUF file of a folder in float32, by plain transformers."""
    (file,) = folder.glob("*.gguf")
    return AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).eval()


def stir(model: peft.PeftModel, scale: float) -> None:
    """Gives every trainable parameter an update, for B starts at zero and would hide mistakes."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data += noise.to(parameter.dtype)


def probe_here(name: str, request: dict[str, Any], work: Path) -> dict[str, Any]:
    """`verify.run_probe` without its process, whose start costs seconds; one test starts the real one."""
    asked, answered = work / "request.json", work / "result.json"
    asked.write_text(json.dumps(request))
    try:
        probe.main(str(asked), str(answered))
    except Exception as error:  # in the process it ends in, every one is that probe's failure
        raise CheckpointError(f"{name} cannot be loaded and measured: {error}") from error
    return dict(json.loads(answered.read_text()))
