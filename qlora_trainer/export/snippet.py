"""The Python on a card that loads what lies beside it. `verify` loads every export in the same way."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qlora_trainer.export.quantize import METHODS, QuantizeOptions

PLAIN = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    "model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype='auto')\n"
    "tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n"
)
FOREIGN_ADAPTER = (
    "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
    "model = AutoPeftModelForCausalLM.from_pretrained(FOLDER)\n"
    "tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n"
)
GGUF = "# with llama.cpp\n# llama-cli -m FOLDER/model-*.gguf -cnv\n"


def of_export(kind: str, quantize: QuantizeOptions) -> str:
    """For a folder of any format but our own adapter's."""
    if kind in METHODS:
        settings, backend = quantize.gpu_kernel
        return (
            f"{PLAIN}# where the kernel it picks for your GPU does not suit this model, name another:\n"
            f"# quantization_config={settings}(bits={quantize.bits}, backend={backend!r})\n"
        )
    if kind == "nf4":
        return PLAIN + _unpacked("model")
    return {"adapter": FOREIGN_ADAPTER, "gguf": GGUF}.get(kind, PLAIN)


def of_adapter(name: str, trained: Any) -> str:
    """For an adapter of ours.

    Args:
        name: of the base, as its user would name it.
        trained: an `export.adapter.TrainedOn`.
    """
    revision = f", revision={trained.revision!r}" if trained.revision else ""
    quantization, argument, kept = "", "", ""
    if trained.method in ("nf4", "fp4"):
        argument = ", quantization_config=quantization"
        quantization = (
            "quantization = BitsAndBytesConfig(\n"
            f"    load_in_4bit=True, bnb_4bit_quant_type={trained.method!r},\n"
            f"    bnb_4bit_use_double_quant={trained.double_quant}, "
            f"bnb_4bit_compute_dtype=torch.{trained.compute_dtype},\n)\n"
        )
        kept = _unpacked("base")
    elif trained.method == "int8":
        argument = ", quantization_config=quantization"
        quantization = "quantization = BitsAndBytesConfig(load_in_8bit=True)\n"
    extra = ", BitsAndBytesConfig" if quantization else ""
    return (
        "import torch\n"
        "from peft import PeftModel\n"
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{extra}\n\n"
        f"{_place(name, trained.source)}"
        f"{quantization}"
        f"base = AutoModelForCausalLM.from_pretrained(\n    BASE{revision}, "
        f"dtype=torch.{trained.dtype}{argument}\n)\n"
        f"{kept}"
        "model = PeftModel.from_pretrained(base, FOLDER)\n"
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n"
    )


def base_name(name_or_path: str) -> str:
    """A base as its user would name it to others: hub name, `builtin:…`, or a folder's own name."""
    folder = Path(name_or_path).expanduser()
    local = folder.is_dir() or re.match(r"[/~.]|[^/]*/[^/]*/", name_or_path) is not None
    return folder.absolute().name if local else name_or_path


def _place(name: str, source: str) -> str:
    """Where the base is, without anybody's folders."""
    if not Path(source).is_dir():
        return f"BASE = {source!r}\n"
    return f"BASE = {Path(source).name!r}  # the folder that holds {name}\n"


def _unpacked(model: str) -> str:
    return (
        f"for module in {model}.modules():  # or a CPU with AVX512-BF16 rounds it anew at its first answer\n"
        "    module.support_avx512bf16_for_cpu = False\n"
    )
