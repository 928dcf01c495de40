"""GPTQ, AWQ and RTN through GPTQModel, in a process of its own.

In: a merged 16-bit model folder, calibration sequences and `QuantizeOptions`. Out: a folder in the
classic `gptq` or `awq` layout that transformers, vLLM and SGLang read.

Why GPTQModel and not llm-compressor: it writes the two layouts that PEFT can also train on, quantizes
OPT with either method, and does 3 bits and RTN too; llm-compressor's own layout cannot be trained on
as it is, has no AWQ for OPT, and packs 4 and 8 bits only. Its price: on small models llm-compressor's
asymmetric GPTQ measured better at the same size (KL 0.091 against 0.159 at 4 bits, groups of 64).

The library starts thread pools, sets environment variables and replaces functions when imported; a
process of its own keeps that out of ours, gives the memory back, and can be stopped at any moment.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from qlora_trainer.errors import CheckpointError, ConfigError
from qlora_trainer.export.worker_log import last_line

METHODS = ("gptq", "awq", "rtn")
BITS = {"gptq": (3, 4, 8), "awq": (4,), "rtn": (3, 4, 8)}
OFFERED_GROUPS = (32, 64, 128, 256)


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantize.

    Attributes:
        group_size: weights of a row that share a scale; -1 for whole rows.
        sym: symmetric around zero; without it each group has a zero point.
        desc_act: GPTQ takes columns with the largest activations first.
    """

    method: str
    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False

    @property
    def in_words(self) -> str:
        groups = "whole rows" if self.group_size == -1 else f"groups of {self.group_size}"
        zero = "symmetric" if self.sym else "asymmetric"
        return f"{self.method.upper()}, {self.bits} bits, {groups}, {zero}" + ", desc_act" * self.desc_act

    @property
    def gpu_kernel(self) -> tuple[str, str]:
        """(class of transformers, kernel of GPTQModel) that suit any width on a GPU and need no compiler.

        Left to itself GPTQModel 7.6 takes Machete on an H100 whatever the widths are, and SmolLM2's 192 are
        refused for not being a multiple of 128; its next choice, Marlin, compiles for minutes on first use.
        """
        if self.method == "awq":
            return "AwqConfig", "gemm_triton"
        # Triton's kernel unpacks whole fractions of 32
        return "GPTQConfig", "gptq_torch" if self.bits == 3 else "gptq_triton"

    def check(self, linears: Mapping[str, tuple[int, ...]]) -> None:
        """Refuses what the library cannot do, before it has worked for an hour.

        Args:
            linears: weight -> [out, in] of the layers to quantize.

        Raises:
            ConfigError: bits, a group size that does not divide a layer, or the library missing.
        """
        if self.bits not in BITS[self.method]:
            can = ", ".join(map(str, BITS[self.method]))
            raise ConfigError(f"export.bits={self.bits}: {self.method} is done with {can} bits")
        for name, (_, width) in linears.items():
            if self.group_size != -1 and (self.group_size < 1 or width % self.group_size):
                groups = [g for g in OFFERED_GROUPS if all(w % g == 0 for _, w in linears.values())]
                raise ConfigError(
                    f"export.group_size={self.group_size} does not divide {name}, whose rows have {width} "
                    f"weights; {', '.join(map(str, groups))}{' or ' if groups else ''}-1 (whole rows) would"
                )
        narrow = [name for name, shape in linears.items() if shape[0] % 32 or shape[1] % 32]
        if narrow:
            raise ConfigError(
                f"export.format={self.method}: {narrow[0]} is {list(linears[narrow[0]])}; "
                "packing needs multiples of 32 on both sides"
            )
        require_library()


def require_library() -> None:
    """Raises ConfigError with the command to run where GPTQModel is not installed."""
    missing = [name for name in ("gptqmodel", "optimum") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"GPTQ, AWQ and RTN need {' and '.join(missing)}: pip install 'qlora_trainer[quantize]'"
        )


# For glibc, whose heaps, one a thread, give freed tensors back to the system and ask for them again. One heap
# that keeps them: AWQ of SmolLM2 in 372 s and 1.65 GB instead of 742 and 0.99 (2 cores, 2026-11-22).
ONE_HEAP = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(512 << 20),
}


def quantize(
    source: Path,
    target: Path,
    options: QuantizeOptions,
    calibration: Sequence[Sequence[int]],
    layers: int,
    device: str,
    log: Path,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Quantizes the model in `source` into the new folder `target`.

    Args:
        calibration: token ids; ignored by rtn.
        layers: decoder layers of the model, for the progress.
        device: cpu | cuda.
        log: takes all that the library prints.
        progress: called with (layers done, layers).

    Raises:
        CheckpointError: the library failed; its last line and where the log is.
    """
    request = {
        "source": str(source.absolute()),
        "target": str(target.absolute()),
        "calibration": [list(row) for row in calibration] if options.method != "rtn" else [],
        "device": device,
        **asdict(options),
    }
    target.mkdir()
    # GPTQModel's pools need two workers; PASSIVE keeps its idle threads from eating a shared CPU. It moves
    # finished layers to temporary files: with the rest of the export, so that they go when it goes.
    environment = {"GPTQMODEL_CPU_WORKERS": "2", "OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    if device == "cpu":
        environment = ONE_HEAP | environment
    environment["TMPDIR"] = str(target.absolute())
    read, write = os.pipe()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "qlora_trainer.export.quantize_worker", str(write)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(write,),
            start_new_session=True,
        )
        os.close(write)
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has died already: its code and log say of what
                process.stdin.write(json.dumps(request).encode())
                process.stdin.close()
            with os.fdopen(read) as reports:
                for line in reports:
                    if progress is not None:
                        progress(int(line) + 1, layers)
            code = process.wait()
        finally:
            _end(process)
    if code:
        raise CheckpointError(f"{options.method}: GPTQModel failed: {last_line(log, code)} (see {log})")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills the worker with all that it started: on first use the library runs compilers."""
    if process.poll() is None:  # while it is ours to wait for, the number is its own
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
