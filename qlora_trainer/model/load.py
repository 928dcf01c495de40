"""The frozen base: weights from disk into NF4, FP4, INT8 or 16/32 bits on one device.

In: names, dtypes and a device. Out: a transformers model in which every linear layer but the head
is quantized by bitsandbytes, embeddings, norms and head are left as they are, and nothing trains.
How the weights get there, and how little memory it takes, is `assemble`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    AwqConfig,
    BitsAndBytesConfig,
    GPTQConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qlora_trainer.errors import CheckpointError, ConfigError, MissingInputError
from qlora_trainer.model.assemble import assemble
from qlora_trainer.model.cache import KeptBase
from qlora_trainer.model.files import KEY, check_tokenizer, strays
from qlora_trainer.model.shards import stored_tensors
from qlora_trainer.model.skeleton import first_line, read_configuration, stored_method
from qlora_trainer.model.source import read_config, resolve, weight_files
from qlora_trainer.system.quiet import quiet_gptqmodel
from qlora_trainer.system.terminal import to_stderr

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
        cache_quantized: keep what was quantized in the user's cache (see `cache`), and read it from there.
    """

    name_or_path: str
    revision: str | None = None
    method: str = "nf4"
    double_quant: bool = True
    dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype = torch.float32
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    cache_quantized: bool = False


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


def load_tokenizer(
    name_or_path: str, revision: str | None = None, say: Callable[[str], None] = to_stderr
) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, padding with a token that the model has a row for.

    Args:
        say: takes a line of what the user may want to know.

    Raises:
        MissingInputError: the folder or hub model carries none that transformers can read.
    """
    source = resolve(name_or_path, revision)
    tokenizer = read_tokenizer(source, revision)
    config = read_config(name_or_path, revision)
    rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if rows and pad is not None and pad >= rows:
        other = tokenizer.convert_ids_to_tokens(0 if eos is None or eos >= rows else eos)
        say(
            f"{source}: {other} pads in place of {tokenizer.pad_token} (id {pad}), "
            f"for which the embedding of {rows:,} rows has none"
        )
        tokenizer.pad_token = other
    return tokenizer


def read_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or of a hub model, as it is.

    Raises:
        MissingInputError: there is none that transformers can read.
    """
    check_tokenizer(Path(source))
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # what `tokenizers` raises for a broken file is of no narrower class
        raise MissingInputError(
            f"{KEY}: no tokenizer can be read from {source}: {first_line(error)}"
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
    if options.method in ("gptq", "awq", "none"):  # where PEFT or transformers import it, if it is there
        quiet_gptqmodel()
    source = resolve(options.name_or_path, options.revision)
    config = read_configuration(source, options.revision, options.trust_remote_code, say)
    if Path(source).is_dir() and (beside := strays(Path(source))):
        say(f"{source}: {', '.join(beside)} beside the model's own weights: not read")
    quantization = quantization_config(options, config)
    read = partial(
        assemble, device=device, dtype=options.dtype, attn_implementation=options.attn_implementation, say=say
    )
    kept = _place_to_keep(source, quantization, options, device, say)
    if kept is not None and kept.ready(say):
        model = read(str(kept.folder), read_configuration(str(kept.folder)))
        model.config.name_or_path = model.name_or_path = source
        say(f"quantized before and kept: read from {kept.root}")
        return _settled(model, options, device)
    model = read(
        source,
        config,
        quantization=quantization,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    model = _settled(model, options, device)
    if kept is not None:
        try:
            kept.keep(model)
            say(f"the quantized base is kept in {kept.root}")
        except CheckpointError as error:  # the run goes on without
            say(f"model.cache_quantized: the quantized base is not kept: {error}")
    return model


def _place_to_keep(
    source: str, quantization: Any, options: BaseOptions, device: torch.device, say: Callable[[str], None]
) -> KeptBase | None:
    """Where the quantized base is kept, if it is to be."""
    if not options.cache_quantized:
        return None
    files = None
    if isinstance(quantization, BitsAndBytesConfig) and not options.trust_remote_code:
        files = weight_files(source, options.revision)
    if files is None:
        say("model.cache_quantized: nothing to keep, for bitsandbytes does not quantize this base here")
        return None
    try:
        stored_tensors(files, device)  # whose headers it reads: a damaged file is found before its digest
    except CheckpointError as error:
        raise MissingInputError(f"{KEY}: {error}") from error
    return KeptBase.of(source, files, quantization, options.dtype, device)


def _settled(model: PreTrainedModel, options: BaseOptions, device: torch.device) -> PreTrainedModel:
    """The model as training, and every comparison with it, needs it."""
    model.config.use_cache = False  # a key-value cache is of no use in training; generation sets its own
    model.requires_grad_(False)
    keep_unpacked(model)
    check_widths(model, options.method, device.type)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = options.compute_dtype  # a stored 4-bit checkpoint brings its own
    return model


def check_widths(model: nn.Module, method: str, device: str) -> None:
    """Whether the 4-bit layers of `model`, loaded or an outline, are right on a `cuda` or `cpu` device.

    Raises:
        ConfigError: seen with bitsandbytes 0.50.2 on a CPU: a 64 x 96 weight comes back with 28% error
            instead of 9%.
    """
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit) and device == "cpu" and module.in_features % BLOCKSIZE:
            raise ConfigError(
                f"quantization.method={method}: on a CPU, bitsandbytes misreads 4-bit weights "
                f"whose width is no multiple of {BLOCKSIZE}, such as {name} ({module.in_features}): "
                "use a GPU, or quantization.method=int8 or none"
            )


def keep_unpacked(model: nn.Module) -> None:
    """Lets the 4-bit layers in `model` multiply in evaluation with what they multiply with in training.

    On a CPU with AVX512-BF16 bitsandbytes would, at the first evaluation, repack each weight in place and
    round its constants to bfloat16, whatever the compute dtype: from then on it is another base (logits off
    by 0.3). Every loader of 4-bit layers calls this; so must anyone who wants the trained model's numbers.
    Source: `Linear4bit.forward` of bitsandbytes 0.50.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def quantization_config(
    options: BaseOptions, config: Any
) -> BitsAndBytesConfig | GPTQConfig | AwqConfig | None:
    """What transformers is to be told; None for 16 or 32 bits, and for what the checkpoint says itself.

    Raises:
        ConfigError: the checkpoint is stored in another way than `options.method`.
    """
    found = stored_method(config)
    if found is not None:
        stored = config.quantization_config
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
