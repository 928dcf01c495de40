"""What a model can take: how many token ids have a row, and how many positions a text may have.

In: a transformers model, with or without memory. Out: `Limits`. A learned table of positions (GPT-2, OPT)
ends: what lies beyond it cannot be computed. Rotary positions go on for ever, but the model was trained on
so many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from qlora_trainer.model.skeleton import read_configuration, skeleton, text_config

_OFFSET = 8  # rows that a table may have beyond its positions (OPT: 2)


@dataclass(frozen=True)
class Limits:
    """Of one model.

    Attributes:
        rows: of the input embedding; token ids are below it. None where it is no ordinary one.
        trained: positions that its config.json says it was made for, if it does.
        table: whether positions beyond them have no value at all.
    """

    rows: int | None
    trained: int | None
    table: bool

    def room(self, width: int, wanted: int) -> int:
        """How many of `wanted` new tokens have a position behind a text of `width` tokens."""
        return min(wanted, max(0, self.trained - width)) if self.table and self.trained else wanted


def limits_of(model: PreTrainedModel | PeftModel) -> Limits:
    """The limits of `model`, which may be on the meta device, and whose adapter may have more rows."""
    config = model.config.get_text_config(decoder=True)
    weight = getattr(_embedding(model), "weight", None)
    rows = None if weight is None else int(weight.shape[0])
    if getattr(getattr(config, "attn_config", None), "alibi", False):  # MPT makes its biases once, so long
        return Limits(rows, config.max_seq_len, table=True)
    trained = getattr(config, "max_position_embeddings", None)
    table = trained is not None and any(trained <= size <= trained + _OFFSET for size in _tables(model))
    return Limits(rows, trained, table)


def limits_in(source: str, revision: str | None = None) -> Limits:
    """The limits of the model in `source`, as `source.resolve` returns it; its weights are not read.

    Raises:
        MissingInputError: transformers cannot build it.
    """
    return limits_of(skeleton(text_config(read_configuration(source, revision))))


def _embedding(model: Any) -> nn.Module | None:
    try:
        found: nn.Module | None = model.get_input_embeddings()
    except NotImplementedError:  # what transformers says of an architecture of other parts
        return None
    return found


def _tables(model: Any) -> Iterator[int]:
    """Rows of whatever is looked up by position."""
    inputs = _embedding(model)
    for name, module in model.named_modules():
        own = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and module is not inputs and ("pos" in own or own == "wpe"):
            yield int(module.weight.shape[0])
        if hasattr(module, "make_weights"):  # XGLM's, which grows
            continue
        for key, buffer in module.named_buffers(recurse=False):
            if "pos" in key and buffer.dim() == 2 and buffer.is_floating_point():
                yield int(buffer.shape[0])
