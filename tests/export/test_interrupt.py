"""Ctrl-C, typed into a terminal, in the middle of a quantization."""

import fcntl
import json
import os
import pty
import re
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import psutil

from tests.export import runs

WITHIN = 180  # seconds: a start takes ten on an idle machine
# A library that behaves as GPTQModel does on first use (temporary files, a folder of logs where it runs, a
# compiler as a child), and then takes its time.
LIBRARY = """
import subprocess, sys, tempfile, time
from pathlib import Path

class BACKEND:
    AUTO = AWQ_TORCH = None

class QuantizeConfig:
    def __init__(self, **options):
        pass

class GPTQModel:
    @staticmethod
    def load(*arguments, **options):
        tempfile.mkdtemp()
        Path("logs").mkdir()
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        print("in the middle", flush=True)
        time.sleep(1000)
"""


def library(folder: Path) -> Path:
    for name, text in {
        "gptqmodel/__init__.py": LIBRARY,
        "gptqmodel/quantization/__init__.py": "",
        "gptqmodel/quantization/config.py": "RTNConfig = None",
        "gptqmodel-7.6.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: gptqmodel\nVersion: 7.6.0\n",
        "optimum/__init__.py": "",
        "optimum-2.3.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: optimum\nVersion: 2.3.0\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_ctrl_c_ends_the_quantizer_and_all_it_started_and_leaves_nothing(tmp_path):
    run = runs.make(tmp_path)
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(20)]))
    config = f"data: {{path: {rows}, cache_dir: {tmp_path / 'cache'}}}\ntrain: {{max_length: 64}}\n"
    (run.adapter.parent / "config.yaml").write_text(f"model: {{model_name_or_path: {run.base}}}\n{config}")
    root, here, temporary = run.adapter.parent / "exports", tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    checkout = Path(__file__).parents[2]
    path = [library(tmp_path / "library"), checkout, os.environ.get("PYTHONPATH", "")]
    outside, terminal = pty.openpty()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "qlora_trainer", "export", f"run={run.adapter.parent}", "format=gptq"),
            *("export.group_size=32", "export.calibration_samples=2", "export.calibration_length=16"),
        ],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        cwd=here,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "TMPDIR": str(temporary)},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # keys typed there become signals
    )
    os.close(terminal)
    said = bytearray()
    reader = threading.Thread(target=read, args=(outside, said))
    reader.start()
    log = root / "gptq.log"
    deadline = time.monotonic() + WITHIN
    while not (log.is_file() and "in the middle" in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, said.decode()
        time.sleep(0.1)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) == 2
    os.write(outside, b"\x03")
    assert process.wait(WITHIN) == 130
    reader.join()
    os.close(outside)
    _, alive = psutil.wait_procs(started, timeout=WITHIN)
    assert not alive
    lines = [line.strip() for line in re.split(r"\x1b\[[0-9;?]*[a-zA-Z]|[\r\n]", said.decode())]
    assert [line for line in lines if line and "━" not in line][-1] == "error: interrupted"
    assert "Traceback" not in said.decode()
    assert [path.name for path in root.iterdir()] == [".lock"]
    assert list(here.iterdir()) == [] and list(temporary.iterdir()) == []


def read(terminal: int, said: bytearray) -> None:
    while True:
        try:
            said += os.read(terminal, 4096)
        except OSError:  # Linux says so when the last process has closed its end
            return
