"""What a value, or several together, may be: every problem at once, each in one line.

In: a composed `RunConfig` whose names and types are right. Out: lists of problems. No torch, no network,
no file is opened: what depends on this machine is in `preflight.py`, on the model in `model/`, on the rows
in `data/`.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from difflib import get_close_matches
from math import inf, isfinite
from typing import Any

from qlora_trainer import optim
from qlora_trainer.config import names
from qlora_trainer.config.frozen import as_dict, flat
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.options import DataOptions
from qlora_trainer.errors import ConfigError
from qlora_trainer.optim import schedule

NEEDS_MODEL = frozenset({"train", "plan", "inspect", "bench"})
NEEDS_DATA = frozenset({"train", "inspect"})
NEEDS_RUN = frozenset({"evaluate", "chat", "export", "verify"})  # or the recipe whose run it is

CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("auto", "bfloat16", "float32", "float16"),
    "model.attn_implementation": ("auto", "sdpa", "eager", "flash_attention_2"),
    "model.kernels": ("auto", "reference"),
    "model.offload": ("none", "embeddings", "layers", "auto"),
    "model.device": ("auto", "cpu", "cuda"),
    "quantization.method": ("nf4", "fp4", "int8", "gptq", "awq", "none"),
    "quantization.bnb_4bit_compute_dtype": ("auto", "bfloat16", "float32", "float16"),
    "lora.dtype": ("bfloat16", "float32"),
    "train.lr_scheduler_type": schedule.NAMES,
    "train.activations": ("auto", "none", "mlp", "full", "offload", "full_offload"),
    "train.base_gemm": ("bf16", "fp8"),
    "optim.name": optim.NAMES,
    "evaluate.task": ("none", "exact_match"),
    "export.merge_base": ("trained", "original"),
    "export.dtype": ("auto", "bfloat16", "float32", "float16"),
    "export.gguf_type": (
        "f16",
        "bf16",
        "q8_0",
        "q6_k",
        "q5_k_m",
        "q5_1",
        "q5_0",
        "q4_k_m",
        "q4_1",
        "q4_0",
    ),
}
LISTS: dict[str, tuple[str, ...]] = {
    "track.report_to": ("wandb",),
    "export.format": ("adapter", "merged", "gptq", "awq", "rtn", "int8", "nf4", "gguf"),
}
# Initialisations that PEFT computes from the weights themselves need 16 or 32 bit ones; eva and corda need
# data first, loftq quantizes on its own.
INITS = ("gaussian", "orthogonal", "olora", "pissa")
INITS_FROM_WEIGHTS = ("olora", "pissa")

RANGES: dict[str, tuple[float, float]] = {  # both ends belong
    "seed": (0, 2**32 - 1),
    "lora.r": (1, 8192),
    "lora.lora_dropout": (0, 0.99),
    "train.per_device_train_batch_size": (1, inf),
    "train.gradient_accumulation_steps": (1, inf),
    "train.learning_rate": (0, 1),
    "train.warmup_ratio": (0, 1),
    "train.max_grad_norm": (0, inf),
    "train.num_train_epochs": (0, inf),
    "train.max_length": (2, inf),
    "train.logging_steps": (1, inf),
    "optim.weight_decay": (0, 1),
    "checkpoint.save_steps": (1, inf),
    "checkpoint.save_total_limit": (1, inf),
    "evaluate.eval_steps": (0, inf),
    "evaluate.max_rows": (1, inf),
    "evaluate.max_new_tokens": (1, inf),
    "evaluate.batch_size": (1, inf),
    "evaluate.examples": (0, inf),
    "export.bits": (2, 8),
    "export.group_size": (-1, inf),
    "export.max_kl": (0, inf),
    "export.calibration_samples": (1, inf),
    "export.calibration_length": (16, inf),
    "export.verify_rows": (1, inf),
    "export.verify_questions": (0, inf),
    "chat.max_new_tokens": (1, inf),
    "chat.temperature": (0, 5),
    "chat.top_p": (0, 1),
    "optim.resident_gib": (0, inf),
    "plan.num_processes": (1, inf),
}
ABOVE_ZERO = (
    "lora.lora_alpha",
    "train.learning_rate",
    "train.num_train_epochs",
    "optim.adam_epsilon",
    "chat.top_p",
)
BETAS = ("optim.adam_beta1", "optim.adam_beta2")


def values(config: RunConfig, command: str = "train") -> list[str]:
    """Wrong values, values out of range, and keys that contradict each other."""
    found = dict(flat(as_dict(config)))
    return [
        *names.problems(found),
        *_choices(found),
        *_ranges(found),
        *_conflicts(config, command),
        *_packages(config, command),
    ]


def missing(config: RunConfig, command: str) -> list[str]:
    """Keys that `command` cannot do without."""
    problems = []
    named = config.export.adapter or config.model.model_name_or_path  # an adapter from elsewhere, or a base
    elsewhere = command in ("export", "verify") and named and config.output_dir
    if command in NEEDS_RUN and not (config.run or config.recipe or elsewhere):
        more = ", or export.adapter=FOLDER and output_dir=FOLDER" if command in ("export", "verify") else ""
        problems.append(f"run: {command} needs the folder of a finished run, e.g. run=outputs/NAME{more}")
        return problems
    if command in NEEDS_MODEL and not config.model.model_name_or_path:
        problems.append(
            "model.model_name_or_path: not set; name a folder or a hub model, or start from a recipe"
        )
    if command in NEEDS_DATA and not config.data.path:
        problems.append("data.path: not set; name a file, a folder or a hub dataset, or start from a recipe")
    if command == "train" and not config.output_dir:
        problems.append(
            "output_dir: not set; without a recipe the run has no name: add output_dir=outputs/NAME"
        )
    return problems


def _choices(flat: dict[str, Any]) -> Iterator[str]:
    for key, allowed in CHOICES.items():
        if flat[key] not in allowed:
            yield _not_one_of(key, flat[key], allowed)
    for key, allowed in LISTS.items():
        for item in flat[key]:
            if item not in allowed:
                yield _not_one_of(key, item, allowed)
        if len(set(flat[key])) < len(flat[key]):
            yield f"{key}: an entry is given twice; name each once"
    init = flat["lora.init_lora_weights"]
    if not isinstance(init, bool) and init not in INITS and not re.fullmatch(r"pissa_niter_\d+", str(init)):
        yield _not_one_of("lora.init_lora_weights", init, ("true", "false", *INITS))
    target = flat["lora.target_modules"]
    if not isinstance(target, str) and not _names(target):
        yield f"lora.target_modules: {target!r} is not all-linear, nor a list of module names [q_proj,v_proj]"
    if flat["lora.modules_to_save"] == []:
        yield "lora.modules_to_save: an empty list; name modules, or null for none"
    text = flat["export.calibration"]
    if not isinstance(text, str) and not _names(text):
        yield f"export.calibration: {text!r} is neither train, self, c4, wikitext, a file nor a list of such"
    limit = flat["checkpoint.resume_from_checkpoint"]
    if limit.lower() in ("true", "false", "yes", "no", "none", ""):
        yield (
            f"checkpoint.resume_from_checkpoint: {limit!r} is not auto (go on if there is something), never, "
            "or a checkpoint folder"
        )


def _ranges(flat: dict[str, Any]) -> Iterator[str]:
    for key, (low, high) in RANGES.items():
        value = flat[key]
        if isinstance(value, str):  # the one number that may be left to the plan
            if value != "auto":
                yield f"{key}: {value!r} is neither a whole number nor auto"
        elif value is not None and not low <= value <= high:
            bound = f"at least {low:g}" if high == inf else f"from {low:g} to {high:g}"
            yield f"{key}: {value} is out of range; expected {bound}"
        elif value is not None and not isfinite(value):
            yield f"{key}: {value} is not a finite number"
    for key in ABOVE_ZERO:
        low, high = RANGES.get(key, (0, inf))
        if flat[key] == 0 or (key not in RANGES and not 0 < flat[key] < inf):
            yield f"{key}: {flat[key]} is out of range; expected more than 0"
    for key in BETAS:
        if not 0 <= flat[key] < 1:
            yield f"{key}: {flat[key]} is out of range; expected from 0 to below 1"
    if flat["train.max_steps"] == 0 or flat["train.max_steps"] < -1:
        yield f"train.max_steps: {flat['train.max_steps']} is out of range; expected 1 or more, or -1"


def _conflicts(config: RunConfig, command: str) -> Iterator[str]:
    model, quantization, lora, data, train = (
        config.model, config.quantization, config.lora, config.data, config.train,
    )  # fmt: skip
    if data.path is not None:
        try:
            DataOptions(**as_dict(data))
        except ConfigError as error:
            yield str(error)
    if command in ("train", "plan"):
        yield from _float16(config)
    if quantization.method not in ("nf4", "fp4") and quantization.bnb_4bit_compute_dtype != "auto":
        yield (
            f"quantization.bnb_4bit_compute_dtype: set with quantization.method={quantization.method}, which "
            "has no such dtype; leave it out, or use nf4 or fp4"
        )
    if model.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", model.revision or ""):
        yield (
            "model.trust_remote_code: runs code from the model's repository, so model.revision must be "
            "a commit hash (40 hexadecimal digits)"
        )
    if lora.use_dora and quantization.method in ("gptq", "awq"):
        yield (
            f"lora.use_dora: PEFT has no DoRA on {quantization.method} layers; use nf4, fp4, int8 or none, "
            "or lora.use_dora=false"
        )
    init = str(lora.init_lora_weights)
    if init.startswith(INITS_FROM_WEIGHTS) and quantization.method != "none":
        yield (
            f"lora.init_lora_weights: {init} is computed from unquantized weights, quantization.method="
            f"{quantization.method} has none; use gaussian or true, or quantization.method=none"
        )
    if isinstance(lora.target_modules, list) and lora.modules_to_save:
        for name in sorted(set(lora.target_modules) & set(lora.modules_to_save)):
            yield f"lora.modules_to_save: {name} is in lora.target_modules too; name it in one of the two"
    if train.base_gemm == "fp8" and model.offload == "layers":
        yield (
            "model.offload: layers stream in 4 bits, train.base_gemm=fp8 keeps all of them on the GPU in 8; "
            "set one of the two"
        )
    if train.packing and train.group_by_length:
        yield "train.group_by_length: has no use with train.packing=true (every row is full); set one"
    if not train.packing and data.overlong == "split":
        yield "data.overlong: split cuts documents for packing; set train.packing=true, or another overlong"
    if config.evaluate.enabled and not (data.eval_path or data.eval_fraction):
        remedy = "has no held-out rows to be measured on; set data.eval_path or data.eval_fraction"
        if config.evaluate.task != "none":
            yield f"evaluate.task: {config.evaluate.task} {remedy}"
        if config.evaluate.eval_steps:
            yield f"evaluate.eval_steps: {config.evaluate.eval_steps} {remedy}"


def _float16(config: RunConfig) -> Iterator[str]:
    for key, value in (
        ("model.dtype", config.model.dtype),
        ("quantization.bnb_4bit_compute_dtype", config.quantization.bnb_4bit_compute_dtype),
    ):
        if value == "float16":
            yield (
                f"{key}: float16 overflows to NaN (one in five Llama-7B runs of the QLoRA authors); use "
                "bfloat16, or float32 on hardware without it"
            )


def _packages(config: RunConfig, command: str) -> Iterator[str]:
    loads = command not in ("plan", "inspect")  # a plan needs a model's shape, tokens a tokenizer
    wanted = {
        "wandb": (
            "track.report_to",
            command == "train" and "wandb" in config.track.report_to,
            "pip install 'qlora_trainer[wandb]'",
        ),
        "flash_attn": (
            "model.attn_implementation",
            loads and config.model.attn_implementation == "flash_attention_2",
            "pip install flash-attn, or use sdpa, which has the same kernel",
        ),
        "gptqmodel": (
            "quantization.method",
            loads and config.quantization.method in ("gptq", "awq"),
            "pip install 'qlora_trainer[quantize]'",
        ),
        "lm_eval": (
            "evaluate.lm_eval_tasks",
            command == "evaluate" and bool(config.evaluate.lm_eval_tasks),
            "pip install 'qlora_trainer[eval]'",
        ),
    }
    for package, (key, asked, remedy) in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            yield f"{key}: needs the package {package}, which is not installed: {remedy}"


def _not_one_of(key: str, value: Any, allowed: tuple[str, ...]) -> str:
    near = get_close_matches(str(value).lower(), allowed, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{key}: {value!r} is not one of {', '.join(allowed)}{hint}"


def _names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and name for name in value)
