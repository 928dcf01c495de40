"""The shape of any model: as transformers builds it, else from its tensors, else from its config's keys.

In: a `config.json` as a dict, and the folder with it. Out: a `ModelShape`; one that is not `exact` where
transformers does not know the architecture, so that the plan states a wider margin.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.files import weights_in
from qlora_trainer.plan.shapes import Linear, ModelShape, from_config, layer_of


def shape_of(config: Mapping[str, Any], folder: Path) -> ModelShape:
    """The shape of the model that `config` describes; `folder` may hold its weights, whose headers are read.

    Raises:
        ConfigError: no causal language model; or one that transformers does not know, without weights,
            and `config` does not say how large it is.
    """
    try:
        return from_config(config)
    except KeyError:  # transformers has no such model_type
        pass
    if folder.is_dir() and (files := weights_in(folder)):
        from qlora_trainer.model.shards import open_files

        slots = {name: slot for reader in open_files(files) for name, slot in reader.slots.items()}
        return from_tensors({name: slot.shape for name, slot in slots.items()}, config)
    return from_tensors(_as_llama(folder, config), config)


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
            linears.append(Linear(name.removesuffix(".weight").rsplit(".", 1)[-1], shape[1], shape[0], layer))
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
