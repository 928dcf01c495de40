"""The frozen base: weights from disk into NF4, FP4, INT8 or 16/32 bits on one device.

In: names, dtypes and a device. Out: a transformers model in which every linear layer but the head
is quantized by bitsandbytes, embeddings, norms and head are left as they are, and nothing trains.
How the weights get there, and how little memory it takes, is `assemble`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    AwqConfig,
    BitsAndBytesConfig,
    GPTQConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qlora_trainer.errors import ConfigError, MissingInputError
from qlora_trainer.model.assemble import assemble, first_line, to_stderr
from qlora_trainer.model.source import resolve

BLOCKSIZE = 64  # elements that share one quantization constant, bitsandbytes' default and the paper's
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BaseOptions:
    """What to load and how to hold it.

    Attributes:
        name_or_path: a folder, a hub name or `builtin:…`.
        method: nf4 | fp4 | int8 | none, how linear layers are stored; a checkpoint that is already
            quantized says so itself and then `method` must agree.
        double_quant: quantize the 4-bit blocks' float32 constants to 8 bits (QLoRA, section 3).
        dtype: of everything that is not quantized, and of activations.
        compute_dtype: that 4-bit layers dequantize to.
    """

    name_or_path: str
    revision: str | None = None
    method: str = "nf4"
    double_quant: bool = True
    dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype = torch.float32
    attn_implementation: str | None = None
    trust_remote_code: bool = False


def pick_device(wanted: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device of this process; a GPU is used where there is one.

    Raises:
        ConfigError: CUDA was asked for and torch sees none.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if wanted == "cuda":
        raise ConfigError(
            "model.device=cuda: torch sees no CUDA GPU here "
            f"(torch {torch.__version__}); leave model.device=auto to run on the CPU"
        )
    return torch.device("cpu")


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU that has it in hardware and float32 elsewhere.

    Many CPUs emulate bfloat16 and are nine times slower with it.
    """
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The model's own tokenizer.

    Raises:
        MissingInputError: the folder or hub model carries none that transformers can read.
    """
    source = resolve(name_or_path, revision)
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise MissingInputError(
            f"model.model_name_or_path: no tokenizer can be read from {source}: {first_line(error)}"
        ) from error


def load_base(
    options: BaseOptions, device: torch.device, say: Callable[[str], None] = to_stderr
) -> PreTrainedModel:
    """Loads and quantizes the base onto `device`; no parameter of it requires a gradient.

    Args:
        say: takes a line of what the user may want to know.

    Raises:
        MissingInputError: files are missing or damaged, or are not those of the model that config.json
            describes.
        ConfigError: the checkpoint is already quantized in another way than `method`.
    """
    source = resolve(options.name_or_path, options.revision)
    try:
        config = AutoConfig.from_pretrained(
            source, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise MissingInputError(
            f"model.model_name_or_path: no model can be read from {source}: {first_line(error)}"
        ) from error
    model = assemble(
        source,
        config,
        device,
        revision=options.revision,
        dtype=options.dtype,
        quantization=_quantization_config(options, config),
        attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
        say=say,
    )
    model.config.use_cache = False  # a key-value cache is of no use in training; generation sets its own
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            if device.type == "cpu" and module.in_features % BLOCKSIZE:
                # Seen with bitsandbytes 0.50.2: a 64 x 96 weight comes back with 28% error instead of 9%.
                raise ConfigError(
                    f"quantization.method={options.method}: on a CPU, bitsandbytes misreads 4-bit weights "
                    f"whose width is no multiple of {BLOCKSIZE}, such as {name} ({module.in_features}): "
                    "use a GPU, or quantization.method=int8 or none"
                )
            # On CPUs with AVX512-BF16 the first evaluation would repack the weight in place and round its
            # constants to bfloat16: what is evaluated, and trained from then on, would be another base.
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = options.compute_dtype  # a stored 4-bit checkpoint brings its own
    return model


def _quantization_config(
    options: BaseOptions, config: Any
) -> BitsAndBytesConfig | GPTQConfig | AwqConfig | None:
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        found = _stored_method(stored)
        if found != options.method:
            raise ConfigError(
                f"quantization.method={options.method}, but {options.name_or_path} is already stored as "
                f"{found}: set quantization.method={found}"
            )
        if found in ("gptq", "awq"):  # the fastest kernels give no gradient
            bits = stored["bits"] if isinstance(stored, dict) else stored.bits
            kind = GPTQConfig if found == "gptq" else AwqConfig
            return kind(bits=bits, backend="auto_trainable")
        return None  # transformers reads it from the checkpoint
    if options.method in ("nf4", "fp4"):
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=options.method,
            bnb_4bit_use_double_quant=options.double_quant,
            bnb_4bit_compute_dtype=options.compute_dtype,
        )
    if options.method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if options.method == "none":
        return None
    raise ConfigError(
        f"quantization.method={options.method} needs a checkpoint that is already stored that way; "
        f"{options.name_or_path} holds plain weights: use nf4, fp4, int8 or none"
    )


def _stored_method(stored: Any) -> str:
    """The name in `quantization.method` of the `quantization_config` inside a checkpoint."""
    get = stored.get if isinstance(stored, dict) else lambda key, default=None: getattr(stored, key, default)
    method = str(getattr(get("quant_method"), "value", get("quant_method")))
    if method == "bitsandbytes" or get("load_in_4bit") or get("load_in_8bit"):
        return "int8" if get("load_in_8bit") else str(get("bnb_4bit_quant_type", "fp4"))
    return method
