from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from qlora_trainer.__main__ import main
from qlora_trainer.system.streams import LastingStream, lasting_output
from tests import tiny


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


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "2 rows ... \\xfc 3x4 \\U0001f642 # \\udcff"),
        ("latin-1", "2 rows ... ü 3×4 \\U0001f642 # \\udcff"),
        ("utf-8", "2 rows … ü 3×4 🙂 █ \\udcff"),
    ],
)
def test_whatever_a_terminal_cannot_show_is_spelt(
    encoding: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, buffer in buffers.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(buffer, encoding=encoding))
    with lasting_output():
        for stream in (sys.stdout, sys.stderr):
            print("2 rows … ü 3×4 🙂 █ \udcff", file=stream, flush=True)
    for buffer in buffers.values():
        assert buffer.getvalue().decode(encoding) == expected + "\n"


def test_a_command_tells_an_ascii_terminal_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`inspect` of rows with what no ASCII terminal has: boxes, bars, an emoji, a path."""
    tiny.save(tmp_path / "base")
    rows = [
        {
            "messages": [
                {"role": "user", "content": "날씨 🙂?"},
                {"role": "assistant", "content": f"맑아요 {n}…"},
            ]
        }
        for n in range(3)
    ]
    data = tmp_path / "d\u00e9j\u00e0 🙂.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    line = [f"model.model_name_or_path={tmp_path / 'base'}", f"data.path={data}", "recipe=tiny"]
    line += [f"output_dir={tmp_path / 'out'}", f"data.cache_dir={tmp_path / 'cache'}", "train.max_length=128"]
    assert main(["inspect", *line]) == 0
    sys.stdout.flush()
    shown = out.getvalue().decode("ascii")
    assert "\\U0001f642" in shown and "3 read, 3 kept" in shown and "####" in shown
