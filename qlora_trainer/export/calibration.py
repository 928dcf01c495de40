"""What GPTQ and AWQ watch activations on: by default the run's own training rows, as training rendered them.

In: tokenized documents, or the base itself. Out: sequences of equal length: whole documents one after
another, drawn with a seed, or what the base says unasked. Calibrating on text that the model will never see
in use is how quantized exports lose a tuning; on training rows alone, how they lose the rest (README, under
Exports, has what each costs a small model).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_trainer.data import DataOptions, TokenizedData, load_tokenized
from qlora_trainer.errors import DataError
from qlora_trainer.inference.generate import Sampling, generate

PUBLIC: dict[str, dict[str, Any]] = {
    "c4": {"path": "allenai/c4", "name": "en", "split": "validation", "streaming": True},
    "wikitext": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},
}


def load_text(source: str, tokenizer: PreTrainedTokenizerBase, length: int, samples: int) -> TokenizedData:
    """`c4`, `wikitext` or a file or dataset of any format that training reads.

    Raises:
        DataError, MissingInputError: as for training data.
    """
    where = PUBLIC.get(source, {"path": source})
    # Lines may be short: take as many rows as would fill every sequence with ten to one to spare.
    options = DataOptions(**where, train_on_inputs=True, max_rows=samples * 40, on_bad_row="skip")
    return load_tokenized(options, tokenizer, max_length=length)


def shares(samples: int, sources: int) -> list[int]:
    """`samples` in parts as equal as can be, larger ones first."""
    return [samples // sources + (part < samples % sources) for part in range(sources)]


def made_up(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: int, length: int, seed: int
) -> list[list[int]]:
    """`samples` sequences of `length` tokens drawn from the base itself, which needs no other text.

    Each begins with BOS, or a random token where there is none; the rest is drawn from the whole
    distribution (arXiv 2305.17888, section 2.1), past any end.
    """
    first = [tokenizer.bos_token_id] * samples
    if tokenizer.bos_token_id is None:
        first = np.random.default_rng(seed).integers(model.config.vocab_size, size=samples).tolist()
    sampling = Sampling(max_new_tokens=length - 1, temperature=1.0, batch_size=16, seed=seed)
    drawn = generate(model, [[token] for token in first], [], first[0], sampling)
    return [[token, *ids] for token, ids in zip(first, drawn, strict=True)]


def sequences(data: TokenizedData, samples: int, length: int, seed: int) -> list[list[int]]:
    """`samples` sequences of `length` tokens, each token of the data used at most once.

    Raises:
        DataError: there are not enough tokens, with how many there are.
    """
    order = np.random.default_rng(seed).permutation(len(data))
    found: list[list[int]] = []
    rest: list[int] = []
    for index in order:
        rest += data.document(int(index)).ids.tolist()
        while len(rest) >= length:
            found.append(rest[:length])
            rest = []  # the next sequence begins where a document begins
            if len(found) == samples:
                return found
    raise DataError(
        f"export.calibration_samples={samples} of export.calibration_length={length} tokens: "
        f"{', '.join(data.sources)} fills only {len(found)}; lower one of them, "
        "or name more text with export.calibration=FILE"
    )
