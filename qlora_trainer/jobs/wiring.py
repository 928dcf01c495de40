"""From configuration keys to the rooms' own options: the one place that knows both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from qlora_trainer.config.frozen import as_dict, flat
from qlora_trainer.config.identity import identity as written_identity
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data import Batch, DataOptions, Loader, TokenizedData, load_tokenized
from qlora_trainer.errors import MissingInputError
from qlora_trainer.evaluate.held_out import HeldOut
from qlora_trainer.export.source import Rows
from qlora_trainer.inference.stop import pad_id, stop_ids
from qlora_trainer.model.limits import Limits, limits_in
from qlora_trainer.model.load import DTYPES, BaseOptions, pick_dtype
from qlora_trainer.model.lora import LoraOptions
from qlora_trainer.model.source import read_config, resolve
from qlora_trainer.system import redact
from qlora_trainer.train.distributed import Ranks

_Options = TypeVar("_Options")

WHEN_LOADED = ("model.base", "model.kernels")  # fields of the identity: weights, and which path makes steps


def base_options(config: RunConfig, device: torch.device) -> BaseOptions:
    """How to load the base; `auto` values are settled for `device`."""
    model, quantization = config.model, config.quantization
    assert model.model_name_or_path is not None, "checked with the configuration"
    dtype = pick_dtype(model.dtype, device)
    compute = dtype
    if quantization.method in ("nf4", "fp4") and quantization.bnb_4bit_compute_dtype != "auto":
        compute = DTYPES[quantization.bnb_4bit_compute_dtype]
    return BaseOptions(
        name_or_path=model.model_name_or_path,
        revision=model.revision,
        method=quantization.method,
        double_quant=quantization.method in ("nf4", "fp4") and quantization.bnb_4bit_use_double_quant,
        dtype=dtype,
        compute_dtype=compute,
        attn_implementation=None if model.attn_implementation == "auto" else model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        cache_quantized=model.cache_quantized,
    )


def taken(options: type[_Options], section: Any, **settled: Any) -> _Options:
    """`options` with each field from the key of that name in `section`, except those `settled` here."""
    names = (f.name for f in fields(options) if f.name not in settled)  # type: ignore[arg-type]
    return options(**{name: getattr(section, name) for name in names}, **settled)


def lora_options(config: RunConfig) -> LoraOptions:
    return taken(LoraOptions, config.lora, dtype=DTYPES[config.lora.dtype])


def identity(
    config: RunConfig, base: BaseOptions, data: TokenizedData, *, steps: int, ranks: Ranks
) -> dict[str, Any]:
    """What must be the same for a checkpoint to be this run's: flat field -> plain value.

    The keys are those that the schema says a step depends on, with what was left to the machine as it has
    been settled; names of models and data are their contents. What is known for certain only when the model
    has been loaded (`WHEN_LOADED`) is missing.

    Args:
        steps: of the whole run, however they were given.
    """
    order = hashlib.sha256(data.fingerprint.encode() + data.repeats.tobytes())
    base_config = json.dumps(read_config(base.name_or_path, base.revision), sort_keys=True)
    found = written_identity(dict(flat(as_dict(config)))) | {
        "world_size": ranks.world_size,
        "data": order.hexdigest(),
        "model.config": hashlib.sha256(base_config.encode()).hexdigest(),
        "model.device": ranks.device.type,
        "model.dtype": str(base.dtype).removeprefix("torch."),
        "train.max_steps": steps,
        "quantization.bnb_4bit_compute_dtype": str(base.compute_dtype).removeprefix("torch."),
    }
    known = {field: value for field, value in found.items() if field not in WHEN_LOADED}
    return redact.tree(known)  # as a checkpoint has it


def data_options(config: RunConfig) -> DataOptions:
    return taken(DataOptions, config.data)


def load_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> TokenizedData:
    """The tokenized training rows."""
    length = config.train.max_length
    return load_tokenized(data_options(config), tokenizer, max_length=length, seed=config.seed, role="train")


def load_held_out(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[TokenizedData]:
    """The tokenized held-out rows, each source of `data.eval_path` by itself; empty if there are none."""
    options = data_options(config)
    if not options.has_eval:
        return []
    paths = options.eval_path if isinstance(options.eval_path, list) else [options.eval_path]
    return [
        load_tokenized(
            replace(options, eval_path=path),
            tokenizer,
            max_length=config.train.max_length,
            seed=config.seed,
            role="eval",
        )
        for path in paths
    ]


def limits(config: RunConfig) -> Limits | None:
    """What the base can take; None of one that only its own code, or nothing here, can build."""
    name = config.model.model_name_or_path
    assert name is not None, "checked with the configuration"
    if config.model.trust_remote_code:
        return None
    try:
        return limits_in(resolve(name, config.model.revision), config.model.revision)
    except MissingInputError:  # the plan knows more of such, and loading says what is wrong
        return None


def rows_of(data: TokenizedData, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """What is recorded of the training rows for exports; how they begin, of a thousand of them at most."""
    begins = [int(data.document(row).ids[0]) for row in range(0, len(data), -(-len(data) // 1000))]
    return Rows(int(data.lengths.max()), begins.count(tokenizer.bos_token_id) / len(begins))


def use_template(tokenizer: PreTrainedTokenizerBase, data: TokenizedData) -> None:
    """Gives the tokenizer the template the data were rendered with, to be stored with the adapter."""
    if data.chat_template is not None:
        tokenizer.chat_template = data.chat_template


def train_loader(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, data: TokenizedData, ranks: Ranks
) -> Loader:
    train = config.train
    rows = train.per_device_train_batch_size
    assert isinstance(rows, int), "auto: the plan's choice takes its place first"
    return Loader(
        data,
        micro_batch_size=rows,
        accumulation=train.gradient_accumulation_steps,
        max_length=train.max_length,
        packing=train.packing,
        group_by_length=train.group_by_length,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_workers=config.data.num_workers,
        pad_id=pad_id(tokenizer, stop_ids(tokenizer)),
    )


def held_out_batches(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, data: TokenizedData, ranks: Ranks
) -> Sequence[Batch]:
    """Held-out rows as batches, at most `evaluate.max_rows` of them, this rank's share."""
    wanted = config.evaluate
    pad = pad_id(tokenizer, stop_ids(tokenizer))
    rows = HeldOut.of(data, tokenizer, pad, max_rows=wanted.max_rows, batch_size=wanted.batch_size)
    return rows.batches[ranks.rank :: ranks.world_size]


def run_folder(config: RunConfig) -> Path:
    """The finished run that a command is about: `run=…`, or where the recipe puts its run."""
    folder = config.run or config.output_dir
    assert folder is not None, "checked with the configuration"
    return Path(folder)
