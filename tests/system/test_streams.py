from __future__ import annotations

import io
import os
from contextlib import redirect_stderr, redirect_stdout

import pytest

from qlora_trainer.__main__ import main
from qlora_trainer.system.streams import LastingStream


def test_what_a_reader_takes_is_what_was_written() -> None:
    inner = io.StringIO()
    stream = LastingStream(inner, needed=True)
    stream.writelines(["a", "b"])
    stream.flush()
    assert inner.getvalue() == "ab" and stream.getvalue() == "ab" and not stream.isatty()


@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize("buffering", [1, -1])  # by lines, and only when it is flushed
def test_a_reader_that_has_gone_is_no_error_then_or_later(needed: bool, buffering: int) -> None:
    read, write = os.pipe()
    with open(write, "w", buffering=buffering) as inner:
        stream = LastingStream(inner, needed)
        assert stream.write("heard\n") == 6
        stream.flush()
        assert os.read(read, 100) == b"heard\n"
        os.close(read)
        for _ in range(2):
            assert stream.write("unheard\n") == 8
            stream.flush()
    # and closing it, with whatever was left in its buffer, has raised nothing


def test_a_disk_that_refuses_results_is_an_error_and_one_that_refuses_a_log_is_not() -> None:
    with open("/dev/full", "w", buffering=1) as full:
        LastingStream(full, needed=False).write("step 1\n")
    with open("/dev/full", "w") as full:
        stream = LastingStream(full, needed=True)
        stream.write("results\n")
        with pytest.raises(OSError, match="No space left"):
            stream.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


def test_a_command_whose_results_find_no_room_is_exit_74() -> None:
    said = io.StringIO()
    with open("/dev/full", "w") as full, redirect_stdout(full), redirect_stderr(said):
        assert main(["recipes"]) == 74
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert said.getvalue().startswith("error: the system refused: No space left on device; make room")


def test_a_log_that_finds_no_room_changes_no_exit_code() -> None:
    with open("/dev/full", "w", buffering=1) as full, redirect_stderr(full), redirect_stdout(io.StringIO()):
        assert main(["recipes", "lora.rr=1"]) == 2
