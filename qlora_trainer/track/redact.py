"""Keeps secrets out of everything a run writes: logs, metrics, checkpoints, cards, trackers.

In: text, or a tree of plain values. Out: the same with every secret replaced by `***`. Secrets are
the values of environment variables whose names say so, values under keys whose names say so, and
strings of the shapes that hubs, clouds and trackers give their tokens, wherever they appear.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

MASK = "***"
_SECRET_NAME = re.compile(
    r"(^|[_.-])(token|secret|passw(or)?d|passphrase|credentials?|authorization|api_?key|access_?key|"
    r"secret_?key|private_?key|auth_?key|key)$|(token|secret|password|api_?key)$",
    re.IGNORECASE,
)
# Names that end like a secret's and are none.
_PUBLIC_NAME = re.compile(r"(pad|bos|eos|unk|sep|cls|mask|stop|image)_token$", re.IGNORECASE)
_SHAPES = re.compile(
    r"hf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|sk-[A-Za-z0-9_-]{16,}"  # OpenAI and others
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
    r"|glpat-[A-Za-z0-9_-]{16,}"
    r"|AKIA[A-Z0-9]{16}"  # AWS key id
    r"|xox[abprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|wandb_v1_[A-Za-z0-9_]{20,}|local-[0-9a-f]{40}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"  # JWT
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password in a URL,
    r"|(?<=:/)(?!/)[^/\s:@]+:[^/\s@]+(?=@)"  # also where pathlib has taken one of its slashes away
    r"|(?<=://)[A-Za-z0-9_-]{16,}(?=@)"  # token in a URL
    r"|(?<=[?&]token=)[^&\s'\"]+|(?<=[?&]api_key=)[^&\s'\"]+|(?<=[?&]sig=)[^&\s'\"]+"
    r"|(?<=X-Amz-Signature=)[0-9a-f]+"
    r"|(?<=[Bb]earer )[A-Za-z0-9._~+/-]{8,}"
)
_SHORTEST = 8  # characters: masking a shorter value would eat ordinary words


class Redactor:
    """Masks secrets; made once, from the environment as it is at the start.

    Args:
        environment: name -> value; the values of secret names are masked wherever they appear.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        values = {
            value
            for name, value in environment.items()
            if is_secret_name(name) and len(value) >= _SHORTEST and not os.path.exists(value)
        }
        longest_first = sorted(values, key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, longest_first))) if values else None

    def text(self, text: str) -> str:
        """`text` with every secret masked."""
        if self._values is not None:
            text = self._values.sub(MASK, text)
        return _SHAPES.sub(MASK, text)

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
    return isinstance(key, str) and isinstance(item, str) and bool(item) and is_secret_name(key)
