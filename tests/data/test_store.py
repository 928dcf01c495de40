"""What the store writes while rows are tokenized: whole, or not at all and one line."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qlora_trainer.data import TokenizedData, build
from qlora_trainer.errors import CheckpointError


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow over so many bytes, as on a disk that has become full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1500], ids=["nothing fits", "the tokens do not fit"])
def test_a_cache_that_finds_no_room_is_named_and_leaves_no_rubbish(
    load: Callable[..., TokenizedData],
    rows_file: Path,
    tmp_path: Path,
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was `[Errno 28] No space left on device`, and the half of it stayed where there was no room."""
    original = build._build

    def limited(*arguments: object) -> None:
        with largest_file(size):
            original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(build, "_build", limited)
    with pytest.raises(
        CheckpointError, match=rf"cannot write {tmp_path}/cache/.*: File too large"
    ) as refused:
        load(rows_file)
    assert refused.value.exit_code == 74 and "ulimit -f" in str(refused.value)
    assert not [name for name in os.listdir(tmp_path / "cache") if name.startswith(".building-")]
    monkeypatch.undo()
    assert len(load(rows_file)) > 0
