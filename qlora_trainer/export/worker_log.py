"""What a child process last said, for the one line of its failure."""

from __future__ import annotations

from pathlib import Path


def last_line(log: Path, code: int) -> str:
    """The last line that is not blank, cut to 300 characters; the exit status where it said nothing."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else f"exit {code}"
