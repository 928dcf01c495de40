"""What the model will learn from, in numbers and in tokens, before it learns.

Comes in: tokenized data, its loader and tokenizer. Goes out: a `Survey` of plain values, which `screen.py`
prints and `page.py` writes; nothing here knows how it is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlora_trainer.data.chat import ChatTemplate
from qlora_trainer.data.encode import Encoder, Masking
from qlora_trainer.data.example import Example
from qlora_trainer.data.loader import Loader
from qlora_trainer.data.options import DataOptions
from qlora_trainer.data.scan import RowSplit, SourceReader
from qlora_trainer.data.sources import open_source
from qlora_trainer.data.store import Ledger, TokenizedData

BINS = 16  # of the length histogram
CHECKED = 200  # conversations whose prompt is tokenized again as inference does
SHOWN_ROWS = 16  # of the collated batch
SHOWN_TOKENS = 32_768  # of the collated batch, padding included


@dataclass(frozen=True)
class PromptCheck:
    """Whether training shows the model the prompt ids that inference will.

    `difference` describes the first one: where, and the last tokens of each prompt from the place they part.
    """

    compared: int
    same: int
    difference: str | None


@dataclass(frozen=True)
class Token:
    """One position of the collated batch."""

    text: str
    id: int
    position: int
    weight: float  # of predicting it; 0: not supervised
    special: bool


@dataclass(frozen=True)
class BatchDocument:
    """One document inside a row of the batch, with the row of the source it came from."""

    where: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class BatchRow:
    """One row of the batch: its documents and how much padding follows."""

    documents: tuple[BatchDocument, ...]
    padding: int


@dataclass(frozen=True)
class Survey:
    """Everything there is to show. Lengths are tokens; shares are of 1."""

    sources: list[str]
    formats: list[str]
    template: str  # where the chat template came from
    stops: list[str]  # tokens that end generation
    ledger: Ledger
    documents: int
    tokens: int
    supervised: int
    lengths: dict[str, int]  # shortest, median, mean, 95%, longest
    histogram: list[tuple[int, int, int]]  # from, to (both inside), documents
    max_length: int
    layout: str  # packed | grouped by length | padded
    rows: int  # of batches in epoch 0: packs, or single documents
    steps: int
    padding: float  # share of all positions of epoch 0
    prompts: PromptCheck
    batch: list[BatchRow]
    batch_total: int  # rows in the whole first step
    shared: int = 0  # documents that are training documents too


def survey(
    data: TokenizedData,
    loader: Loader,
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    role: str,
    seed: int,
    shared: int = 0,
) -> Survey:
    """Count epoch 0 and take its first step apart; `shared` documents are known from training."""
    lengths = data.lengths
    marks = {
        "shortest": lengths.min(),
        "median": np.median(lengths),
        "mean": lengths.mean(),
        "95%": np.percentile(lengths, 95),
        "longest": lengths.max(),
    }
    order = loader.order(0)
    size = order.micro_batch_size
    positions = int(loader.widths(0)[:-1].sum()) * size + int(loader.widths(0)[-1]) * len(
        order[len(order) - 1]
    )
    filled = int(lengths[order.documents].sum())
    batch, total = _first_step(data, loader, tokenizer)
    return Survey(
        sources=data.sources,
        formats=data.formats,
        template=data.template_origin or "none: the text as it stands",
        stops=[str(token) for token in tokenizer.convert_ids_to_tokens(list(data.stop_token_ids))],
        ledger=data.ledger,
        documents=len(data),
        tokens=data.n_tokens,
        supervised=data.n_supervised,
        lengths={name: round(float(value)) for name, value in marks.items()},
        histogram=_histogram(data),
        max_length=data.max_length,
        layout="packed" if loader.packing else "grouped by length" if loader.group_by_length else "padded",
        rows=order.n_rows,
        steps=loader.steps_per_epoch(0),
        padding=1 - filled / positions,
        prompts=check_prompts(data, options, tokenizer, role=role, seed=seed),
        batch=batch,
        batch_total=total,
        shared=shared,
    )


def _histogram(data: TokenizedData) -> list[tuple[int, int, int]]:
    low, high = int(data.lengths.min()), int(data.lengths.max())
    width = max(1, -(-(high - low + 1) // BINS))
    counts = np.bincount((data.lengths - low) // width)
    return [
        (low + at * width, min(high, low + (at + 1) * width - 1), int(count))
        for at, count in enumerate(counts)
    ]


def check_prompts(
    data: TokenizedData, options: DataOptions, tokenizer: PreTrainedTokenizerBase, *, role: str, seed: int
) -> PromptCheck:
    """Tokenize the prompts of the first conversations alone, as inference does, and compare with training."""
    template = None
    if data.chat_template is not None:
        template = ChatTemplate(data.chat_template, data.template_origin or "", tokenizer)
    encoder = Encoder(
        tokenizer,
        template,
        max_length=2**31,
        overlong="drop",
        masking=Masking(),
        on_lost=options.on_lost_content,
    )
    split = RowSplit.of(options, role, seed)
    compared = same = 0
    difference = None
    for source in options.sources(role):
        rows = SourceReader(source, open_source(source), split)
        good = ((row, example) for row, example in rows if isinstance(example, Example))
        for row, example in islice(good, CHECKED):
            if not (example.messages or example.prompt):
                continue
            [documents] = encoder([example])
            if not isinstance(documents, list):
                continue
            trained = documents[0].ids[: documents[0].answer[0]].tolist()
            given = _inference_ids(example, template, tokenizer)
            compared += 1
            same += trained == given
            if trained != given and difference is None:
                difference = f"{row.where}: {_parting(trained, given, tokenizer)}"
    return PromptCheck(compared, same, difference)


def _inference_ids(
    example: Example, template: ChatTemplate | None, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    if example.raw or template is None:
        return list(tokenizer(example.prompt)["input_ids"])
    last = max(at for at, message in enumerate(example.messages) if message.role == "assistant")
    [(ids, _)] = template.tokenize(
        [template.prompt(template.messages(example.messages[:last]), example.tools)]
    )
    return ids


def _parting(trained: list[int], given: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    at = next(
        (place for place, (a, b) in enumerate(zip(trained, given, strict=False)) if a != b),
        min(len(trained), len(given)),
    )
    parts = [tokenizer.convert_ids_to_tokens(ids[at : at + 8]) for ids in (trained, given)]
    return (
        f"from token {at} on, training has {parts[0] or 'the answer'}, inference {parts[1] or 'nothing more'}"
    )


def _first_step(
    data: TokenizedData, loader: Loader, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[BatchRow], int]:
    """The rows of the first step's micro-batches, as many as can be looked at, and how many there are."""
    rows: list[BatchRow] = []
    total = shown = 0
    for batch in loader.step(0, 0).micro_batches:
        origins = iter(batch.rows)
        for row in range(len(batch.input_ids)):
            total += 1
            borders = batch.document_ids[row].numpy()
            if len(rows) == SHOWN_ROWS or (rows and shown + len(borders) > SHOWN_TOKENS):
                continue
            shown += len(borders)
            documents = []
            for number in range(int(borders.max()) + 1):
                here = borders == number
                ids = batch.input_ids[row].numpy()[here].tolist()
                places = batch.position_ids[row].numpy()[here].tolist()
                weights = batch.loss_weights[row].numpy()[here].tolist()
                documents.append(
                    BatchDocument(data.where(next(origins)), tokens_of(ids, places, weights, tokenizer))
                )
            rows.append(BatchRow(tuple(documents), int((borders < 0).sum())))
    return rows, total


def tokens_of(
    ids: list[int], positions: list[int], weights: list[float], tokenizer: PreTrainedTokenizerBase
) -> tuple[Token, ...]:
    """Tokens with the text each adds; a character of several tokens is written at the last of them."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]  # so that a leading space is not stripped
    start = written = len(tokenizer.decode(anchor))
    texts: list[str] = []
    pending: list[int] = []
    for at, token in enumerate(ids):
        pending.append(token)
        text = str(tokenizer.decode(anchor + pending))[written:]
        whole = text if at == len(ids) - 1 else text.rstrip("\ufffd")  # the rest of a character is to come
        texts.append(whole)
        written += len(whole)
        if whole == text:
            pending, written = [], start
    return tuple(
        Token(text, token, position, weight, token in special)
        for text, token, position, weight in zip(texts, ids, positions, weights, strict=True)
    )
