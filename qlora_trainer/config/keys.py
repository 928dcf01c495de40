"""The names a user may write: every key of the schema, and what to say about any other.

In: a dotted key (`train.lr`) and a value. Out: the problem in one line, or nothing. Recipes and the
command line go through the same two questions, so both give the same answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_trainer.config.schema import RunConfig


def _walk(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(section)
    for field in fields(section):
        kind = hints[field.name]
        yield prefix + field.name, kind
        if is_dataclass(kind):
            yield from _walk(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]


_TYPES = dict(_walk(RunConfig))
SECTIONS = frozenset(key for key, kind in _TYPES.items() if is_dataclass(kind))
KEYS = tuple(key for key in _TYPES if key not in SECTIONS)

# What axolotl, LLaMA-Factory, Unsloth, TRL, torchtune, litgpt and transformers' Trainer call the same thing.
# Where a leaf name is ours already (`learning_rate`), no entry is needed: see `suggestion`.
ALIASES = {
    "base_model": "model.model_name_or_path",
    "model_name": "model.model_name_or_path",
    "model_id": "model.model_name_or_path",
    "model_path": "model.model_name_or_path",
    "pretrained_model_name_or_path": "model.model_name_or_path",
    "checkpoint_dir": "model.model_name_or_path",
    "torch_dtype": "model.dtype",
    "precision": "model.dtype",
    "bf16": "model.dtype=bfloat16",
    "fp16": "model.dtype=bfloat16 (float16 is not offered for training)",
    "device_map": "model.device",
    "flash_attention": "model.attn_implementation",
    "flash_attn": "model.attn_implementation",
    "load_in_4bit": "quantization.method=nf4",
    "load_in_8bit": "quantization.method=int8",
    "quantization_bit": "quantization.method (nf4, int8, …)",
    "bnb_4bit_quant_type": "quantization.method (nf4 or fp4)",
    "quantize": "quantization.method",
    "double_quant": "quantization.bnb_4bit_use_double_quant",
    "double_quantization": "quantization.bnb_4bit_use_double_quant",
    "compute_dtype": "quantization.bnb_4bit_compute_dtype",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "lora_target_linear": "lora.target_modules=all-linear",
    "lora_modules_to_save": "lora.modules_to_save",
    "additional_target": "lora.modules_to_save",
    "use_dora_lora": "lora.use_dora",
    "peft_use_dora": "lora.use_dora",
    "peft_use_rslora": "lora.use_rslora",
    "dataset": "data.path",
    "datasets": "data.path",
    "dataset_path": "data.path",
    "dataset_name": "data.path",
    "data_path": "data.path",
    "train_file": "data.path",
    "dataset_config": "data.name",
    "chat_template": "data.template",
    "max_samples": "data.max_rows",
    "max_train_samples": "data.max_rows",
    "val_set_size": "data.eval_fraction",
    "val_size": "data.eval_fraction",
    "val_split_fraction": "data.eval_fraction",
    "test_size": "data.eval_fraction",
    "eval_dataset": "data.eval_path",
    "dataloader_num_workers": "data.num_workers",
    "micro_batch_size": "train.per_device_train_batch_size",
    "batch_size": "train.per_device_train_batch_size (rows at once) and train.gradient_accumulation_steps",
    "per_device_batch_size": "train.per_device_train_batch_size",
    "global_batch_size": "train.per_device_train_batch_size times train.gradient_accumulation_steps",
    "grad_accum_steps": "train.gradient_accumulation_steps",
    "gradient_accumulation": "train.gradient_accumulation_steps",
    "lr": "train.learning_rate",
    "scheduler": "train.lr_scheduler_type",
    "lr_scheduler": "train.lr_scheduler_type",
    "warmup_steps": "train.warmup_ratio",
    "grad_clip": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "clip_grad_norm": "train.max_grad_norm",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "steps": "train.max_steps",
    "max_iters": "train.max_steps",
    "cutoff_len": "train.max_length",
    "sequence_len": "train.max_length",
    "seq_len": "train.max_length",
    "max_seq_len": "train.max_length",
    "max_seq_length": "train.max_length",
    "model_max_length": "train.max_length",
    "block_size": "train.max_length",
    "sample_packing": "train.packing",
    "gradient_checkpointing": "train.activations (full recomputes every layer)",
    "use_gradient_checkpointing": "train.activations (full or full_offload recompute every layer)",
    "optimizer": "optim.name",
    "save_every": "checkpoint.save_steps",
    "resume": "checkpoint.resume_from_checkpoint",
    "overwrite_output_dir": "checkpoint.resume_from_checkpoint=never",
    "wandb": "track.report_to=[wandb]",
    "use_wandb": "track.report_to=[wandb]",
    "wandb_project": "track.project",
    "eval_every": "evaluate.eval_steps",
    "evals_per_epoch": "evaluate.eval_steps",
    "do_eval": "evaluate.enabled",
    "output": "output_dir",
    "out_dir": "output_dir",
    "merge": "export.format=[merged]",
    "random_seed": "seed",
}

_BY_LEAF: dict[str, list[str]] = {}
for _key in KEYS:
    _BY_LEAF.setdefault(_key.rpartition(".")[2], []).append(_key)


def owner(key: str) -> str | None:
    """The schema's key that `key` belongs to: itself, or the dictionary it is an entry of."""
    while key:
        if key in _TYPES:
            return key
        key, _, _ = key.rpartition(".")
        if key in _TYPES and not _open(key):
            return None
    return None


def _open(key: str) -> bool:
    """True where entries of the user's own naming follow (`data.columns.instruction`)."""
    return get_origin(_TYPES[key]) is dict


def is_text(key: str) -> bool:
    """True for keys that take text as it stands: names and paths."""
    kind = _TYPES.get(key)
    return kind is Any or kind is str or str in get_args(kind)


def suggestion(key: str) -> str:
    """What to write instead of the unknown `key`: ours for another tool's name, else the nearest name."""
    leaf = key.rpartition(".")[2]
    for name in (key, leaf):
        if name in ALIASES:
            return f"here it is {ALIASES[name]}"
    if leaf in _BY_LEAF:
        return f"did you mean {' or '.join(_BY_LEAF[leaf])}?"
    if near := get_close_matches(key, _TYPES, n=1, cutoff=0.8):
        return f"did you mean {near[0]}?"
    section = key.partition(".")[0]
    here = [k.partition(".")[2] for k in KEYS if k.startswith(section + ".")]
    if near := get_close_matches(leaf, here, n=1, cutoff=0.6):
        return f"did you mean {section}.{near[0]}?"
    elsewhere = 0.75 if here else 0.6  # who names a section rarely means a key of another
    if near := get_close_matches(leaf, [*_BY_LEAF, *ALIASES], n=1, cutoff=elsewhere):
        return f"did you mean {ALIASES.get(near[0]) or ' or '.join(_BY_LEAF[near[0]])}?"
    if here:
        return f"{section} has {', '.join(here)}"
    return f"the sections are {', '.join(sorted(SECTIONS))}"


def problem(key: str, value: Any) -> str | None:
    """One line that says why `key: value` cannot be set, or None if its name and type are right."""
    if key.rpartition(".")[2] in ("_target_", "_partial_", "_args_", "_recursive_", "_convert_"):
        return f"{key}: refused: a configuration never names code to run"
    if hidden := _find_target(value):
        return f"{key}: {hidden} refused: a configuration never names code to run"
    if key in SECTIONS:
        names = ", ".join(k for k in KEYS if k.startswith(key + "."))
        return f"{key}: is a section; set its keys one by one: {names}"
    ours = owner(key)
    if ours is None:
        return f"{key}: unknown key; {suggestion(key)}"
    if value == "???":
        return f"{key}: '???' is not a value; give one, or null for none"
    try:
        OmegaConf.update(_scratch(), key, value, force_add=ours != key)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        return f"{key}: {reason[0].lower() + reason[1:]} (expected {_name(_TYPES[ours])})"
    return None


@cache
def _scratch() -> DictConfig:
    """The schema, only ever assigned to, to see what its types refuse (making it anew takes 20 ms)."""
    return OmegaConf.structured(RunConfig)


def _find_target(value: Any) -> str | None:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "_target_":
                return "_target_"
            if found := _find_target(inner):
                return found
    elif isinstance(value, list):
        return next((found for inner in value if (found := _find_target(inner))), None)
    return None


def _name(kind: Any) -> str:
    """A type in a user's words: `a whole number`, `a list of text`, …"""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if kind in words:
        return words[kind]
    parts = get_args(kind)
    if type(None) in parts:
        return " or ".join([_name(part) for part in parts if part is not type(None)] + ["null"])
    if get_origin(kind) is UnionType:
        return " or ".join(map(_name, parts))
    if get_origin(kind) is list:
        return f"a list [a,b] of {_name(parts[0])}"
    if get_origin(kind) is dict:
        return f"names {{a: b}} with {_name(parts[1])}"
    return str(kind)
