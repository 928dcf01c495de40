"""The process's surroundings, set before any library loads: libraries speak when a user can act on it, and
threads that wait sleep instead of spinning.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import sys
import warnings


def quiet_libraries() -> None:
    """Call before torch, transformers or bitsandbytes are imported. What the user set stays."""
    # Spinning OpenMP threads starve each other on shared cores: one CPU step took 107 s, not 2.5 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Batches of changing length fragment the CUDA cache: 3.7 GiB lay idle on an 8B model without this.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # On AVX512-BF16 CPUs bitsandbytes says at import that a kernel it may fetch from the hub is not there.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of being given a model, not a name
    # torchao, which PEFT imports where it is, tries every GPU's library, and registers types that torch
    # says it need not; torch looks for CUDA's compiler where there is no GPU.
    for name in ("torchao", "torch.utils._pytree", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else it warns when data workers fork
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.jit.*")


def quiet_gptqmodel() -> None:
    """Call before PEFT or transformers may import GPTQModel, which greets with a banner and its settings.

    It speaks through a package of its own, whose logger sets its level, and prints, when first asked for.
    """
    if importlib.util.find_spec("logbar") is not None:
        from logbar import LogBar

        with contextlib.redirect_stdout(io.StringIO()):
            LogBar.shared().setLevel(logging.ERROR)
