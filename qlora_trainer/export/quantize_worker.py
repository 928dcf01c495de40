"""The child process of `quantize`: the only place that imports GPTQModel to quantize.

Reads a JSON request from standard input; writes the number of each finished layer, one a line, into the
pipe whose descriptor is its argument. Run as `python -m qlora_trainer.export.quantize_worker FD`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from qlora_trainer.system.processes import shield_worker
from qlora_trainer.system.redact import masked_output


def main() -> None:
    shield_worker()
    request: dict[str, Any] = json.load(sys.stdin)
    os.chdir(request["target"])  # the library writes a folder of logs where it runs
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import RTNConfig

    method, device = request["method"], request["device"]
    common = {key: request[key] for key in ("bits", "group_size", "sym")}
    # On a CPU, GPTQ is twice as fast in float32; AWQ's kernels want 16 bits and must be named.
    dtype = torch.float32 if device == "cpu" and method != "awq" else torch.bfloat16
    backend = BACKEND.AWQ_TORCH if method == "awq" and device == "cpu" else BACKEND.AUTO
    if method == "rtn":
        config = RTNConfig(**common)
    elif method == "awq":
        config = QuantizeConfig(**common, method="awq", format="gemm")
    else:
        config = QuantizeConfig(**common, desc_act=request["desc_act"])
    model = GPTQModel.load(request["source"], config, device=device, dtype=dtype, backend=backend)
    model.layer_callback = _Reporter(int(sys.argv[1]))
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in request["calibration"]]
    model.quantize(rows or None, batch_size=1, backend=backend)
    model.save(request["target"])


class _Reporter:
    """Told by the library when a layer is done; it reports some twice."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.last = descriptor, -1

    def layer_complete(self, *, layer_idx: int, submodule_finalized: bool) -> None:
        if submodule_finalized and layer_idx > self.last:
            self.last = layer_idx
            os.write(self.descriptor, f"{layer_idx}\n".encode())


if __name__ == "__main__":
    with masked_output():  # into a log that stays after a failure
        main()
