"""Examples to token ids and loss weights, by character offsets.

Comes in: checked examples, a ChatTemplate and a fast tokenizer. Goes out: `Document`s of at most
`max_length` tokens, and for each example what became of it. A token is supervised if it overlaps a
supervised span, so a token that holds both the last space of a prompt and the first letter of the answer
counts as answer. A turn's span ends with its end-of-turn token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qlora_trainer.data.chat import ChatTemplate
from qlora_trainer.data.control import encode_texts
from qlora_trainer.data.example import Example
from qlora_trainer.data.layout import HiddenTurnError, Rendering, Span
from qlora_trainer.data.lost import losses
from qlora_trainer.data.problems import RowError
from qlora_trainer.errors import ConfigError

Ids = NDArray[np.int32]
Weights = NDArray[np.float32]
NO_ANSWER = (-1, -1)


@dataclass(frozen=True)
class Document:
    """One tokenized training document.

    Attributes:
        ids: int32 [T].
        weights: float32 [T], loss weight of predicting each token; the first is always 0.
        answer: [start, stop) of the last assistant turn in tokens; (-1, -1) if it is not whole.
    """

    ids: Ids
    weights: Weights
    answer: tuple[int, int]


@dataclass(frozen=True)
class Dropped:
    """Why an example gave no document, and a few words on it."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Masking:
    """Which tokens teach: everything, all assistant turns (default), or the last one."""

    train_on_inputs: bool = False
    last_turn_only: bool = False


class Encoder:
    """Turns examples into documents.

    Args:
        on_lost: error | warn, for rows of whose content the template leaves something out.

    Attributes:
        notes: what is worth telling about the examples of the last call: note (see screen.NOTES) -> index of
            the example -> where in it, or nothing.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate | None,
        *,
        max_length: int,
        overlong: str,
        masking: Masking,
        on_lost: str = "error",
    ) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{tokenizer.name_or_path}: a slow tokenizer gives no character offsets, which masks need; "
                "use a model folder with tokenizer.json"
            )
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"{tokenizer.name_or_path}: the tokenizer has no eos_token; the model could never stop"
            )
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.overlong = overlong
        self.masking = masking
        self.on_lost = on_lost
        self.bos, self.eos = tokenizer.bos_token_id, int(tokenizer.eos_token_id)
        self.added = frozenset(tokenizer.added_tokens_decoder)
        self.prefix = prefix_ids(tokenizer)
        self.notes: dict[str, dict[int, str]] = {}
        self._index = 0  # of the example that is being looked at

    def __call__(self, examples: Sequence[Example]) -> list[list[Document] | Dropped | RowError]:
        """One result per example, in order: its documents (several only if split), or why there are none."""
        self.notes = {}
        layouts = []
        for self._index, example in enumerate(examples):
            layouts.append(self._layout(example))
        tokens = self._tokens([layout for layout in layouts if isinstance(layout, Rendering)])
        results: list[list[Document] | Dropped | RowError] = []
        for self._index, (example, layout) in enumerate(zip(examples, layouts, strict=True)):
            if isinstance(layout, Rendering):
                results.append(self._fit(self._document(example, layout, *next(tokens))))
            else:
                results.append(layout)
        return results

    def _tokens(self, layouts: list[Rendering]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        if self.template is None:
            return iter(encode_texts(self.tokenizer, [layout.text for layout in layouts]))
        return iter(self.template.tokenize(layouts))

    def _layout(self, example: Example) -> Rendering | Dropped | RowError:
        if example.empty:
            return Dropped("empty_answer", "no answer text to learn")
        if example.raw:
            return self._raw(example)
        assert self.template is not None, "conversations need a template"
        try:
            layout = self.template.layout(example)
        except HiddenTurnError as error:
            layout = error.rendering  # of which something may be missing, and that is why
            if self.on_lost == "warn" or not any(losses(example, layout, reads_thoughts=False)):
                return RowError(*error.problem)
        except RowError as error:
            return error
        try:
            self._check_lost(example, layout, self.template)
        except RowError as error:
            return error
        return layout

    def _raw(self, example: Example) -> Rendering:
        """The text as it stands; an EOS that is written out at its end closes it."""
        text, start = example.prompt + example.completion, len(example.prompt)
        said = example.completion.rstrip()
        closed = said.endswith(str(self.tokenizer.eos_token))
        stop = start + len(said) if closed else len(text)
        return Rendering(text, text, (Span(start, stop, 0, turn=True, closed=closed),))

    def _check_lost(self, example: Example, layout: Rendering, template: ChatTemplate) -> None:
        for loss in losses(example, layout, template.form.thinking is not None):
            if loss.earlier:
                self._note("thoughts_left_out")
            elif self.on_lost == "warn":
                self._note("lost_content", loss.field)
            else:
                tools = "tool" in loss.field
                raise RowError(
                    loss.field,
                    f"the chat template ({template.origin}) does not render {loss.what}: give one that does "
                    f"(data.template={'chatml, llama3, mistral or a file' if tools else 'FILE'}), or go on "
                    "without it by data.on_lost_content=warn",
                )

    def _document(
        self, example: Example, layout: Rendering, ids: list[int], offsets: list[tuple[int, int]]
    ) -> Document:
        """Ids and weights of one whole example, before it is cut to length."""
        document, closed = self._masked(example, layout, ids, offsets)
        if not closed:
            document = self._with_eos(example, document)
        if example.raw:
            document = self._with_prefix(document)
            if not example.prompt:
                document = replace(document, answer=NO_ANSWER)  # a plain text answers nothing
        self._look_at(document, layout)
        document.weights[0] = 0.0
        return document

    def _masked(
        self, example: Example, layout: Rendering, ids: list[int], offsets: list[tuple[int, int]]
    ) -> tuple[Document, bool]:
        """Weights from the layout's spans, and whether the last turn has its end-of-turn token."""
        tokens: Ids = np.asarray(ids, dtype=np.int32)
        places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        starts, ends = places[:, 0], places[:, 1]
        weights: Weights = np.full(len(tokens), float(self.masking.train_on_inputs), dtype=np.float32)
        stop_token = self.eos if example.raw or self.template is None else self.template.end_of_turn
        turns = [span for span in layout.spans if span.turn]
        answer, closed = NO_ANSWER, False
        for span in layout.spans:
            inside = np.flatnonzero((starts < span.stop) & (ends > span.start))
            first = int(inside[0]) if len(inside) else int(np.searchsorted(starts, span.start))
            last = int(inside[-1]) + 1 if len(inside) else first
            if first < last and starts[first] < span.start and int(tokens[first]) in self.added:
                first += 1  # a role token that swallows the white space behind it is still the prompt's
            if span.turn:
                closed = span.closed and first < last and int(tokens[last - 1]) == stop_token
                answer = (first, last)
                if not closed and stop_token is not None and span is not turns[-1]:
                    self._note("open_turn")
            weights[first:last] = self._weight(example, span, span is turns[-1])
        return Document(tokens, weights, answer), closed

    def _with_eos(self, example: Example, document: Document) -> Document:
        """End a document whose template (or text) prints no end, with the weight of its answer."""
        tokens, weights, (start, stop) = document.ids, document.weights, document.answer
        if not example.raw:
            self._note("eos_added")
            tokens, weights = tokens[:stop], weights[:stop]  # what the template prints behind an answer goes
        elif len(tokens) and int(tokens[-1]) in self.added:
            self._note("other_end")
        own = example.messages[-1].weight if example.messages else None
        tokens = np.append(tokens, np.int32(self.eos))
        weights = np.append(weights, np.float32(1.0 if own is None else own))
        return Document(tokens, weights, (start, len(tokens)))

    def _with_prefix(self, document: Document) -> Document:
        """Put before a raw text what the tokenizer puts before any text (BOS), unless it is there."""
        shift = len(self.prefix)
        if document.ids[:shift].tolist() == self.prefix:
            return document
        ids = np.concatenate([np.asarray(self.prefix, dtype=np.int32), document.ids])
        weights = np.concatenate([np.zeros(shift, dtype=np.float32), document.weights])
        return Document(ids, weights, (document.answer[0] + shift, document.answer[1] + shift))

    def _look_at(self, document: Document, layout: Rendering) -> None:
        """Note what is odd about a document."""
        ids = document.ids
        if not layout.as_prompted:
            self._note("prompt_differs")
        if layout.shadow != layout.text:
            self._note("control_text")
        if self.bos is not None and ids[:2].tolist() == [self.bos, self.bos]:
            self._note("double_bos")
        if self.prefix and int(ids[0]) != self.prefix[0]:
            self._note("missing_bos")

    def _note(self, note: str, where: str = "") -> None:
        self.notes.setdefault(note, {}).setdefault(self._index, where)

    def _weight(self, example: Example, span: Span, is_last: bool) -> float:
        own = example.messages[span.message].weight if example.messages else None
        if span.turn and self.masking.last_turn_only and not is_last:
            return 0.0
        return 1.0 if own is None else own

    def _fit(self, document: Document) -> list[Document] | Dropped | RowError:
        """Apply the policy for rows over `max_length`; drop what teaches nothing."""
        length = len(document.ids)
        if length <= self.max_length:
            pieces = [document]
        elif self.overlong == "error":
            return RowError("length", f"{length} tokens, train.max_length is {self.max_length}")
        elif self.overlong == "drop":
            return Dropped("too_long", f"{length} tokens, max_length {self.max_length}")
        else:
            self._note("split" if self.overlong == "split" else "truncated")
            pieces = self._cut(document)
        kept = [piece for piece in pieces if piece.weights.any()]
        if not kept:
            return Dropped(
                "all_masked", f"no supervised token among the {min(length, self.max_length)} kept of {length}"
            )
        return kept

    def _cut(self, document: Document) -> list[Document]:
        size, length = self.max_length, len(document.ids)
        if self.overlong == "truncate_right":
            return [_piece(document, 0, size)]
        if self.overlong == "truncate_left":
            keep = 1 if document.ids[0] == self.bos else 0
            tail = _piece(document, length - size + keep, length)
            ids = np.concatenate([document.ids[:keep], tail.ids])
            weights = np.concatenate([document.weights[:keep], tail.weights])
            return [Document(ids, weights, NO_ANSWER)]
        return [_piece(document, start, min(start + size, length)) for start in range(0, length, size)]


def _piece(document: Document, start: int, stop: int) -> Document:
    weights = document.weights[start:stop].copy()
    weights[0] = 0.0
    return Document(document.ids[start:stop], weights, NO_ANSWER)


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before plain text (BOS or nothing)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return list(dressed[:start])
    return []
