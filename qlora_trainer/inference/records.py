"""What the small JSON files of an adapter's folder say, checked: anybody may have made them.

In: the folder. Out: `adapter_config.json` and `training.json` as dictionaries whose values are of the kinds
that PEFT and we take them for. PEFT itself takes what it finds: it imports the module that `megatron_core`
names, makes matrices of any rank, and matches any regular expression with every module.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft

from qlora_trainer.errors import CheckpointError
from qlora_trainer.model.load import DTYPES
from qlora_trainer.system.untrusted import read_object

TRAINED_WITH = "training.json"  # how the base was held while the adapter learned
ADAPTER_CONFIG = "adapter_config.json"
LARGEST_RANK = 1 << 16
METHODS = ("nf4", "fp4", "int8", "gptq", "awq", "none")
# A repetition inside a repetition: matching it can take for ever.
_NESTED_REPEAT = re.compile(r"[*+}][^()]*\)[*+{]")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_RANK


def _pattern(value: Any) -> bool:
    """A regular expression that ends in reasonable time."""
    if not isinstance(value, str) or len(value) > 10_000 or _NESTED_REPEAT.search(value):
        return False
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _patterns(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(_pattern(key) and of(item) for key, item in value.items())


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


# Key -> (whether a value that is not null will do, what is expected in words).
_ADAPTER: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda value: value in list(peft.PeftType), "a type of PEFT's"),
    "base_model_name_or_path": (_text, "text"),
    "revision": (_text, "text"),
    "r": (_rank, f"a whole number from 1 to {LARGEST_RANK:,}"),
    "lora_alpha": (_number, "a number"),
    "lora_dropout": (lambda value: _number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "target_modules": (
        lambda v: _names(v) or _pattern(v),
        "names, or a regular expression that ends in reasonable time",
    ),
    "exclude_modules": (lambda v: _names(v) or _pattern(v), "names, or a simple regular expression"),
    "modules_to_save": (_names, "names"),
    "rank_pattern": (lambda value: _patterns(value, _rank), "names with ranks"),
    "alpha_pattern": (lambda value: _patterns(value, _number), "names with numbers"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "init_lora_weights": (lambda value: _flag(value) or _text(value), "true, false or a name"),
    "megatron_config": (lambda value: False, "null: no module is imported that an adapter names"),
    "layer_replication": (lambda value: value == [], "null: replicated layers are not read here"),
    **{key: (_flag, "true or false") for key in ("use_rslora", "use_dora", "use_qalora", "lora_bias")},
}
_TRAINED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model_name_or_path": (_text, "text"),
    "method": (lambda value: value in METHODS, " ".join(METHODS)),
    "double_quant": (_flag, "true or false"),
    "dtype": (lambda value: _text(value) and value in DTYPES, " ".join(DTYPES)),
    "compute_dtype": (lambda value: _text(value) and value in DTYPES, " ".join(DTYPES)),
    "base_fingerprint": (_text, "text"),
}
_ALWAYS_TRAINED = ("model_name_or_path", "method", "double_quant", "dtype", "compute_dtype")


def adapter_config(adapter: Path) -> dict[str, Any]:
    """The contents of adapter_config.json.

    Raises:
        CheckpointError: unreadable, or a value that cannot be meant.
    """
    config = _checked(adapter / ADAPTER_CONFIG, _ADAPTER, ("peft_type",))
    if config["peft_type"] == "LORA" and config.get("r") is None:
        raise CheckpointError(f"{adapter / ADAPTER_CONFIG}: r is missing; copy the folder again")
    return config


def training_record(adapter: Path) -> dict[str, Any]:
    """What training.json says of how the base was held; empty for an adapter that is not ours.

    Raises:
        CheckpointError: unreadable, or a value that cannot be meant.
    """
    path = adapter / TRAINED_WITH
    return _checked(path, _TRAINED, _ALWAYS_TRAINED) if path.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk.

    Raises:
        CheckpointError: unreadable or not a JSON object.
    """
    try:
        return read_object(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; copy the folder again") from error


def _checked(
    path: Path, kinds: dict[str, tuple[Callable[[Any], bool], str]], always: tuple[str, ...]
) -> dict[str, Any]:
    found = read_json(path)
    for key in always:
        if found.get(key) is None:
            raise CheckpointError(f"{path}: {key} is missing; copy the folder again")
    for key, (fits, expected) in kinds.items():
        value = found.get(key)
        if value is not None and not fits(value):
            raise CheckpointError(f"{path}: {key} is {value!r:.60}; expected {expected}")
    return found
