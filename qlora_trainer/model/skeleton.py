"""The model that a config.json describes, without memory: modules, names and shapes on the meta device.

In: a resolved source, or its transformers configuration. Out: the configuration or the model, or one line
where the libraries cannot make it: they raise nearly anything when a field is odd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qlora_trainer.errors import CheckpointError, MissingInputError
from qlora_trainer.model.files import KEY
from qlora_trainer.model.shards import Slot, open_files
from qlora_trainer.model.source import weight_files

_WHOLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_ODD_FIELD = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_configuration(
    source: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> PreTrainedConfig:
    """The configuration of the model in `source`, as `source.resolve` returns it.

    A `quantization_config` that weights in 16 or 32 bits were saved beside is left out: the files say how
    they are stored.

    Args:
        say: takes a line of what the user may want to know.

    Raises:
        MissingInputError: transformers has no such model, or a field is not what it takes.
    """
    with config_errors(source):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
    if stored_method(config) is None or not (files := weight_files(source, revision)):
        return config
    try:
        plain = all(
            _is_plain(name, slot) for reader in open_files(files) for name, slot in reader.slots.items()
        )
    except CheckpointError as error:
        raise MissingInputError(f"{KEY}: {error}") from error
    if plain:
        say(
            f"{source}: its config.json says {stored_method(config)}, and its weights are not quantized: "
            "they are taken as they are (plain transformers needs quantization_config taken out of that file)"
        )
        del config.quantization_config
    return config


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the language model in a model: itself, but in one that also sees or hears.

    Raises:
        MissingInputError: a model inside one that has none.
    """
    text = config.get_text_config(decoder=True)
    if not isinstance(text, PreTrainedConfig):
        raise MissingInputError(f"{KEY}: config.json has a model inside a {config.model_type}; copy it again")
    return text


def stored_method(config: PreTrainedConfig) -> str | None:
    """How a checkpoint says that it is stored, as in `quantization.method`: nf4 | fp4 | int8 | gptq | awq | …

    None for plain weights.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    get = stored.get if isinstance(stored, dict) else lambda key, default=None: getattr(stored, key, default)
    method = str(getattr(get("quant_method"), "value", get("quant_method")))
    if method == "bitsandbytes" or get("load_in_4bit") or get("load_in_8bit"):
        return "int8" if get("load_in_8bit") else str(get("bnb_4bit_quant_type", "fp4"))
    return method


def _is_plain(name: str, slot: Slot) -> bool:
    """Whether a tensor is a weight of 16 bits or more, or one of the buffers that old checkpoints hold."""
    return slot.dtype in _WHOLE or name.endswith((".attn.bias", ".attn.masked_bias", "position_ids"))


def skeleton(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal language model of `config` on the meta device, its parameters in `dtype` (float32).

    Raises:
        MissingInputError: transformers cannot build it.
    """
    with config_errors(config.name_or_path or config.model_type), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


@contextmanager
def config_errors(source: str) -> Iterator[None]:
    """Turns what transformers says of a configuration's fields into one line."""
    try:
        yield
    except StrictDataclassError as error:
        raise MissingInputError(
            f"{KEY}: the config.json of {source}: {first_line(error.__cause__ or error)}"
        ) from error
    except _ODD_FIELD as error:
        kind = "" if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: "
        raise MissingInputError(
            f"{KEY}: no model can be read from {source}: {kind}{first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
