"""What is exported, and how: plain values for every format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qlora_trainer.export.base import Held
from qlora_trainer.export.quantize import QuantizeOptions
from qlora_trainer.model.fingerprint import base_fingerprint


@dataclass(frozen=True)
class Rows:
    """What the training rows are like, where it is known; a format may be unable to hold it.

    Attributes:
        longest: tokens of the longest row.
        with_bos: share of the rows that begin with the tokenizer's BOS.
    """

    longest: int | None = None
    with_bos: float | None = None


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        adapter: its folder; None for a base by itself, to be converted.
        base: hub name or folder of the base.
        name: of the base, as its user would name it.
        held: how training held the base.
        stop_ids: that end an answer.
        data, settings: for the card.
    """

    adapter: Path | None
    base: str
    name: str
    revision: str | None
    held: Held
    tokenizer: PreTrainedTokenizerBase
    stop_ids: Sequence[int]
    rows: Rows = field(default_factory=Rows)
    data: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def base_fingerprint(self) -> str:
        """Of the base that is there now."""
        return base_fingerprint(self.base, self.revision)


@dataclass(frozen=True)
class ExportOptions:
    """How to export; the fields are the keys of the `export` section.

    Attributes:
        merge_base: trained | original.
        dtype: of merged weights; None is the base's own.
        bits, group_size, sym, desc_act: for gptq, awq and rtn.
        gguf_type: f16 | bf16 | q8_0 | q6_k | q5_k_m | q5_1 | q5_0 | q4_k_m | q4_1 | q4_0.
        calibration, calibration_samples, calibration_length: what gptq and awq watch activations on.
        overwrite: replace a folder made from another adapter or with other settings.
    """

    merge_base: str = "trained"
    dtype: torch.dtype | None = None
    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    gguf_type: str = "q8_0"
    calibration: str | list[str] = "train"
    calibration_samples: int = 128
    calibration_length: int = 512
    overwrite: bool = False

    def quantize(self, method: str) -> QuantizeOptions:
        return QuantizeOptions(method, self.bits, self.group_size, self.sym, self.desc_act)
