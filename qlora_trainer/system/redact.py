"""Keeps secrets out of all text that leaves the process: the terminal, every file of a run, trackers, caches.

In: text, or a tree of plain values. Out: the same with every secret replaced by `***`. Secrets are

    the value of an environment variable whose name says so (HF_TOKEN, DB_PASS, AZURE_CONNECTION_STRING),
    the user, password and query credentials of a URL, in the environment or in the text itself,
    a value under a key, or behind a `name=`, whose name says so,
    strings of the shapes that hubs, clouds and trackers give their tokens.

A path is text: one that holds a secret is masked wherever it is written, also where it is needed again
(`config.yaml`, `training.json`, `adapter_config.json`). Training and resuming take it from the command line
and do not notice. A command that finds a masked path in a file says so and asks for it (`require_whole`):
the alternative is a secret in every adapter that is passed on.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast
from urllib.parse import unquote

from qlora_trainer.errors import ConfigError

MASK = "***"
_SECRET_NAME = re.compile(
    r"(^|[_.-])(token|secret|pass(w(or)?d|phrase|code)?|pwd|pw|pat|credentials?|auth|authorization|cookie|dsn"
    r"|conn(ection)?_?str(ing)?|(api|access|account|secret|shared|private|signing|encryption)_?(access_?)?key|key)"
    r"((_json|_b64|_base64)|_?\d+)?$"
    r"|(token|secret|password|api_?key|access_?key|account_?key|connectionstring|signature)$",
    re.IGNORECASE,
)
# Names that end like a secret's and are none.
_PUBLIC_NAME = re.compile(r"(pad|bos|eos|unk|sep|cls|mask|stop|image)_token$|^(old)?pwd$", re.IGNORECASE)
# A key may be anything (`sort_key=length`): a plain word under such a name is no secret.
_ANY_KEY = re.compile(r"(?<!api)(?<!access)(?<!account)(?<!secret)(?<!shared)(?<!private)[_.-]?key$", re.I)
_WORD = re.compile(r"[a-z]+|[A-Z]+|[A-Z][a-z]+")
_SHORTEST = 8  # characters: masking a shorter value would eat ordinary words

# What begins in the middle of a word is none of these: task-specific-… holds no key of OpenAI's.
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{30,}"  # Hugging Face
    # OpenAI and others: mixed characters, or a long run of them, and always digits
    r"|sk-(?!learn)(?=[A-Za-z_-]{0,99}[0-9])(?:(?=[a-z0-9_-]{0,99}[A-Z])|(?=[\w-]{0,20}?\w{16}))[\w-]{16,}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
    r"|glpat-[A-Za-z0-9_-]{16,}"
    r"|A[KS]IA[A-Z0-9]{16}"  # AWS key id
    r"|xox[abprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|wandb_v1_[A-Za-z0-9_]{20,}|local-[0-9a-f]{40}"
    r"|(?<![_-])eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"  # JWT
    r")"
    r"|-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----[^-]*(?:-----END [A-Z ]{0,20}PRIVATE KEY-----)?"
)
# The user and password of a URL, also where pathlib has taken one of its slashes away.
_USERINFO = re.compile(r"(://|\b(?:https?|ftp|s3|gs|git|ssh):/)(?!/)([^/\s?#'\"<>]+)@")
_BEARER = re.compile(r"\b((?:bearer|basic) +)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_NOT_IN_VALUE = r"\s&;,'\"()\[\]{}<>"
_ASSIGNED = re.compile(
    rf"(?<![\w.-])([\w.-]{{2,60}})=(\"[^\"]*\"|'[^']*'|[^{_NOT_IN_VALUE}]*[^{_NOT_IN_VALUE}:.])"
)
_IN_QUERY = re.compile(r"([?&;](?:sig|key|x-amz-signature|x-goog-signature)=)[^&\s'\"#]+", re.IGNORECASE)


class Redactor:
    """Masks secrets; made once, from the environment as it is at the start.

    Args:
        environment: name -> value; what is secret in it is masked wherever it appears.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        longest_first = sorted(set(_secrets_of(environment)), key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def text(self, text: str) -> str:
        """`text` with every secret masked."""
        if self._values is not None:
            text = self._values.sub(MASK, text)
        text = _SHAPES.sub(MASK, text)
        if "@" in text:
            text = _USERINFO.sub(rf"\1{MASK}@", text)
        if "=" in text:
            text = _IN_QUERY.sub(rf"\1{MASK}", _ASSIGNED.sub(_without_value, text))
        return _BEARER.sub(rf"\1{MASK}", text)

    def tree(self, value: Any) -> Any:
        """A copy of nested dictionaries, lists and plain values with every secret masked."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {
                self.tree(key): MASK if _hides(key, item) else self.tree(item) for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.tree(item) for item in value]
        return value


def text(text: str) -> str:
    """`text` with every secret masked that the environment now knows."""
    return Redactor().text(text)


def tree(value: Any) -> Any:
    """A copy of nested plain values with every secret masked that the environment now knows."""
    return Redactor().tree(value)


def require_whole(path: str, key: str) -> str:
    """`path` unchanged, unless it is what a file has of a path that held a secret.

    Raises:
        ConfigError: it is masked; `key` is to be given.
    """
    if MASK in path:
        raise ConfigError(
            f"{key}: {path} held a secret, which no file keeps; give the whole path again as {key}=PATH"
        )
    return path


class MaskedStream:
    """A text stream that masks secrets in all that is written through it; else the stream itself."""

    def __init__(self, stream: TextIO, redactor: Redactor) -> None:
        self._stream, self._redactor = stream, redactor

    def write(self, text: str) -> int:
        self._stream.write(self._redactor.text(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def masked_output() -> Iterator[None]:
    """Masks secrets in whatever Python prints inside, tracebacks and libraries' messages included."""
    redactor = Redactor()
    out, err = (cast(TextIO, MaskedStream(stream, redactor)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        yield


def is_secret_name(name: str) -> bool:
    """Whether a variable or key of this name holds a secret."""
    return bool(_SECRET_NAME.search(name)) and not _PUBLIC_NAME.search(name)


def _hides(key: Any, item: Any) -> bool:
    return isinstance(key, str) and isinstance(item, str) and bool(item) and _is_secret(key, item)


def _is_secret(name: str, value: str) -> bool:
    return is_secret_name(name) and not (_ANY_KEY.search(name) and _WORD.fullmatch(value))


def _without_value(found: re.Match[str]) -> str:
    name, value = found.groups()
    return f"{name}={MASK}" if _is_secret(name, value.strip("'\"")) else found[0]


def _secrets_of(environment: Mapping[str, str]) -> Iterator[str]:
    """What to look for in text, from the environment: whole values, and the credentials within values."""
    for name, value in environment.items():
        parts = [found[2] for found in _USERINFO.finditer(value)]
        parts = [user.partition(":")[2] or user * (len(user) >= 16) for user in parts]  # not git@host
        parts += [found[2] for found in _ASSIGNED.finditer(value) if _is_secret(found[1], found[2])]
        if _is_secret(name, value) and not os.path.exists(value):
            # Of a key of many lines each line: what quotes one may quote it alone.
            parts += [value, *(line for line in value.split("\n") if not line.startswith("-----"))]
        for part in parts:
            yield from (form for form in {part, unquote(part)} if len(form) >= _SHORTEST)
