"""From a folder to a model that answers: an adapter on its base as trained, or a whole exported model.

In: a run folder, an adapter folder (ours or any PEFT one), or a model folder. Out: a model in
evaluation mode and the tokenizer whose template it was trained with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import peft
import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora_trainer.errors import CheckpointError, ConfigError, MissingInputError
from qlora_trainer.inference.records import ADAPTER_CONFIG, adapter_config, training_record
from qlora_trainer.model import residual
from qlora_trainer.model.files import KEY, check_generation_config
from qlora_trainer.model.fingerprint import base_fingerprint
from qlora_trainer.model.load import (
    DTYPES,
    BaseOptions,
    load_base,
    load_tokenizer,
    pick_device,
    pick_dtype,
    read_tokenizer,
)
from qlora_trainer.model.shards import ShardReader
from qlora_trainer.model.skeleton import read_configuration
from qlora_trainer.model.source import resolve

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."  # of every tensor's name in it


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer.

    Attributes:
        model: `PeftModel` for an adapter, else the plain model; evaluation mode, nothing trains.
        stop_ids: tokens that end an answer, from the folder's generation config and template.
    """

    model: PreTrainedModel | peft.PeftModel
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]


def find_adapter(folder: str | Path) -> Path:
    """The adapter folder that `folder` is or, being a run's, contains.

    Raises:
        MissingInputError: there is none, or the run has not finished.
    """
    folder = Path(folder).expanduser()
    for candidate in (folder, folder / "adapter"):
        if (candidate / ADAPTER_CONFIG).is_file():
            return candidate
    if not folder.is_dir():
        raise MissingInputError(f"run={folder}: no such folder; give the output_dir of a finished run")
    if (folder / "checkpoints").is_dir():
        raise MissingInputError(
            f"run={folder}: checkpoints but no adapter/ yet; run its training command again to finish"
        )
    raise MissingInputError(f"run={folder}: neither a run's output_dir nor an adapter ({ADAPTER_CONFIG})")


def trained_base(
    adapter: Path, base: str | None = None, device: str = "auto", revision: str | None = None
) -> BaseOptions:
    """How the adapter's base is to be loaded: as recorded when it was trained.

    An adapter that is not ours says nothing of quantization; then its base is loaded unquantized.

    Args:
        base: another place of the same base, say a folder on this machine.
        revision: of `base`, if it is another place.

    Raises:
        ConfigError: neither the adapter nor `base` names a base model.
    """
    config, trained = adapter_config(adapter), training_record(adapter)
    stored = config.get("base_model_name_or_path")
    name = base or trained.get("model_name_or_path") or stored
    if not name:
        raise ConfigError(f"{adapter / ADAPTER_CONFIG} names no base; set model.model_name_or_path=/a/folder")
    if base in (None, trained.get("model_name_or_path"), stored):
        revision = config.get("revision")
    plain = BaseOptions(
        name_or_path=name,
        revision=revision,
        method="none",
        dtype=pick_dtype("auto", pick_device(device)),
    )
    if not trained:
        return plain
    return replace(
        plain,
        method=trained["method"],
        double_quant=trained["double_quant"],
        dtype=DTYPES[trained["dtype"]],
        compute_dtype=DTYPES[trained["compute_dtype"]],
    )


def check_base(adapter: Path, source: str, revision: str | None) -> None:
    """Whether `source` is the base that the adapter was trained on, as far as its record says.

    Raises:
        CheckpointError: it is another one.
    """
    expected = training_record(adapter).get("base_fingerprint")
    if not expected:
        return
    found = base_fingerprint(source, revision)
    if found != expected:
        raise CheckpointError(
            f"{adapter}: trained on a base with fingerprint {expected[:23]}…, but {source} has "
            f"{found[:23]}…: name the right one with {KEY}"
        )


def load(
    folder: str | Path,
    base: str | None = None,
    device: str = "auto",
    attn_implementation: str | None = None,
    cache_quantized: bool = False,
    revision: str | None = None,
) -> Loaded:
    """Loads the model that was trained: base quantized as then, adapter in its own dtype on top.

    Args:
        folder: a run's output_dir or an adapter folder.
        base: where the base is, if not where the adapter says.
        device: auto | cpu | cuda.
        cache_quantized: as `BaseOptions` has it.
        revision: of `base`, if that is another place.

    Raises:
        MissingInputError: no adapter or no base there.
        CheckpointError: the adapter's files are broken, or it was trained on another base.
    """
    adapter = find_adapter(folder)
    options = replace(
        trained_base(adapter, base, device, revision),
        attn_implementation=attn_implementation,
        cache_quantized=cache_quantized,
    )
    source = resolve(options.name_or_path, options.revision)
    check_base(adapter, source, options.revision)
    tuned = put_adapter(load_base(options, pick_device(device)), adapter)
    tokenizer = load_adapter_tokenizer(adapter, options)
    return Loaded(tuned, tokenizer, adapter_stops(adapter, tokenizer, source, options.revision))


def load_base_alone(folder: str | Path, base: str | None = None, device: str = "auto") -> Loaded:
    """The adapter's base as `load` has it, before anything was trained; with the adapter's tokenizer.

    Where the adapter came with more tokens, the base has rows for them, each the mean of its own.
    """
    adapter = find_adapter(folder)
    options = trained_base(adapter, base, device)
    model = load_base(options, pick_device(device))
    fit_embeddings(model, adapter)
    tokenizer = load_adapter_tokenizer(adapter, options)
    source = resolve(options.name_or_path, options.revision)
    stops = adapter_stops(adapter, tokenizer, source, options.revision)
    return Loaded(model.eval(), tokenizer, stops)


def load_adapter_tokenizer(adapter: Path, options: BaseOptions) -> PreTrainedTokenizerBase:
    """The tokenizer stored with the adapter, or its base's where there is none."""
    if (adapter / "tokenizer_config.json").is_file():
        return read_tokenizer(str(adapter))
    return load_tokenizer(options.name_or_path, options.revision)


def put_adapter(model: PreTrainedModel, adapter: Path) -> peft.PeftModel:
    """`adapter` on `model`, its tensors in the dtype they have on disk, frozen.

    Raises:
        CheckpointError: unreadable, or tensors of other shapes than this base asks for.
        ConfigError: an adapter whose base was changed in a way that cannot be computed again.
    """
    residual.check_foreign(adapter_config(adapter), adapter)
    open_adapter(adapter)  # that they are there
    fit_embeddings(model, adapter)
    try:
        config = peft.PeftConfig.from_pretrained(str(adapter))
        init = getattr(config, "init_lora_weights", None)
        if residual.is_residual(init):
            config.init_lora_weights = True
        tuned = peft.PeftModel.from_pretrained(
            model, str(adapter), config=config, autocast_adapter_dtype=False
        )
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{adapter}: cannot read the adapter: {_first_line(error)}") from error
    except RuntimeError as error:  # load_state_dict lists every tensor that does not fit, one a line
        lines = [line.strip() for line in str(error).splitlines()]
        misfit = next((line for line in lines if "size mismatch" in line), lines[0])
        raise CheckpointError(
            f"{adapter}: this adapter belongs to another base than {model.name_or_path}: {misfit}"
        ) from error
    except Exception as error:  # whatever PEFT falls over, of an adapter_config.json that it takes as it is
        text = f"{type(error).__name__}: {_first_line(error)}"
        raise CheckpointError(f"{adapter}: cannot read the adapter: {text}") from error
    stored = {key: slot.dtype for key, slot in open_adapter(adapter).slots.items()}
    for name, parameter in tuned.named_parameters():
        key = name.replace(".modules_to_save.default", "").replace(".default", "")
        if key in stored:  # PEFT makes parameters in the base's dtype, whatever the file holds
            parameter.data = parameter.data.to(stored[key])
    if residual.is_residual(init):
        residual.begin_foreign(tuned, str(init))
    tuned.eval()
    return tuned


def open_adapter(adapter: Path) -> ShardReader:
    """The tensors of an adapter, read when asked for.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"{adapter}: no {ADAPTER_WEIGHTS} in it, and no pickle is read")
    return ShardReader(adapter / ADAPTER_WEIGHTS)


@torch.no_grad()
def fit_embeddings(model: PreTrainedModel, adapter: Path) -> None:
    """Gives `model` as many embeddings as the adapter stores, new ones being the mean of the others.

    An adapter whose tokenizer got more tokens brings whole embeddings, which fit a resized base only.
    """
    inner = model.get_input_embeddings()
    head = model.get_output_embeddings()
    names = [f"{name}." for name, module in model.named_modules() if module is inner or module is head]
    rows = {
        slot.shape[0]
        for key, slot in open_adapter(adapter).slots.items()
        if "lora_" not in key and key.removeprefix(ADAPTER_PREFIX).startswith(tuple(names))
    }
    before = inner.weight.shape[0]
    if len(rows) == 1 and rows != {before}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None and len(module.weight) > before:
                module.weight[before:] = module.weight[:before].mean(0)
        model.requires_grad_(False)


def adapter_stops(
    adapter: Path, tokenizer: PreTrainedTokenizerBase, source: str, revision: str | None
) -> list[int]:
    """The stop tokens stored with the adapter, or else those of its base in `source`, and the template's."""
    from qlora_trainer.inference.stop import stop_ids

    check_generation_config(adapter)
    own = adapter / "generation_config.json"
    defaults = GenerationConfig.from_pretrained(adapter) if own.is_file() else base_defaults(source, revision)
    return stop_ids(tokenizer, defaults)


def base_defaults(source: str, revision: str | None) -> GenerationConfig:
    """How a base generates: as its generation_config.json says, or without one its config.json."""
    try:
        return GenerationConfig.from_pretrained(source, revision=revision)
    except OSError:
        return GenerationConfig.from_model_config(read_configuration(source, revision))


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bfloat16`, as `DTYPES` spells it."""
    return str(dtype).removeprefix("torch.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
