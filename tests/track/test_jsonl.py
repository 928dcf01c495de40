"""metrics.jsonl: a line that is no record costs itself and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_trainer.track.jsonl import JsonlTracker, read

GOOD = [
    b'{"step": 1, "loss": 0.1}\n',
    b'{"step": 2, "note": "a\xe2\x80\xa8b"}\n',
    b'{"step": 3, "loss": "nan"}\n',
]
NO_RECORDS = [
    b'{"step": 2, "lo\n',
    b"null\n",
    b"7\n",
    b'{"loss": 1}\n',
    b'{"step": true}\n',
    b'{"step": "2"}\n',
]
NO_RECORDS += [b"\xff\xfe\n", b"\0\0\0\0\n", b"\n", b"[" * 100_000 + b"\n"]


@pytest.mark.parametrize("bad", NO_RECORDS, ids=range(len(NO_RECORDS)))
@pytest.mark.parametrize("place", [0, 1, 3])
def test_good_lines_stay_byte_for_byte_and_bad_ones_are_put_aside(
    tmp_path: Path, bad: bytes, place: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join([*GOOD[:place], bad, *GOOD[place:]]))
    assert [record["step"] for record in read(path)] == [1, 2, 3]
    tracker = JsonlTracker(path, resume_step=2)
    tracker.log({"step": 3, "loss": float("inf")})
    tracker.close()
    assert tracker.bad == 1 and (tmp_path / "metrics.jsonl.bad").read_bytes() == bad
    assert path.read_bytes() == GOOD[0] + GOOD[1] + b'{"step": 3, "loss": "inf"}\n'
    again = JsonlTracker(path, resume_step=3)
    again.close()
    assert again.bad == 0 and (tmp_path / "metrics.jsonl.bad").read_bytes() == bad


def test_the_line_that_a_kill_cut_is_made_again_and_not_called_bad(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD[0] + GOOD[1] + b'{"step": 3, "lo')
    tracker = JsonlTracker(path, resume_step=2)
    tracker.close()
    assert tracker.bad == 0 and path.read_bytes() == GOOD[0] + GOOD[1]
    assert not (tmp_path / "metrics.jsonl.bad").exists()


def test_a_start_from_nothing_begins_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(GOOD))
    JsonlTracker(path).close()
    assert path.read_bytes() == b""
