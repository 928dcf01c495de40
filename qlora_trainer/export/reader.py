"""How an export's own files turn text into token ids, and which tokens end an answer.

In: a folder as a client gets it. Out: a `Reader`. A folder for transformers is read by transformers; a GGUF
file by what llama.cpp does with its fields (`GgufReader`), for transformers reads neither its splitting of
text nor its BOS. Text is what a client sends, so `verify` sends text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

Conversation = Sequence[dict[str, str]]

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CASELESS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
# What each name in `tokenizer.ggml.pre` stands for, one expression after the other (llama-vocab.cpp).
SPLITS = {
    "gpt-2": (_WORDS,),
    "smollm": (r"\p{N}", _WORDS),
    "llama-bpe": (_CASELESS % r"\p{N}{1,3}",),
    "qwen2": (_CASELESS % r"\p{N}",),
}
# Tokens at which llama.cpp ends an answer whatever the file says (llama-vocab.cpp).
ENDS = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>"}
)


class Reader(Protocol):
    """What `verify` asks of an export's tokenizer."""

    tokenizer: PreTrainedTokenizerBase

    def encode(self, text: str, prefixed: bool) -> list[int]:
        """Ids of a plain text; `prefixed`: the client lets the tokenizer put BOS before it."""

    def prompt(self, conversation: Conversation) -> list[int] | None:
        """Ids of a conversation up to the answer; None without a template."""

    def stops(self) -> list[int] | None:
        """Ids that end an answer, where the files say."""


class FolderReader:
    """A folder as transformers, vLLM and SGLang read it."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.folder = folder
        self.tokenizer: PreTrainedTokenizerBase = tokenizer or AutoTokenizer.from_pretrained(folder)

    def encode(self, text: str, prefixed: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=prefixed))

    def prompt(self, conversation: Conversation) -> list[int] | None:
        text = _rendered(self.tokenizer, conversation, self.tokenizer.chat_template)
        return None if text is None else self.encode(text, prefixed=False)

    def stops(self) -> list[int] | None:
        if not (self.folder / "generation_config.json").is_file():
            return None
        stored = GenerationConfig.from_pretrained(self.folder).eos_token_id
        return stored if isinstance(stored, list) or stored is None else [stored]


class GgufReader:
    """A GGUF file with a byte-level BPE vocabulary as llama.cpp reads it, special tokens in text included."""

    def __init__(self, path: Path) -> None:
        self.fields = gguf.GGUFReader(path).fields
        tokens = self._of("tokens")
        vocabulary = {token: i for i, token in enumerate(tokens)}
        merges = [tuple(merge.split(" ")) for merge in self._of("merges") or []]  # an empty list has no field
        pre = self._of("pre")
        self._bpe = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        added = {gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED}
        kinds = zip(tokens, self._of("token_type"), strict=True)
        self._bpe.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind in added])
        self._ends = {i for token, i in vocabulary.items() if token in ENDS}
        self.adds_bos = bool(self._of("add_bos_token"))
        self.bos: int | None = self._of("bos_token_id")
        self._bos_text = tokens[self.bos] if self.bos is not None else ""
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path.parent)

    def encode(self, text: str, prefixed: bool) -> list[int]:
        """As llama.cpp's server: the file says whether BOS is added, and the text's own then goes."""
        if not self.adds_bos or self.bos is None:
            return list(self._bpe.encode(text).ids)
        return [self.bos, *self._bpe.encode(text.removeprefix(self._bos_text)).ids]

    def prompt(self, conversation: Conversation) -> list[int] | None:
        text = _rendered(self.tokenizer, conversation, self._of("chat_template", "tokenizer"))
        return None if text is None else self.encode(text, prefixed=False)

    def stops(self) -> list[int]:
        named = {self._of(f"{kind}_token_id") for kind in ("eos", "eot", "eom")}
        return sorted((named | self._ends) - {None})

    def _of(self, name: str, group: str = "tokenizer.ggml") -> Any:
        field = self.fields.get(f"{group}.{name}")
        return None if field is None else field.contents()


def reader_of(folder: Path) -> Reader:
    """The reader for what lies in `folder`."""
    files = list(folder.glob("*.gguf"))
    return GgufReader(files[0]) if files else FolderReader(folder)


def _rendered(tokenizer: Any, conversation: Conversation, template: str | None) -> str | None:
    if not template:
        return None
    return str(
        tokenizer.apply_chat_template(
            list(conversation), chat_template=template, add_generation_prompt=True, tokenize=False
        )
    )
