"""What the plan must know of a model: every linear layer's size and the geometry of a decoder layer.

In: a base as a run will hold it, without weights (`model/outline.py`), and its adapters. Out: `ModelShape`.
Where the two come from is `architecture.py`'s.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from qlora_trainer.model.fused.spec import LayerSpec, ModelSpec
    from qlora_trainer.model.linears import Share

KNOWN = {  # model types whose saved tensors are tested against `reference_path.py`
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "opt",
}  # fmt: skip


@dataclass(frozen=True)
class Linear:
    """A frozen weight [out_features, in_features]; `layer`: the decoder layer it is in (None: outside)."""

    path: str
    in_features: int
    out_features: int
    layer: int | None
    quantized: bool = False
    adapted: bool = False

    @property
    def name(self) -> str:
        """The last of its module's names."""
        return self.path.rpartition(".")[2]

    @property
    def numel(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True)
class Adapters:
    """What is trained on a base.

    Attributes:
        targets: paths of the adapted linear layers.
        per_rank: trainable elements for each unit of `lora.r`.
        whole: those that do not depend on it: modules trained whole, DoRA's magnitudes.
        spec: what of the model the fast path computes, its adapters of rank 1.
    """

    targets: frozenset[str]
    per_rank: int
    whole: int
    spec: ModelSpec


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only language model, in elements, as one run holds and adapts it.

    Attributes:
        linears: all linear layers but the head.
        embedding: elements of input embeddings of every kind (positions too).
        head: elements of the LM head that are not shared with the embedding (0 if tied).
        loose: matrices that belong to no linear layer (experts, convolutions) and are not quantized.
        other: norms, biases and whatever else is kept as it is.
        q, kv: width of the queries, and of keys or values, in features.
        norm: `rms` (computed in float32) or `layer` (one fused operation).
        norms: per layer, over the hidden state.
        head_norms: whether q and k are normalised head by head.
        gated: the MLP is act(gate) * up; otherwise act(up).
        relu: the activation is a ReLU, which keeps its output only.
        fused_qkv: one projection gives q, k and v, which then share storage.
        exact: the geometry is that of an architecture the plan is tested on.
        layer: the description of the layer with the most adapters, of rank 1; None off the fast path.
        reference_because: why the layers do not run on the fast path, in the run's own words.
        head_because: the same of the LM head, where only that does not.
        chunked: logits are made a chunk at a time (`model/fused/head.py`), whatever runs the layers.
    """

    model_type: str
    linears: tuple[Linear, ...]
    embedding: int
    head: int
    loose: int
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
    per_rank: int = 0
    whole: int = 0
    layer: LayerSpec | None = None
    reference_because: str | None = None
    head_because: str | None = None
    chunked: bool = False
    share: Share | None = None

    @property
    def parameters(self) -> int:
        """All parameters of the base, a tied head counted once."""
        return sum(x.numel for x in self.linears) + self.embedding + self.head + self.loose + self.other

    @property
    def head_numel(self) -> int:
        return self.vocab * self.hidden

    @property
    def tied(self) -> bool:
        return self.head == 0

    def trainable(self, r: int) -> int:
        """Trainable elements under `lora.r`."""
        return self.per_rank * r + self.whole

    @property
    def targets(self) -> tuple[Linear, ...]:
        """The adapted linear layers of the decoder layer that has most of them."""
        adapted = [linear for linear in self.linears if linear.adapted and linear.layer is not None]
        if not adapted:
            return ()
        ((most, _),) = Counter(linear.layer for linear in adapted).most_common(1)
        return tuple(linear for linear in adapted if linear.layer == most)


def adapters_of(adapted: PeftModel) -> Adapters:
    """Of an outline with adapters of rank 1."""
    from qlora_trainer.model.fused.describe import describe_model

    trained = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    ranked = sum(
        size
        for name, size in trained.items()
        if ".lora_A." in name or ".lora_B." in name or "lora_embedding" in name
    )
    return Adapters(
        frozenset(adapted.base_model.targeted_module_names),
        ranked,
        sum(trained.values()) - ranked,
        describe_model(adapted),
    )


def with_adapters(shape: ModelShape, adapters: Adapters) -> ModelShape:
    """The shape of a base, with what is trained on it."""
    from qlora_trainer.model.fused.spec import LayerSpec

    def ranks(layer: LayerSpec) -> int:
        return sum(group.rank * (group.n + group.k) for group in layer.groups.values())

    spec = adapters.spec
    described = [layer for layer in spec.layers if isinstance(layer, LayerSpec)]
    return replace(
        shape,
        linears=tuple(replace(x, adapted=x.path in adapters.targets) for x in shape.linears),
        per_rank=adapters.per_rank,
        whole=adapters.whole,
        layer=max(described, key=ranks, default=None),
        reference_because=spec.reference_because,
        head_because=spec.head_because,
        chunked=spec.declined is None,
    )


def from_model(model: PreTrainedModel) -> ModelShape:
    """The shape of a transformers causal language model, on any device, without adapters."""
    import torch
    from torch import nn

    from qlora_trainer.model.layers import decoder_layers
    from qlora_trainer.model.linears import is_linear, quantized_elements, quantized_share

    config: Any = model.config.get_text_config(decoder=True)
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    prefix, layers = decoder_layers(model)
    linears: list[Linear] = []
    embeddings = loose = other = 0
    weights: set[int] = set()  # a tied weight is counted where it is first met
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in weights]
        weights.update(id(p) for p in own)
        if module is head:
            continue
        if is_linear(module) and own:
            n_out, n_in = module.weight.shape if hasattr(module, "in_features") else module.weight.shape[::-1]
            quantized = bool(quantized_elements(module))
            linears.append(Linear(name, int(n_in), int(n_out), layer_in(name, prefix), quantized))
            other += sum(p.numel() for p in own) - int(n_in * n_out)  # biases
        elif isinstance(module, nn.Embedding):
            embeddings += sum(p.numel() for p in own)
        else:
            loose += sum(p.numel() for p in own if p.dim() >= 2)
            other += sum(p.numel() for p in own if p.dim() < 2)
    tied = head is None or head.weight is embedding.weight or bool(_number(config, "tie_word_embeddings"))
    hidden = _number(config, "hidden_size") or embedding.weight.shape[-1]
    heads = _number(config, "num_attention_heads") or max(1, hidden // 128)  # of none: a guess
    head_dim = _number(config, "head_dim") or hidden // heads
    kv_heads = _number(config, "num_key_value_heads") or heads
    first = dict(layers[0].named_modules()) if len(layers) else {}
    names = {name.rsplit(".", 1)[-1] for name in first}
    mlp = {x for x in linears if x.layer == 0 and re.search(r"gate|up|fc1|fc_in|h_to_4h|c_fc|wi", x.name)}
    intermediate = _number(config, "intermediate_size") or _number(config, "ffn_dim")
    layer_norms = {name for name in first if "norm" in name.rsplit(".", 1)[-1]}
    head_norms = {n for n in layer_norms if n.endswith(("q_norm", "k_norm"))}
    return ModelShape(
        model_type=str(config.model_type),
        linears=tuple(linears),
        embedding=embeddings,
        head=0 if tied else head.weight.numel(),
        loose=loose,
        other=other,
        layers=max(1, len(layers)),
        hidden=hidden,
        intermediate=intermediate or max((x.out_features for x in mlp), default=4 * hidden),
        q=heads * head_dim,
        kv=kv_heads * head_dim,
        heads=heads,
        vocab=_number(config, "vocab_size") or embedding.weight.shape[0],
        gated=bool({"gate_proj", "gate_up_proj"} & names),
        relu=getattr(config, "activation_function", None) == "relu",
        fused_qkv=bool({"qkv_proj", "query_key_value", "c_attn", "Wqkv"} & names),
        norm="layer" if any(isinstance(module, torch.nn.LayerNorm) for module in model.modules()) else "rms",
        norms=len(layer_norms - head_norms) or 2,
        head_norms=bool(head_norms),
        exact=config.model_type in KNOWN,
        share=quantized_share(model),
    )


def _number(config: Any, name: str) -> int | None:
    """A whole number of a configuration; None where it has none, or one for each layer (Gemma 4)."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers' word for "one for each layer"
        return None
    return value if isinstance(value, int) else None


def layer_in(name: str, prefix: str) -> int | None:
    """The number of the layer of the list `prefix` that a module is in."""
    found = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) if prefix else None
    return int(found.group(1)) if found else None


def layer_of(name: str) -> int | None:
    """The number of the decoder layer in a tensor's name (`model.layers.3.mlp.up_proj` -> 3)."""
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return int(found.group(1)) if found else None
