"""The shape of any model: as a run would load and adapt it, else from its tensors, else from config.json.

In: a `config.json` as a dict, and the folder with it. Out: a `ModelShape` for each way to hold and adapt the
model; one that is not `exact` where transformers does not know the architecture, so that the plan states a
wider margin.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.files import weights_in
from qlora_trainer.plan.shapes import Linear, ModelShape, adapters_of, from_model, layer_of, with_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Architecture:
    """A model before any weight is read.

    Args:
        config: its `config.json`.
        folder: where that lies, perhaps with weights, whose headers are read where nothing else says.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path | None = None) -> None:
        self.config, self.folder = config, folder
        self._shapes: dict[tuple[Any, ...], ModelShape] = {}

    def shape(self, run: RunConfig, device: str) -> ModelShape:
        """The shape under `run` on a `cuda` or `cpu` device; made once for each way to hold and adapt it.

        Raises:
            MissingInputError: a field of config.json is not what transformers takes.
            ConfigError: no causal language model; it is stored in another way than asked; a target or a
                module to save is not in it; too little of it would be quantized
                (`quantization.allow_partial`). Or transformers does not know it, there are no weights, and
                config.json does not say how large it is.
        """
        lora, quantization = run.lora, run.quantization
        targets, whole = _plain(lora.target_modules), _plain(lora.modules_to_save)
        key = (device, quantization.method, targets, whole, lora.use_dora, lora.lora_dropout)
        if key not in self._shapes:
            known = self._known()
            self._shapes[key] = self._unknown(run) if known is None else _as_held(known, run, device)
        shape = self._shapes[key]
        if shape.share is not None and not quantization.allow_partial:
            shape.share.check(quantization.method)
        return shape

    def _known(self) -> PreTrainedConfig | None:
        """The configuration as transformers reads it; None where it has no such `model_type`."""
        from transformers import CONFIG_MAPPING

        from qlora_trainer.model.skeleton import config_errors, read_configuration, text_config

        if self.config.get("model_type") not in CONFIG_MAPPING:
            return None
        if self.folder is not None and (self.folder / "config.json").is_file():
            found = read_configuration(str(self.folder))
            text_config(found)  # refuses a model inside one that has none, which building it would trip over
            return found
        plain = {name: value for name, value in self.config.items() if name != "auto_map"}
        kind = CONFIG_MAPPING[plain.pop("model_type")]
        with config_errors(kind.model_type):
            known: PreTrainedConfig = kind.from_dict(plain)
        return known

    def _unknown(self, run: RunConfig) -> ModelShape:
        """Of a model that transformers does not know: every matrix of a layer is quantized and, if its name
        is asked for, adapted."""
        if self.folder is not None and self.folder.is_dir() and (files := weights_in(self.folder)):
            from qlora_trainer.model.shards import open_files

            slots = {name: slot for reader in open_files(files) for name, slot in reader.slots.items()}
            shape = from_tensors({name: slot.shape for name, slot in slots.items()}, self.config)
        else:
            shape = from_tensors(_as_llama(self.folder or Path(), self.config), self.config)
        targets, quantized = run.lora.target_modules, run.quantization.method != "none"
        linears = tuple(
            replace(linear, quantized=quantized, adapted=_is_meant(linear.name, targets))
            for linear in shape.linears
        )
        adapted = [linear for linear in linears if linear.adapted]
        return replace(
            shape,
            linears=linears,
            per_rank=sum(linear.in_features + linear.out_features for linear in adapted),
            whole=sum(linear.out_features for linear in adapted) if run.lora.use_dora else 0,
            reference_because=f"transformers does not know model type {shape.model_type}",
        )


def _as_held(config: PreTrainedConfig, run: RunConfig, device: str) -> ModelShape:
    """By the code that loads and adapts; adapters of rank 1, from which any rank's size follows."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from qlora_trainer.model.load import BaseOptions
    from qlora_trainer.model.lora import LoraOptions
    from qlora_trainer.model.outline import outline_adapted, outline_base

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            "model.model_name_or_path: transformers has no causal language model of type "
            f"{config.model_type}, and only those are trained here"
        )
    lora = run.lora
    base = BaseOptions(str(run.model.model_name_or_path), method=run.quantization.method)
    adapters = LoraOptions(
        r=1,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        use_dora=lora.use_dora,
    )
    outline = outline_base(config, base, device)
    shape = from_model(outline)  # before it is adapted
    shape = with_adapters(shape, adapters_of(outline_adapted(config, base, adapters, device, outline)))
    packed = run.quantization.method in ("gptq", "awq")  # which of its layers are, the checkpoint knows
    return replace(shape, share=None) if packed else shape


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _is_meant(name: str, targets: Any) -> bool:
    """Whether a name by itself is among what `lora.target_modules` says."""
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or bool(re.search(rf"(^|\W){name}(\W|$)", targets))
    return name in {target.rsplit(".", 1)[-1] for target in targets}


def from_tensors(tensors: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> ModelShape:
    """The shape of a model that transformers does not know, from its tensors' names and shapes.

    A matrix inside a numbered block is a linear layer, one whose side is the vocabulary an embedding
    or a head. The geometry is read from the usual keys of `config`, with Llama's as a default, so the
    plan states a wider margin.
    """
    linears: list[Linear] = []
    tables: list[int] = []
    other = 0
    vocab = int(config.get("vocab_size") or max(shape[0] for shape in tensors.values()))
    for name, shape in tensors.items():
        numel = 1
        for side in shape:
            numel *= side
        layer = layer_of(name)
        if len(shape) == 2 and layer is not None:
            linears.append(Linear(name.removesuffix(".weight"), shape[1], shape[0], layer))
        elif len(shape) == 2 and vocab in shape:
            tables.append(numel)
        else:
            other += numel
    layers = 1 + max((x.layer for x in linears if x.layer is not None), default=0)
    widths = [x.in_features for x in linears] or [1]
    hidden = int(config.get("hidden_size") or config.get("d_model") or max(set(widths), key=widths.count))
    widest = max((max(x.in_features, x.out_features) for x in linears), default=4 * hidden)
    heads = int(config.get("num_attention_heads") or config.get("n_head") or max(1, hidden // 128))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    return ModelShape(
        model_type=str(config.get("model_type", "unknown")),
        linears=tuple(linears),
        embedding=max(tables, default=0),
        head=sum(tables) - max(tables, default=0),
        loose=0,
        other=other,
        layers=layers,
        hidden=hidden,
        intermediate=int(config.get("intermediate_size") or widest),
        q=heads * head_dim,
        kv=kv_heads * head_dim,
        heads=heads,
        vocab=vocab,
        gated=True,
        relu=False,
        fused_qkv=False,
        norm="rms",
        norms=2,
        head_norms=False,
        exact=False,
    )


NAMES = {  # of the same size, in config.json files
    "hidden": ("hidden_size", "d_model", "n_embd", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "inner": ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"),
    "vocab": ("vocab_size", "padded_vocab_size"),
}


def _as_llama(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama with the sizes of `config`: gated and untied where nothing says otherwise."""
    text = {**config, **(config.get("text_config") or {})}
    sizes = {
        what: next((text[name] for name in names if text.get(name)), None) for what, names in NAMES.items()
    }
    if missing := [NAMES[what][0] for what in ("hidden", "layers", "vocab") if sizes[what] is None]:
        raise ConfigError(
            f"{folder}: transformers does not know model_type={config.get('model_type')!r}, there are no "
            "*.safetensors to read its shapes from, and config.json has no "
            f"{', '.join(missing)}: add the weights"
        )
    hidden, layers, vocab = (int(sizes[what] or 0) for what in ("hidden", "layers", "vocab"))
    inner = int(sizes["inner"] or 4 * hidden)
    heads = int(text.get("num_attention_heads") or max(1, hidden // 128))
    head_dim = int(text.get("head_dim") or hidden // heads)
    kv = int(text.get("num_key_value_heads") or heads) * head_dim
    block = {
        "q_proj": (heads * head_dim, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden),
        "o_proj": (hidden, heads * head_dim), "gate_proj": (inner, hidden), "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }  # fmt: skip
    tensors: dict[str, tuple[int, ...]] = {"norm.weight": (hidden,)}
    tensors |= {f"layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in block.items()}
    tensors |= {f"layers.{i}.norms.weight": (2, hidden, 1) for i in range(layers)}
    tensors["embed_tokens.weight"] = (vocab, hidden)
    if not text.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = (vocab, hidden)
    return tensors
