"""Libraries speak when a user can act on it: their start-up chatter and bars in log files are turned off."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def quiet_libraries() -> None:
    """Call before torch, transformers or bitsandbytes are imported."""
    # On AVX512-BF16 CPUs bitsandbytes says at import that a kernel it may fetch from the hub is not there.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else it warns when data workers fork
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.jit.*")
