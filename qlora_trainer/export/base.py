"""The base's weights, tensor by tensor, as training saw them: quantized and dequantized again, or untouched.

In: a base's folder and how it was held. Out: for each tensor of each shard its value in float32.
Which layers were quantized is asked of transformers itself, on a model without memory (meta device);
the rounding is bitsandbytes' own, on the dtype that training loaded. So the result is, bit for bit,
the weight that the trained model multiplies with. Layers that were never quantized stay as they are:
an NF4 round trip of those would give yet another model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import bitsandbytes.functional as bnb
import torch
from torch import Tensor
from transformers import (
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from qlora_trainer.errors import ConfigError, MissingInputError
from qlora_trainer.model.linears import quantized_elements
from qlora_trainer.model.outline import hold
from qlora_trainer.model.shards import ShardReader, open_files
from qlora_trainer.model.skeleton import read_configuration, skeleton, stored_method
from qlora_trainer.model.source import folder_of, weight_files

BLOCK = 64  # weights per 4-bit block: bitsandbytes' default, which transformers leaves as it is
IGNORED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")  # buffers of old checkpoints, made anew


@dataclass(frozen=True)
class Held:
    """How the base was held in training.

    Attributes:
        method: nf4 | fp4 | int8 | none.
        dtype: the base was loaded in, before quantization.
    """

    method: str
    double_quant: bool
    dtype: torch.dtype

    def round_trip(self, weight: Tensor) -> Tensor:
        """`weight` quantized as in training and back, float32.

        LLM.int8() also rounds activations on the fly, which no weight can express.
        """
        if self.method == "int8":
            codes, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
            return codes.float() * scales[:, None] / 127
        codes, state = bnb.quantize_4bit(
            weight.to(self.dtype).contiguous(),
            blocksize=BLOCK,
            compress_statistics=self.double_quant,
            quant_type=self.method,
        )
        return bnb.dequantize_4bit(codes, state).float()


def is_quantized(source: str, revision: str | None) -> bool:
    """Whether the base is stored quantized, so that loading it must not quantize again."""
    return stored_method(read_configuration(source, revision)) is not None


class Base:
    """The base model on disk.

    Args:
        source: folder, or hub model in the local cache.
        held: None for the original weights.

    Raises:
        MissingInputError: no safetensors there.
        CheckpointError: they are damaged or not those that the index names.
        ConfigError: a checkpoint that is already quantized in a way that is not undone here.
    """

    def __init__(self, source: str, revision: str | None, held: Held | None, device: torch.device) -> None:
        self.source, self.held, self.device = source, held, device
        self.folder = folder_of(source, revision)
        files = weight_files(source, revision)
        if files is None:
            raise MissingInputError(
                f"{source}: no .safetensors files; pickled weights are not read here, convert the model first"
            )
        self.readers = open_files(files)
        self.config: PretrainedConfig = read_configuration(str(self.folder))
        stored = stored_method(self.config)
        if stored not in (None, "nf4", "fp4", "int8"):
            raise ConfigError(
                f"{source} is stored as {stored}: nothing can be merged into it; "
                "use export.format=[adapter], or train on the 16-bit weights"
            )
        self.stored_quantized = stored is not None
        if self.stored_quantized and held is None:
            raise ConfigError(
                f"export.merge_base=original: {source} is itself quantized and holds no 16-bit weights; "
                "use export.merge_base=trained"
            )

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter and persistent buffer by the model's own name, tied ones too."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self._skeleton().state_dict().items()}
        return shapes | {name: shapes[same] for name, same in self.tied.items() if same in shapes}

    @cached_property
    def tied(self) -> dict[str, str]:
        """Parameter -> the one whose memory it shares, as the config says (`lm_head` -> `embed_tokens`)."""
        return dict(self._skeleton().all_tied_weights_keys)

    @cached_property
    def linears(self) -> frozenset[str]:
        """Weights that loading quantizes with bitsandbytes: linear layers but the head's."""
        model = self._skeleton()
        hold(model, BitsAndBytesConfig(load_in_8bit=True), self.device.type)
        return frozenset(f"{name}.weight" for name, part in model.named_modules() if quantized_elements(part))

    @property
    def quantized(self) -> frozenset[str]:
        """Parameters that training held quantized."""
        return frozenset() if self.held is None or self.held.method == "none" else self.linears

    def contents(self, reader: ShardReader) -> list[tuple[str, str]]:
        """(stored key, parameter) of a shard's tensors, without the constants of quantized ones.

        Raises:
            ConfigError: a tensor that belongs to no parameter of the model.
        """
        found = []
        for key in reader.slots:
            if key.endswith(IGNORED) or _constant_of(key, reader) is not None:
                continue
            found.append((key, self._parameter(key)))
        return found

    def value(self, reader: ShardReader, key: str, parameter: str) -> Tensor:
        """The weight in float32 on `device`, as training multiplied with it (or the original)."""
        raw = reader.read(key).to(self.device)
        if self.stored_quantized and raw.dtype in (torch.uint8, torch.int8):
            return self._stored_value(reader, key, raw)
        assert raw.is_floating_point(), f"{key} holds {raw.dtype}"
        if self.held is None:
            return raw.float()
        if parameter in self.quantized and not self.stored_quantized:
            return self.held.round_trip(raw)
        return raw.to(self.held.dtype).float()

    def dtype(self) -> torch.dtype:
        """Of the checkpoint's weights: the config's, or the largest tensor's."""
        stored = self.config.dtype
        if isinstance(stored, torch.dtype):
            return stored
        return max(self.readers[0].slots.values(), key=lambda slot: slot.nbytes).dtype

    def _stored_value(self, reader: ShardReader, key: str, raw: Tensor) -> Tensor:
        if raw.dtype == torch.int8:
            scales = reader.read(f"{key.removesuffix('weight')}SCB").to(self.device)
            return raw.float() * scales[:, None] / 127
        constants = {
            name.removeprefix(f"{key}."): reader.read(name).to(self.device)
            for name in reader.slots
            if name.startswith(f"{key}.")
        }
        state = bnb.QuantState.from_dict(constants, device=self.device)
        return bnb.dequantize_4bit(raw, state).float()

    def _parameter(self, key: str) -> str:
        prefix = self.prefix + "."
        for name in (key, prefix + key, key.removeprefix(prefix)):
            if name in self.parameters:
                return name
        raise ConfigError(
            f"{self.source}: {key} is not a parameter of {self.config.model_type}; "
            "this architecture stores its weights in a layout that cannot be merged shard by shard"
        )

    @cached_property
    def prefix(self) -> str:
        """Name of the inner model, which some checkpoints leave out of their keys."""
        return str(self._skeleton().base_model_prefix)

    @cached_property
    def embeddings(self) -> frozenset[str]:
        """Parameters with a row per token: input and output embeddings."""
        model = self._skeleton()
        modules = [
            module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module
        ]
        return frozenset(
            f"{name}.weight" for name, module in model.named_modules() if any(module is m for m in modules)
        )

    def _skeleton(self) -> PreTrainedModel:
        """The model's modules and names, without memory."""
        config = read_configuration(str(self.folder))
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return skeleton(config)


def _constant_of(key: str, reader: ShardReader) -> str | None:
    """The quantized weight that `key` only belongs to (block constants, row scales), if it does."""
    if key.endswith((".SCB", ".weight_format")):
        return f"{key.rpartition('.')[0]}.weight"
    weight, mark, _ = key.rpartition(".weight.")
    return f"{weight}.weight" if mark and f"{weight}.weight" in reader.slots else None
