"""Records to batches: sources, formats, chat templates, masks, packs, and a loader with an explicit position.

Comes in: `DataOptions` and a tokenizer. Goes out: `TokenizedData` and, from it, `Batch`es by step number.

    options = DataOptions(**vars(config.data))
    data = load_tokenized(options, tokenizer, max_length=512, seed=42)
    loader = Loader(data, micro_batch_size=4, accumulation=4, max_length=512, packing=False, …)
    loader.step(epoch=0, index=17)
"""

from qlora_trainer.data.batch import IGNORE, Batch
from qlora_trainer.data.build import load_tokenized, tokenizer_fingerprint
from qlora_trainer.data.loader import Loader, StepBatch
from qlora_trainer.data.options import DataOptions, Source
from qlora_trainer.data.store import Prompt, TokenizedData

__all__ = [
    "IGNORE",
    "Batch",
    "DataOptions",
    "Loader",
    "Prompt",
    "Source",
    "StepBatch",
    "TokenizedData",
    "load_tokenized",
    "tokenizer_fingerprint",
]
