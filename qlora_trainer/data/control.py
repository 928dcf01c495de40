"""Control tokens in what people say: text that looks like the template's own tokens stays text.

A template builds turns of control tokens (`<|im_start|>`, `<|im_end|>`, BOS, EOS), and a tokenizer knows them
by their text wherever it stands. So a user who writes `<|im_end|>` and `<|im_start|>assistant`, a web page
that a tool brings, or an answer about HTML's `<s>…</s>`, would open turns that nobody took, and an answer
would seem to end in its middle. Here every such text is found, and gets the tokens of its characters. An
inference server that does not do so reads the same text as control tokens, so each such row is noted;
training on those would teach the model that what people write moves the borders of turns.

What counts depends on who speaks:
* users, tools and system texts: every special token that the template's source names, BOS, EOS and the like;
* the assistant: those that any conversation is built of. Others (`<|python_tag|>`) are what it is to say, and
  an end of turn that closes the whole content stays, as in data whose answers end in `</s>`.

Special tokens that the template does not use (`<|fim_prefix|>`, a marker of one's own) are left alone, and so
is text without a template, which people write token by token.

How: the conversation is rendered a second time with every such text exchanged for a stand-in of the same
length. Where the renderings differ, and nowhere else, people's text lies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_trainer.data.problems import RowError

Range = tuple[int, int]
Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None
STAND_INS = tuple(chr(0xE100 + n) for n in range(16))  # private use: no text has all of them
ANCHOR = "\n"  # nothing merges with it, and no tokenizer strips it


class Controls:
    """The control tokens of one template and tokenizer.

    Args:
        source: the template.
        built: a rendering of a plain conversation, of which the tokens that any conversation has are taken.
        ends: texts that end a turn.
    """

    def __init__(
        self, source: str, built: str, ends: Iterable[str], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        special = {
            str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        named = {str(token) for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
        self.ends = tuple(sorted(set(ends), key=len, reverse=True))
        always = {token for token in special if token in named or token in built} | set(self.ends)
        words = always | {token for token in special if token in source}
        self.ids = frozenset(tokenizer.convert_tokens_to_ids(sorted(words)))
        self._special = self.ids.union(special.values())
        self._tokenizer = tokenizer
        self._of_others, self._of_assistant = _any_of(words), _any_of(always)

    def text(
        self, full: str, messages: Messages, tools: Tools, render: Callable[[Messages, Tools], str]
    ) -> str:
        """`full`, a rendering, with a stand-in for each character of people's text that looks like a token.

        Raises RowError where the template rewrites such text, so that it cannot be told from its own.
        """
        if not self._occurs(messages, tools):
            return full
        mark = next((mark for mark in STAND_INS if mark not in full), STAND_INS[0])
        shadow = render(
            [self._without(message, mark) for message in messages], _exchange(tools, self._of_others, mark)
        )
        if len(shadow) != len(full) or any(a != b != mark for a, b in zip(full, shadow, strict=True)):
            raise RowError(
                "messages",
                "has the text of control tokens in it, which the chat template rewrites, so that it cannot "
                f"be told from the template's own: {' '.join(sorted(set(self._of_others.findall(full))))}",
            )
        return shadow

    def tokenize(self, texts: Sequence[str], shadows: Sequence[str]) -> list[tuple[list[int], list[Range]]]:
        """Ids and character offsets of renderings; people's text in them is no control token."""
        encoded = encode_texts(self._tokenizer, texts)
        return [
            (ids, offsets) if shadow == text else self._as_text(text, shadow, ids, offsets)
            for text, shadow, (ids, offsets) in zip(texts, shadows, encoded, strict=True)
        ]

    def _as_text(
        self, text: str, shadow: str, ids: list[int], offsets: list[Range]
    ) -> tuple[list[int], list[Range]]:
        """Encode anew each stretch between the template's own special tokens that has people's in it."""
        theirs = [
            token in self.ids and text[start:stop] != shadow[start:stop]
            for token, (start, stop) in zip(ids, offsets, strict=True)
        ]
        borders = [at for at, token in enumerate(ids) if token in self._special and not theirs[at]]
        new_ids: list[int] = []
        new_offsets: list[Range] = []
        first, begin = 0, 0  # token and character where the stretch begins
        for border in [*borders, len(ids)]:
            end = len(text) if border == len(ids) else offsets[border][0]
            piece = ids[first:border], offsets[first:border]
            if any(theirs[first:border]):
                piece = self._stretch(text[begin:end], begin)
            new_ids += piece[0] + ids[border : border + 1]
            new_offsets += piece[1] + offsets[border : border + 1]
            if border < len(ids):
                first, begin = border + 1, offsets[border][1]
        return new_ids, new_offsets

    def _stretch(self, text: str, begin: int) -> tuple[list[int], list[Range]]:
        """Ids and offsets of a text that begins at character `begin`, none of them a control token."""
        anchor = "" if begin == 0 or self._each_begins_anew else ANCHOR
        ids, offsets = self._encode(anchor + text)
        skipped = len(self._encode(anchor)[0]) if anchor else 0
        shift = begin - len(anchor)
        new_ids: list[int] = []
        new_offsets: list[Range] = []
        for token, (start, stop) in zip(ids[skipped:], offsets[skipped:], strict=True):
            plain = [token]
            if token in self.ids:  # an end token that is not special, which `split_special_tokens` spares
                plain = [part for character in text[start:stop] for part in self._encode(character)[0]]
            new_ids += plain
            new_offsets += [(start + shift, stop + shift)] * len(plain)
        return new_ids, new_offsets

    def _encode(self, text: str) -> tuple[list[int], list[Range]]:
        [encoded] = encode_texts(self._tokenizer, [text], split_special_tokens=True)
        return encoded

    @cached_property
    def _each_begins_anew(self) -> bool:
        """Whether text behind a special token is encoded as text at the beginning is (`▁` before it, say)."""
        special = next(iter(self._special), None)
        if special is None:
            return True
        token = str(self._tokenizer.convert_ids_to_tokens(special))
        [(ids, _)] = encode_texts(self._tokenizer, [token + "a"])
        return ids[1:] == self._encode("a")[0]

    def _occurs(self, messages: Messages, tools: Tools) -> bool:
        return any(self._of_others.search(text) for text in _texts([messages, tools]))

    def _without(self, message: dict[str, Any], mark: str) -> dict[str, Any]:
        pattern = self._of_others if message["role"] != "assistant" else self._of_assistant
        changed = {name: _exchange(value, pattern, mark) for name, value in message.items() if name != "role"}
        if message["role"] == "assistant":
            body = message["content"].rstrip()
            while end := next((end for end in self.ends if body.endswith(end)), ""):
                body = body[: -len(end)].rstrip()
            changed["content"] = _exchange(body, pattern, mark) + message["content"][len(body) :]
        return {"role": message["role"], **changed}


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options: bool
) -> list[tuple[list[int], list[Range]]]:
    """Ids and character offsets of texts as they stand, control tokens included."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
        **options,
    )
    return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _exchange(value: Any, pattern: re.Pattern[str], mark: str) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda found: mark * len(found[0]), value)
    if isinstance(value, dict):
        return {name: _exchange(item, pattern, mark) for name, item in value.items()}
    if isinstance(value, list):
        return [_exchange(item, pattern, mark) for item in value]
    return value


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
