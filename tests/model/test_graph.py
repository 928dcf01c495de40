"""Which micro-steps are captured, and that rounding their shapes up changes no result."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from qlora_trainer.data.batch import IGNORE, Batch
from qlora_trainer.model.fuse import GraphedMicroStep, fuse
from qlora_trainer.model.fused.graph import Frequent, _Captured
from qlora_trainer.model.fused.inputs import Buckets, Inputs, busy_tokens, pad_to_bucket, prepare
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.objectives.sft import sft
from tests import tiny
from tests.batches import collate, documents

LENGTHS = range(40, 513)
BUSY = 4096


def build() -> tuple[nn.Module, list[nn.Parameter]]:
    base = tiny.model("llama", intermediate_size=128).requires_grad_(False)
    model = attach(base, LoraOptions(r=4, dtype=torch.float32), seed=0).train()
    torch.manual_seed(1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.data.normal_(0.0, 0.1)
        p.main_grad = torch.zeros_like(p)
    return model, parameters


def blank(rows: int, width: int) -> Batch:
    whole = torch.zeros((rows, width), dtype=torch.int64)
    return Batch(whole, whole, whole.float(), whole, whole.int(), ())


class Replayed:
    """Stands in for a captured graph where there is no GPU: runs the step on the inputs it was made with."""

    def __init__(self, step: GraphedMicroStep, inputs: Inputs) -> None:
        self.step, self.inputs, self.loss = step, inputs, torch.zeros(())

    def replay(self) -> None:
        self.loss.copy_(self.step._step(self.inputs))


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each shape was captured, on a CPU that believes in graphs."""
    made: Counter = Counter()

    def capture(step: GraphedMicroStep, inputs: Inputs) -> _Captured:
        made[inputs.key] += 1
        static = Inputs(**{name: value.clone() for name, value in inputs.tensors().items()})
        graph = Replayed(step, static)
        return _Captured(graph, static, graph.loss)  # type: ignore[arg-type]

    monkeypatch.setattr(GraphedMicroStep, "_capture", capture)
    return made


def test_the_most_frequent_are_kept_and_next_to_nothing_is_made_twice() -> None:
    """A long tail of keys, as lengths of documents have: the least recently used went, and came back."""
    kept, made = Frequent[int](24), Counter[int]()
    draw = random.Random(0)
    weights = [1 / (1 + key) for key in range(200)]
    for key in draw.choices(range(200), weights, k=20_000):
        if kept.visit(key) is None and kept.makes_room(key):
            kept.kept[key] = key
            made[key] += 1
        assert len(kept.kept) <= 24
    assert sum(made.values()) < 2 * 24
    assert set(range(10)) <= set(kept.kept)


def test_a_key_that_becomes_frequent_takes_the_place_of_a_rare_one() -> None:
    kept = Frequent[str](2)
    for key in ["a"] * 5 + ["b"] * 3:
        if kept.visit(key) is None and kept.makes_room(key):
            kept.kept[key] = key
    for visit in range(1, 8):
        assert kept.visit("c") is None
        assert kept.makes_room("c") == (visit == 7)  # b had 3
    assert set(kept.kept) == {"a"}


@pytest.mark.parametrize("longest", [512, 500, 300])
def test_rows_of_many_lengths_have_few_widths(longest: int) -> None:
    buckets = Buckets(longest, BUSY)
    padded = {
        pad_to_bucket(blank(1, -(-n // 8) * 8), buckets).input_ids.shape[1]
        for n in LENGTHS
        if n <= longest - 7
    }
    assert max(padded) <= longest
    assert len(padded) <= 16
    extra = [
        pad_to_bucket(blank(1, n), Buckets(512, BUSY)).input_ids.shape[1] / n - 1 for n in range(40, 513, 8)
    ]
    assert max(extra) < 0.25 and sum(extra) / len(extra) < 0.1


def test_what_keeps_the_gpu_busy_is_not_padded() -> None:
    idle, busy, buckets = blank(2, BUSY // 2 - 8), blank(2, BUSY // 2), Buckets(10**6, BUSY)
    assert pad_to_bucket(busy, buckets) is busy
    assert pad_to_bucket(idle, buckets).input_ids.shape[1] == BUSY // 2


def test_the_wider_a_layer_the_fewer_tokens_keep_the_gpu_busy() -> None:
    assert 4000 < busy_tokens(218_103_808) < 4200  # a layer of Llama-3-8B
    forward, _ = fuse(build()[0])
    assert forward.busy == busy_tokens(3 * 64 * 128 + 2 * 64 * 64 + 2 * 64 * 32) > 10**7


def test_what_keeps_the_gpu_busy_is_not_captured(captures: Counter) -> None:
    model, parameters = build()
    forward, _ = fuse(model)
    step = GraphedMicroStep(forward, sft, parameters, longest=128)
    step._pool = object()  # type: ignore[assignment]
    forward.busy = 2 * 128
    long, short = (collate([[d] for d in documents(pair)]) for pair in ([128, 120], [60, 50]))
    for _ in range(3):
        step(long)
        step(short)
    assert [key[0][1] for key in captures.elements()] == [(2, 64)]


def test_padding_is_none_of_a_documents() -> None:
    batch = collate([[d] for d in documents([70, 50])])
    wide = pad_to_bucket(batch, Buckets(512, BUSY))
    assert wide.input_ids.shape == (2, 80)
    assert wide.n_tokens == batch.n_tokens and wide.n_supervised == batch.n_supervised
    assert (wide.labels[:, 70:] == IGNORE).all() and (wide.document_ids[:, 70:] == -1).all()
    assert not wide.loss_weights[:, 70:].any()


def test_supervised_positions_are_few_of_small_micro_batches() -> None:
    counts = set()
    for n in range(20, 500, 7):
        batch = collate([[documents([500])[0]]], supervised_from=n)
        counts.add(prepare(batch, torch.device("cpu"), buckets=Buckets(512, BUSY)).targets.numel())
    assert counts == {128, 256, 384, 512}


def test_steps_of_many_lengths_are_the_plain_ones(captures: Counter) -> None:
    """In float32, whether a step runs as usual, is captured or replayed, at whatever width."""
    model, parameters = build()
    forward, _ = fuse(model)
    step = GraphedMicroStep(forward, sft, parameters, longest=128, max_graphs=4)
    step._pool = object()  # type: ignore[assignment]
    draw = random.Random(1)
    lengths = [[draw.randint(20, 128) for _ in range(2)] for _ in range(30)]
    for i, pair in enumerate(lengths):
        batch = collate([[d] for d in documents(pair, seed=i)])
        found, loss = gradients(parameters, lambda batch=batch: step(batch))
        expected, plain = gradients(parameters, lambda batch=batch: backward(sft(forward(batch))))
        assert torch.allclose(loss, plain, rtol=1e-6)
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7
    assert 4 <= sum(captures.values()) <= 6


def leaves(loss: Tensor) -> set[object]:
    """Autograd's nodes that would accumulate a gradient."""
    found, seen, left = set(), set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node)
        left += [following for following, _ in node.next_functions]
    return found


def test_passes_share_no_leaf() -> None:
    """A captured pass waits for the stream of its leaves: an earlier loss that lives on must not own one."""
    forward, _ = fuse(build()[0])
    batch = collate([[d] for d in documents([40, 30])])
    first, second = sft(forward(batch)), sft(forward(batch))
    assert leaves(first) and leaves(second)
    assert not leaves(first) & leaves(second)


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


def gradients(parameters: list[nn.Parameter], run: object) -> tuple[list[Tensor], Tensor]:
    for p in parameters:
        p.main_grad.zero_()
    loss = run()  # type: ignore[operator]
    return [p.main_grad.clone() for p in parameters], loss
