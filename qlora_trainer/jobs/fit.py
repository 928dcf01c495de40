"""Whether the model has a place for every token of the data, asked before any weight loads.

In: what a model can take (`model.limits`) and tokenized data. Out: what the user may want to know, a line
each, or the error that says which tokens or positions there is no place for.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from qlora_trainer.data import TokenizedData
from qlora_trainer.errors import ConfigError, DataError
from qlora_trainer.model.limits import Limits

SHOWN = 5  # tokens named in an error


def check_fit(
    limits: Limits, parts: Sequence[TokenizedData], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """What is probably not meant.

    Raises:
        DataError: tokens of the data have no row in the embedding.
        ConfigError: a document is longer than the model's table of positions.
    """
    for part in parts:
        if limits.rows is not None and part.largest_id >= limits.rows:
            raise DataError(_without_a_row(limits.rows, part, tokenizer))
    longest = max(int(part.lengths.max()) for part in parts)
    if limits.trained is None or longest <= limits.trained:
        return []
    if limits.table:
        raise ConfigError(
            f"train.max_length: the longest document has {longest:,} tokens, and the model has a table of "
            f"{limits.trained:,} positions: set train.max_length={limits.trained}"
        )
    return [
        f"the longest document has {longest:,} tokens, and config.json says {limits.trained:,} positions "
        "(max_position_embeddings): how good the model is beyond them is not known; "
        f"train.max_length={limits.trained} stays within"
    ]


def _without_a_row(rows: int, part: TokenizedData, tokenizer: PreTrainedTokenizerBase) -> str:
    ids, counts = part.ids_from(rows)
    named = [
        f"{tokenizer.convert_ids_to_tokens(int(token))!r} (id {token}, {count:,} times)"
        for token, count in zip(ids[:SHOWN], counts, strict=False)
    ]
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return (
        f"{', '.join(part.sources)}: {', '.join(named)}{more}: the model's embedding has {rows:,} rows and "
        "none for that; leave it out of the data, or give the model rows for its whole tokenizer once, with "
        "transformers: model.resize_token_embeddings(len(tokenizer)) and save_pretrained"
    )
