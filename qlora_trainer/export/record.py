"""`verify.json`: what `verify` found, beside what it concerns. A quick look does not replace a fuller one.

The fullest result on the same files stands; a later one that measured less is its `latest`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_trainer.evaluate.fullest import LATEST, fullest, read_results
from qlora_trainer.system.disk import write_json
from qlora_trainer.system.terminal import to_stderr

RESULT = "verify.json"
SIZE = ("rows", "questions", "max_new_tokens")  # of a result: how much was measured


def store(path: Path, found: Mapping[str, Any]) -> bool:
    """Writes `found` to `path`; False if an earlier and fuller result stays, with `found` beside it."""
    earlier = read_results(path, to_stderr)
    if _files(earlier) != _files(found):
        earlier = {}
    kept = fullest(earlier, found, same=("adapter",), size=SIZE)
    write_json(path, kept)
    return LATEST not in kept


def _files(found: Mapping[str, Any]) -> list[Any]:
    """Name and digests of each model that a result is about."""
    models = found.get("models")
    if not isinstance(models, list):
        return []
    return [(each.get("model"), each.get("sha256")) for each in models if isinstance(each, dict)]
