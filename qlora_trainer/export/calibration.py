"""What GPTQ and AWQ watch activations on: by default the run's own training rows, as training rendered them.

In: tokenized documents. Out: sequences of equal length, whole documents one after another, drawn with a
seed. Calibrating on text that the model will never see in use is how quantized exports lose a tuning.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlora_trainer.data import DataOptions, TokenizedData, load_tokenized
from qlora_trainer.errors import DataError

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
