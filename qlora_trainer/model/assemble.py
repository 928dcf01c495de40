"""A checkpoint's files into a transformers model, without ever holding the 16-bit model.

In: a source that `source.resolve` has found, and how to quantize. Out: the model on its device.

transformers builds it, maps the checkpoint's names onto its own and quantizes; but the tensors it gets
are `shards`' own, read one at a time when it comes to them. So beyond the model itself loading takes,
for a GPU, 16 MiB of the host's memory for each of transformers' reading threads (one while it
quantizes), and on a CPU what bitsandbytes takes to quantize one tensor (about 16 bytes an element).
Left alone, transformers maps the files: on a CPU, a 0.8 GB checkpoint in nine shards peaked 1.1 to
1.3 GB over its start where this peaks 0.3, 0.2 of it the model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import (
    AutoModelForCausalLM,
    AwqConfig,
    BitsAndBytesConfig,
    GenerationConfig,
    GPTQConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from qlora_trainer.errors import CheckpointError, MissingInputError
from qlora_trainer.model.files import KEY, weights_in
from qlora_trainer.model.linears import as_plain_linears, class_to_load, leave_misread
from qlora_trainer.model.shards import release_freed, stored_tensors
from qlora_trainer.model.skeleton import first_line, skeleton, stored_method
from qlora_trainer.model.source import weight_files
from qlora_trainer.system.terminal import to_stderr


def assemble(
    source: str,
    config: PreTrainedConfig,
    device: torch.device,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    quantization: BitsAndBytesConfig | GPTQConfig | AwqConfig | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = to_stderr,
) -> PreTrainedModel:
    """The model in `source` on `device`, quantized while it is read.

    Args:
        source: a folder, or a hub name.
        dtype: of what is not quantized.
        quantization: None for 16 or 32 bits, and for a checkpoint that says itself how it is stored.
        say: takes a line of what the user may want to know.

    Raises:
        MissingInputError: files are missing or damaged, or not those of the model that config.json
            describes.
    """
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "quantization_config": quantization,
        "device_map": {"": device},
    }
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    try:
        # GPTQModel reads its formats itself, and a model's own code may want more than its tensors.
        left_to_transformers = trust_remote_code or isinstance(quantization, GPTQConfig | AwqConfig)
        files = None if left_to_transformers else weight_files(source, revision)
        if left_to_transformers and Path(source).is_dir():
            weights_in(Path(source))  # refuses an index that leads elsewhere
        if files is None:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                revision=revision,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,  # never a pickle
                **arguments,
            )
            return model
        described = skeleton(config, dtype)
        kind = type(described)
        quantized = quantization is not None or stored_method(config) is not None
        to_load = class_to_load(kind) if quantized and as_plain_linears(described) else kind
        if quantization is not None:
            leave_misread(described, quantization)
        model, found = to_load.from_pretrained(
            None,
            config=described.config,
            state_dict=stored_tensors(files, device),
            generation_config=_generation_config(source, revision),
            ignore_mismatched_sizes=True,  # said below, in one line
            output_loading_info=True,
            **arguments,
        )
    except CheckpointError as error:
        raise MissingInputError(f"{KEY}: {error}") from error
    except (OSError, ValueError, ImportError) as error:
        raise MissingInputError(f"{KEY}: cannot load {source}: {first_line(error)}") from error
    model.__class__ = kind
    release_freed()
    _check_loaded(model, described, found, source, say)
    model.config.name_or_path = model.name_or_path = source
    return model


def _check_loaded(
    model: PreTrainedModel,
    described: PreTrainedModel,
    found: dict[str, Any],
    source: str,
    say: Callable[[str], None],
) -> None:
    """Whether the weights are those of the model that config.json describes.

    transformers fills what is missing with random numbers, and takes quantized weights of any shape.
    """
    what = f"{KEY}: the weights in {source} are not those of its config.json"
    missing = sorted(found["missing_keys"])
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MissingInputError(f"{what}: {missing[0]} is missing{more}; copy the folder again")
    expected = {name: tuple(tensor.shape) for name, tensor in described.state_dict().items()}
    shapes = {name: tuple(shape) for name, shape, _ in found["mismatched_keys"]}
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            expected[weight] = (module.out_features, module.in_features)
            state = getattr(module.weight, "quant_state", None)
            shapes[weight] = tuple(module.weight.shape if state is None else state.shape)
        else:
            for part, tensor in module.named_parameters(name, recurse=False):
                shapes.setdefault(part, tuple(tensor.shape))
    for name, shape in shapes.items():
        if shape != expected.get(name, shape):
            raise MissingInputError(
                f"{what}: {name} is {list(shape)}, asked for is {list(expected[name])}; copy the folder again"
            )
    unexpected = sorted(found["unexpected_keys"])
    if unexpected:
        say(
            f"{source}: {len(unexpected)} stored tensors, such as {unexpected[0]}, are left out: "
            "the model that config.json describes has none of that name"
        )


def _generation_config(source: str, revision: str | None) -> GenerationConfig | None:
    """The model's own, where it has one; else transformers makes one from config.json."""
    try:
        return GenerationConfig.from_pretrained(source, revision=revision)
    except OSError:
        return None
