"""The process's surroundings, set before any library loads: libraries speak when a user can act on it, and
threads that wait sleep instead of spinning.
"""

from __future__ import annotations

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
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else it warns when data workers fork
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.jit.*")
