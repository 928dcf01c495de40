"""What the plan must know of a model: every linear layer's size and the geometry of a decoder layer.

In: a `config.json` as a dict, from which transformers builds the model on the meta device (no memory,
0.1 s for 70B). Out: `ModelShape`. Architectures that transformers does not know are for `unknown.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_trainer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KNOWN = {  # model types whose saved tensors are tested against `reference_path.py`
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "opt",
}  # fmt: skip


@dataclass(frozen=True)
class Linear:
    """A frozen weight [out_features, in_features] that quantization and LoRA may apply to.

    `name` is the module's last name, `layer` the decoder layer it is in (None: outside).
    """

    name: str
    in_features: int
    out_features: int
    layer: int | None

    @property
    def numel(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only language model, in elements.

    Attributes:
        linears: all linear layers but the head.
        embedding: elements of input embeddings of every kind (positions too).
        head: elements of the LM head that are not shared with the embedding (0 if tied).
        other: norms, biases and whatever else is kept as it is.
        q, kv: width of the queries, and of keys or values, in features.
        norm: `rms` (computed in float32) or `layer` (one fused operation).
        norms: per layer, over the hidden state.
        head_norms: whether q and k are normalised head by head.
        gated: the MLP is act(gate) * up; otherwise act(up).
        relu: the activation is a ReLU, which keeps its output only.
        fused_qkv: one projection gives q, k and v, which then share storage.
        exact: the geometry is that of an architecture the plan is tested on.
    """

    model_type: str
    linears: tuple[Linear, ...]
    embedding: int
    head: int
    other: int
    layers: int
    hidden: int
    intermediate: int
    q: int
    kv: int
    heads: int
    vocab: int
    gated: bool
    relu: bool
    fused_qkv: bool
    norm: str
    norms: int
    head_norms: bool
    exact: bool

    @property
    def parameters(self) -> int:
        """All parameters of the base, a tied head counted once."""
        return sum(linear.numel for linear in self.linears) + self.embedding + self.head + self.other

    @property
    def head_numel(self) -> int:
        return self.vocab * self.hidden

    @property
    def tied(self) -> bool:
        return self.head == 0

    def targets(self, target_modules: str | Iterable[str]) -> tuple[Linear, ...]:
        """The linear layers that LoRA goes to: `all-linear`, or those whose name is listed."""
        if target_modules == "all-linear":
            return self.linears
        if isinstance(target_modules, str):  # PEFT: a regular expression over full names
            return tuple(x for x in self.linears if re.search(rf"(^|[^\w]){x.name}([^\w]|$)", target_modules))
        names = {name.rsplit(".", 1)[-1] for name in target_modules}
        return tuple(linear for linear in self.linears if linear.name in names)


def from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape of the model that a `config.json` describes.

    Raises:
        KeyError: transformers does not know its `model_type`.
        ConfigError: it does, and that is no causal language model.
        MissingInputError: a field is not what transformers takes.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    from qlora_trainer.model.skeleton import config_errors, skeleton

    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    kind = CONFIG_MAPPING[plain.pop("model_type")]
    with config_errors(kind.model_type):
        known = kind.from_dict(plain)
    text = known.get_text_config(decoder=True)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"model.model_name_or_path: transformers has no causal language model of type {text.model_type}, "
            "and only those are trained here"
        )
    return from_model(skeleton(text))


def from_model(model: PreTrainedModel) -> ModelShape:
    """The shape of a transformers causal language model, on any device, not quantized."""
    import torch
    from torch import nn

    config: Any = model.config
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    linears: list[Linear] = []
    names: set[str] = set()
    embeddings = other = 0
    weights: set[int] = set()  # a tied weight is counted where it is first met
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in weights]
        weights.update(id(p) for p in own)
        names.add(name.rsplit(".", 1)[-1])
        count = sum(p.numel() for p in own)
        if module is head:
            continue
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            n_in, n_out = module.weight.shape[::-1] if isinstance(module, nn.Linear) else module.weight.shape
            linears.append(Linear(name.rsplit(".", 1)[-1], int(n_in), int(n_out), layer_of(name)))
            other += count - module.weight.numel()  # biases
        elif isinstance(module, nn.Embedding):
            embeddings += count
        else:
            other += count
    tied = head is None or head.weight is embedding.weight or config.tie_word_embeddings
    hidden = int(config.hidden_size)
    heads = int(getattr(config, "num_attention_heads", None) or max(1, hidden // 128))  # of none: a guess
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    mlp = {x for x in linears if x.layer == 0 and re.search(r"gate|up|fc1|fc_in|h_to_4h|c_fc|wi", x.name)}
    gated = bool({"gate_proj", "gate_up_proj"} & names)
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None)
    if intermediate is None:
        intermediate = max((x.out_features for x in mlp), default=4 * hidden)
    layer_norms = {
        name
        for name, module in model.named_modules()
        if layer_of(name) == 0 and "norm" in name.rsplit(".", 1)[-1]
    }
    head_norms = {n for n in layer_norms if n.endswith(("q_norm", "k_norm"))}
    rms = not any(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
    return ModelShape(
        model_type=str(config.model_type),
        linears=tuple(linears),
        embedding=embeddings,
        head=0 if tied else head.weight.numel(),
        other=other,
        layers=int(config.num_hidden_layers),
        hidden=hidden,
        intermediate=int(intermediate),
        q=heads * head_dim,
        kv=kv_heads * head_dim,
        heads=heads,
        vocab=int(config.vocab_size),
        gated=gated,
        relu=getattr(config, "activation_function", None) == "relu",
        fused_qkv=bool({"qkv_proj", "query_key_value", "c_attn", "Wqkv"} & names),
        norm="rms" if rms else "layer",
        norms=len(layer_norms - head_norms) or 2,
        head_norms=bool(head_norms),
        exact=config.model_type in KNOWN,
    )


def layer_of(name: str) -> int | None:
    """The number of the decoder layer in a module's name (`model.layers.3.mlp.up_proj` -> 3)."""
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return int(found.group(1)) if found else None
