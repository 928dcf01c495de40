"""The child process of `kquants`: the only place that imports auto-round.

Reads from standard input, for each weight, a line of JSON (type, shape) and the weight's float32 bytes;
writes the blocks' bytes into the pipe whose descriptor is its first argument.
Run as `python -m qlora_trainer.export.kquants_worker FD DEVICE`.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from qlora_trainer.system.processes import shield_worker
from qlora_trainer.system.redact import masked_output


def main() -> None:
    shield_worker()
    from auto_round.export.export_to_gguf.packing import ggml_quant

    device = sys.argv[2]
    with os.fdopen(int(sys.argv[1]), "wb") as answers:
        while line := sys.stdin.buffer.readline():
            request = json.loads(line)
            shape = torch.Size(request["shape"])
            raw = bytearray(sys.stdin.buffer.read(4 * shape.numel()))
            weight = torch.frombuffer(raw, dtype=torch.float32).view(shape)
            answers.write(ggml_quant(weight, request["type"], device=device).tobytes())
            answers.flush()


if __name__ == "__main__":
    with masked_output():  # into a log that stays after a failure
        main()
