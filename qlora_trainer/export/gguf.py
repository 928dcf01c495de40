"""A merged model as one GGUF file, for llama.cpp and what is built on it.

In: a `Merge` and the tokenizer. Out: `model-<type>.gguf` with weights, vocabulary, merges, special tokens
and the chat template inside. F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1 and Q4_0 are quantized by the `gguf`
package itself, embeddings and head at Q8_0 or more; Q6_K, Q5_K_M and Q4_K_M are llama.cpp's mixes of
K-quants (`kquants`). Norms stay at float32. Architectures and pre-tokenizers that are not in the two
tables are refused by name, and so is a sliding window that training rows are longer than. What else the
format cannot hold is said by `limits`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qlora_trainer.data.encode import prefix_ids
from qlora_trainer.errors import ConfigError
from qlora_trainer.export import kquants
from qlora_trainer.export.kquants import KQuantizer
from qlora_trainer.export.merge import Merge, Piece, Progress
from qlora_trainer.export.reader import ENDS
from qlora_trainer.export.source import Rows
from qlora_trainer.system import redact

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
}
TYPES = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (GGMLQuantizationType.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (GGMLQuantizationType.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
} | kquants.MIXES
BLOCK = 32  # weights that share a scale, along a row
# llama.cpp's name of a pre-tokenizer, by what its JSON contains; the first that fits.
_PRE = (
    ("llama-bpe", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"),
    ("qwen2", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|"),
    ("smollm", '"individual_digits": true'),
    ("gpt-2", '"type": "ByteLevel"'),
)


_ENDS = ("eos", "eot", "eom")  # that a file can name: of the sequence, of a turn, of a message


@dataclass(frozen=True)
class Contents:
    """What a file says beside its weights.

    Attributes:
        name, base: of the tuned model, and of its base as a user would name it.
        stop_ids: that end an answer.
        rows: what it was trained on.
    """

    name: str
    base: str
    tokenizer: PreTrainedTokenizerBase
    stop_ids: Sequence[int]
    rows: Rows

    @property
    def adds_bos(self) -> bool:
        """Whether llama.cpp puts BOS before a text: where the tokenizer does and training rows had it."""
        begins = prefix_ids(self.tokenizer)[:1] == [self.tokenizer.bos_token_id]
        return begins and (self.rows.with_bos is None or self.rows.with_bos >= 0.5)

    @property
    def ends(self) -> list[int]:
        """Stop ids in the order in which a file can name them: the tokenizer's own first."""
        own = self.tokenizer.eos_token_id
        known = set(self.tokenizer.convert_tokens_to_ids(sorted(ENDS)))
        # those that llama.cpp knows by itself come last
        return sorted(self.stop_ids, key=lambda i: (i != own, i in known, i))


def check(merge: Merge, contents: Contents, kind: str) -> None:
    """What GGUF cannot hold, or we cannot write, before anything is written.

    Raises:
        ConfigError: naming the architecture, rope scaling, window, tokenizer or layer.
    """
    config = merge.base.config
    if kind not in TYPES:
        raise ConfigError(f"export.gguf_type={kind}: expected one of {' '.join(TYPES)}")
    if kind in kquants.MIXES:
        kquants.require_library(kind)
    if config.model_type not in ARCHITECTURES:
        raise ConfigError(
            f"export.format=gguf: {config.model_type} is not supported, only {' '.join(ARCHITECTURES)}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"export.format=gguf: rope scaling of type {rope['rope_type']} is not supported")
    window, longest = _window(config), contents.rows.longest
    if window is not None and longest is not None and longest > window:
        raise ConfigError(
            f"export.format=gguf: this {config.model_type} attends to the last {window} tokens, in llama.cpp "
            f"to all of them, and training rows are up to {longest} tokens long: it would be another model; "
            "use merged, gptq or awq"
        )
    _vocabulary(contents.tokenizer)
    block = 1 if kind in ("f16", "bf16") else BLOCK
    for piece in merge.pieces:
        if len(piece.shape) == 2 and piece.shape[-1] % block:
            raise ConfigError(
                f"export.gguf_type={kind}: rows of {piece.name} have {piece.shape[-1]} weights, "
                f"not a multiple of {block}; use f16"
            )


def limits(merge: Merge, contents: Contents) -> list[str]:
    """What a file cannot hold of this model, in sentences without their full stop."""
    found = []
    window = _window(merge.base.config)
    if window is not None:
        found.append(
            f"The model attends to the last {window} tokens, llama.cpp to all of them, so the file gives "
            f"{window} as its context length; beyond it the answers are another model's"
        )
    share, tokenizer = contents.rows.with_bos, contents.tokenizer
    if share is not None and 0 < share < 1 and prefix_ids(tokenizer)[:1] == [tokenizer.bos_token_id]:
        rule = "is" if contents.adds_bos else "is not"
        found.append(
            f"{share:.0%} of the training rows begin with {tokenizer.bos_token}; a file has one rule for all "
            f"texts, and here it {rule} added"
        )
    beyond = sorted(token for token, i in tokenizer.get_vocab().items() if i >= merge.vocab_size)
    if beyond:
        found.append(
            f"The embedding has {merge.vocab_size} rows and none for {', '.join(beyond[:3])}"
            f"{f' and {len(beyond) - 3} more' if len(beyond) > 3 else ''}, which the file leaves out"
        )
    left = [i for i in contents.ends[len(_ENDS) :] if tokenizer.convert_ids_to_tokens(i) not in ENDS]
    if left:
        found.append(f"A file names {len(_ENDS)} ends of an answer; {', '.join(map(str, left))} are left out")
    return found


def write(
    merge: Merge,
    contents: Contents,
    path: Path,
    kind: str,
    log: Path,
    progress: Progress | None = None,
) -> None:
    """One file; weights are converted one at a time and spooled to disk by the writer.

    Args:
        log: takes what the library of the K-quants prints.

    Raises:
        ConfigError: a tensor that has no place in GGUF.
        CheckpointError: the library of the K-quants failed.
    """
    config = merge.base.config
    architecture = ARCHITECTURES[config.model_type]
    _, file_type = TYPES[kind]
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture], use_temp_file=True)
    _describe(writer, merge, contents, file_type)
    _add_vocabulary(writer, contents, merge.vocab_size)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    done = 0
    with KQuantizer(log, merge.base.device.type) as kquantizer:
        for _, reader, pieces in merge.by_shard():
            for piece in pieces:
                stem, _, suffix = piece.parameter.rpartition(".")
                name = names.get_name(stem)
                if name is None:
                    raise ConfigError(f"export.format=gguf: {piece.parameter} has no place in GGUF")
                name = f"{name}.{suffix}"
                value = _rotary_order(piece.parameter, merge.value(piece, reader).cpu(), config)
                chosen = _tensor_type(merge, piece, name, kind)
                if chosen in kquants.TYPES:
                    array = kquantizer.quantize(value, chosen)
                else:
                    array = gguf.quants.quantize(value.numpy(), chosen)
                writer.add_tensor(name, array, raw_dtype=chosen)
                done += value.numel() * merge.dtype.itemsize
                if progress is not None:
                    progress(done, merge.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensor_type(merge: Merge, piece: Piece, name: str, kind: str) -> GGMLQuantizationType:
    """How the tensor called `name` in GGUF is stored in a file of type `kind`."""
    if len(piece.shape) == 1:
        return GGMLQuantizationType.F32
    if kind in kquants.MIXES:
        layers = merge.base.config.num_hidden_layers
        return kquants.tensor_type(
            name, piece.shape[-1], kind, layers, bool(merge.base.tied) and not merge.untied
        )
    if piece.parameter in merge.base.embeddings and kind not in ("f16", "bf16"):
        return GGMLQuantizationType.Q8_0
    return TYPES[kind][0]


def _describe(writer: GGUFWriter, merge: Merge, contents: Contents, file_type: LlamaFileType) -> None:
    config = merge.base.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(redact.text(contents.name))
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, redact.text(contents.base))
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(merge.vocab_size)
    writer.add_context_length(_window(config) or config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10000.0)))


def _window(config: Any) -> int | None:
    """Tokens that a layer attends to at most, where that is less than all. Files have no field for it."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window is None or "sliding_attention" not in kinds or window >= config.max_position_embeddings:
        return None
    return int(window)


def _rotary_order(parameter: str, value: Tensor, config: Any) -> Tensor:
    """llama.cpp rotates neighbouring pairs where transformers rotates halves: per head, rows are interleaved.

    Qwen2's port of llama.cpp keeps transformers' order.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((n for layer, n in heads.items() if f".{layer}." in parameter), None)
    if count is None or ARCHITECTURES[config.model_type] != gguf.MODEL_ARCH.LLAMA:
        return value
    rest = value.shape[1:]
    return value.view(count, 2, -1, *rest).transpose(1, 2).reshape(value.shape).contiguous()


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], str]:
    """The tokenizer's JSON and llama.cpp's name for how it splits text.

    Raises:
        ConfigError: not a byte-level BPE, or one whose splitting has no name there.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    if model["model"]["type"] != "BPE" or model["model"].get("byte_fallback"):
        raise ConfigError(
            "export.format=gguf: only byte-level BPE tokenizers are supported, this one is "
            f"{model['model']['type']}{' with byte fallback' if model['model'].get('byte_fallback') else ''}"
        )
    text = json.dumps(model["pre_tokenizer"])
    for name, sign in _PRE:
        if sign in text:
            return model, name
    raise ConfigError("export.format=gguf: llama.cpp has no name for this tokenizer's pre-tokenizer")


def _add_vocabulary(writer: GGUFWriter, contents: Contents, size: int) -> None:
    tokenizer = contents.tokenizer
    model, pre = _vocabulary(tokenizer)
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    added = {token["id"]: token for token in model["added_tokens"]}
    names = {i: token for token, i in model["model"]["vocab"].items()}
    for i, token in (names | {i: token["content"] for i, token in added.items()}).items():
        if i < size:  # one that has no row in the embedding means nothing to the model
            tokens[i], types[i] = token, TokenType.NORMAL
            if i in added:
                types[i] = TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = model["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    special = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "unk", "pad")}
    special |= dict(zip(_ENDS, contents.ends, strict=False))
    for kind, token_id in special.items():
        if token_id is not None and token_id < size:
            getattr(writer, f"add_{kind}_token_id")(token_id)
    writer.add_add_bos_token(contents.adds_bos)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
