"""llama.cpp's K-quants (Q4_K, Q5_K, Q6_K): which tensor gets which type, and the rounding itself.

In: weights [out, in] in float32. Out: their blocks as GGUF stores them, uint8. The `gguf` package reads
these types and does not write them; auto-round carries a port of llama.cpp's rounding, without calibration.
Importing auto-round replaces functions of transformers, so it works in a process of its own
(`kquants_worker`), which is started at the first weight and serves a whole file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray
from torch import Tensor

from qlora_trainer.errors import CheckpointError, ConfigError
from qlora_trainer.export.worker_log import last_line

MIXES = {
    "q6_k": (GGMLQuantizationType.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_k_m": (GGMLQuantizationType.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q4_k_m": (GGMLQuantizationType.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
}
TYPES = frozenset(weight_type for weight_type, _ in MIXES.values())
SUPERBLOCK = 256  # weights of a row that share a float16 scale; there are eight or sixteen groups in it
# What llama.cpp takes for rows that superblocks do not fill.
_FALLBACK = {
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_K: GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
}
_WORKER = "qlora_trainer.export.kquants_worker"


def require_library(kind: str) -> None:
    """Raises ConfigError, with what can be chosen instead, where auto-round is not installed."""
    if importlib.util.find_spec("auto_round") is None:
        raise ConfigError(
            f"export.gguf_type={kind} needs auto-round: pip install 'qlora_trainer[kquants]', "
            "or choose one of f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0"
        )


def tensor_type(name: str, width: int, kind: str, layers: int, tied: bool) -> GGMLQuantizationType:
    """The type of one matrix in llama.cpp's mix `kind` (llama-quant.cpp, `llama_tensor_get_type`).

    The head, and of values and down projections the first and last eighth of the layers and every
    third between, are kept at six bits.

    Args:
        name: GGUF's name of the tensor.
        width: weights a row.
        tied: the head is the input embedding.
    """
    chosen, _ = MIXES[kind]
    head = name == "output.weight" or (tied and name == "token_embd.weight")
    sensitive = name.endswith((".attn_v.weight", ".ffn_down.weight"))
    if head or (sensitive and _more_bits(int(name.split(".")[1]), layers)):
        chosen = GGMLQuantizationType.Q6_K
    return _FALLBACK[chosen] if width % SUPERBLOCK else chosen


def _more_bits(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


class KQuantizer:
    """The rounding, in a child process that ends with the `with` block.

    Args:
        log: takes all that the library prints.
        device: cpu | cuda, where to compute.
    """

    def __init__(self, log: Path, device: str) -> None:
        self.log, self.device = log, device
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: IO[bytes] | None = None

    def __enter__(self) -> KQuantizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            with suppress(BrokenPipeError):  # it may have died with a weight on its way
                self._process.stdin.close()
            self._process.kill()
            self._process.wait()
        if self._answers is not None:
            self._answers.close()

    def quantize(self, weight: Tensor, kind: GGMLQuantizationType) -> NDArray[np.uint8]:
        """`weight` [out, in], any device, as blocks: uint8 [out, bytes of a row].

        Raises:
            CheckpointError: the library failed; its last line and where the log is.
        """
        block, nbytes = GGML_QUANT_SIZES[kind]
        rows, width = weight.shape
        assert width % block == 0, f"rows of {width} weights in blocks of {block}"
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None and self._answers is not None
        raw = weight.to("cpu", torch.float32).contiguous().numpy()
        request = {"type": kind.name.lower(), "shape": list(weight.shape)}
        expected = rows * (width // block) * nbytes
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.write(raw.data)
            self._process.stdin.flush()
            blocks = self._answers.read(expected)
        except BrokenPipeError:
            blocks = b""
        if len(blocks) < expected:
            code = self._process.wait()
            raise CheckpointError(
                f"{kind.name}: auto-round failed: {last_line(self.log, code)} (see {self.log})"
            )
        return np.frombuffer(blocks, dtype=np.uint8).reshape(rows, -1)

    def _start(self) -> None:
        read, write = os.pipe()
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _WORKER, str(write), self.device],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(write,),
            )
        os.close(write)
        self._answers = os.fdopen(read, "rb")
