"""Kills a save at its real system calls, with strace's fault injection.

The process to be killed is forked, waits until strace is attached, and then saves; so calls are
counted from the beginning of the save and are the same in every run.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path

from tests.faults import killing

# What changes a disk or a name on it, and what is called around that.
CALLS = (
    "openat,close,write,pwrite64,fsync,fdatasync,ftruncate,rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,"
    "rmdir,chmod,fchmod,fchmodat,statfs,fcntl,flock,lseek,getdents64,newfstatat,readlink"
)


def available() -> bool:
    return shutil.which("strace") is not None


def points(run: Path) -> list[tuple[str, int]]:
    """Every system call of `killing.act` in a prepared run folder: its name, and which of that name."""
    log = run.parent / "strace.txt"
    pid, go = _waiting(run)
    _attach(pid, go, "-e", f"trace={CALLS}", "-o", str(log))
    os.waitpid(pid, 0)
    names = re.findall(r"^(\w+)\(", log.read_text(), flags=re.MULTILINE)
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append((name, seen[name]))
    return found


def die_at(run: Path, call: str, number: int) -> bool:
    """Kills `killing.act` at one of its system calls; whether it was killed."""
    pid, go = _waiting(run)
    inject = f"inject={call}:signal=KILL:when={number}"
    _attach(pid, go, "-e", f"trace={call}", "-e", inject, "-o", os.devnull)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _waiting(run: Path) -> tuple[int, int]:
    waiting, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go)
        os.read(waiting, 1)
        killing.act(run)
        os._exit(0)
    os.close(waiting)
    return pid, go


def _attach(pid: int, go: int, *options: str) -> None:
    """Lets the process go once strace has it, and returns when strace has ended."""
    strace = subprocess.Popen(["strace", "-p", str(pid), *options], stderr=subprocess.PIPE, text=True)
    assert strace.stderr is not None
    line = strace.stderr.readline()
    if "attached" not in line:
        os.kill(pid, signal.SIGKILL)
        raise RuntimeError(f"strace: {line}")
    os.write(go, b"!")
    os.close(go)
    strace.communicate()
