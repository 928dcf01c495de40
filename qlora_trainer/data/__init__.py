"""Records to batches: sources, formats, chat templates, masks, packs, and a loader with an explicit position.

Comes in: `DataOptions` and a tokenizer. Goes out: `TokenizedData` and, from it, `Batch`es by step number.

    options = DataOptions(path="alpaca.json")
    data = load_tokenized(options, tokenizer, max_length=512, seed=42)
    loader = Loader(data, micro_batch_size=4, accumulation=4, max_length=512, packing=False, …)
    loader.step(epoch=0, index=17)

options.py   what the room is told            sources.py   files, folders, hub, built-in
problems.py  what can be wrong with a row     example.py   what one row teaches, checked
folders.py   which files of a folder          splits.py    which part data.split means
rows.py      files to rows, with their lines  lines.py     bytes to lines
jsonfile.py  … of JSON in every shape         tables.py    … of Parquet and Arrow
turns.py     turns, and their order           tools.py     schemas and calls in one form
formats.py   rows to checked examples         trees.py     OASST messages to trees
scan.py      every row read and checked       templates.py which template applies
sandbox.py   Jinja, with limits               form.py      how a template reads thoughts and calls
chat.py      a template, and what ends turns  layout.py    where in a rendering turns lie
control.py   people's text is no control token lost.py      what a template leaves out
encode.py    examples to ids and weights      parallel.py  … by several processes
store.py     documents on disk                build.py     all of the above, cached
overlap.py   held-out rows that are trained on
packing.py   documents to packs
order.py     one epoch's rows, in order       loader.py    (seed, epoch, index) to batches
batch.py     what the model gets              survey.py    what there is to learn from
screen.py    … on the terminal                page.py      … as a page
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_trainer.data.batch import IGNORE, Batch
    from qlora_trainer.data.build import load_tokenized, tokenizer_fingerprint
    from qlora_trainer.data.loader import Loader, StepBatch
    from qlora_trainer.data.options import DataOptions, Source
    from qlora_trainer.data.store import Prompt, TokenizedData

_HOMES = {
    "IGNORE": "batch",
    "Batch": "batch",
    "DataOptions": "options",
    "Loader": "loader",
    "Prompt": "store",
    "Source": "options",
    "StepBatch": "loader",
    "TokenizedData": "store",
    "load_tokenized": "build",
    "tokenizer_fingerprint": "build",
}
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


def __getattr__(name: str) -> Any:
    """Imported when first used: checking options must not wait for torch and transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
