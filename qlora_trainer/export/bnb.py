"""A merged model as a ready bitsandbytes checkpoint: NF4 or LLM.int8(), loaded by transformers as it is.

Streams like `merge`: a weight is merged, rounded to the checkpoint's dtype, quantized, kept (a quarter
or half of its size) until its shard is complete. Layers, block size and names are transformers' own.
Beware of NF4: its rounding error is larger than most updates, so quantizing again loses much of the
tuning. That is why `verify` follows every export.
"""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BitsAndBytesConfig

from qlora_trainer.export.base import BLOCK
from qlora_trainer.export.merge import Merge, Progress
from qlora_trainer.export.shards import write_index
from qlora_trainer.system.disk import write_json


def write(merge: Merge, folder: Path, kind: str, progress: Progress | None = None) -> None:
    """Weights, index and config into an existing folder.

    Args:
        kind: nf4 (with double quantization) | int8.
    """
    linears = merge.base.linears
    files: dict[str, list[str]] = {}
    done = total = 0
    for name, reader, pieces in merge.by_shard():
        tensors: dict[str, Tensor] = {}
        for piece in pieces:
            value = merge.value(piece, reader).to(merge.dtype)
            if piece.parameter in linears:
                tensors |= quantized(piece.name, value, kind)
            else:
                tensors[piece.name] = value.cpu()
            done += value.nbytes
            if progress is not None:
                progress(done, merge.nbytes)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files[name] = list(tensors)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_index(folder, files, total)
    merge.write_config(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = _options(kind, merge.dtype).to_dict()
    write_json(path, config)


def quantized(name: str, weight: Tensor, kind: str) -> dict[str, Tensor]:
    """The tensors that stand for `weight` [out, in] in a checkpoint, by name, on the CPU."""
    assert name.endswith(".weight")
    if kind == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
        stem = name.removesuffix("weight")
        return {
            name: codes.cpu(),
            f"{stem}SCB": scales.cpu(),
            f"{stem}weight_format": torch.tensor(0, dtype=torch.uint8),  # rows in order
        }
    codes, state = bnb.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    constants = {f"{name}.{key}": value.cpu() for key, value in state.as_dict(packed=True).items()}
    return {name: codes.cpu()} | constants


def _options(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
