"""Attention some heads at a time is attention: long sequences get what short ones get."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_trainer.kernels import attention
from qlora_trainer.kernels.attention import Layout, attend, attend_backward

ROWS, LENGTH, N_Q, N_K, DIM = 2, 24, 8, 4, 16


def layout(packed: bool) -> Layout:
    ids = (torch.arange(LENGTH) >= 9).int().expand(ROWS, -1)
    return Layout(ROWS, LENGTH, document_ids=ids if packed else None)


def run(packed: bool, window: int | None) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(ROWS * LENGTH, N_Q + 2 * N_K, DIM, generator=generator)
    d_out = torch.randn(ROWS * LENGTH, N_Q, DIM, generator=generator)
    q, k, v = qkv.split((N_Q, N_K, N_K), dim=1)
    out, state = attend(q, k, v, layout(packed), DIM**-0.5, window)
    return out, *attend_backward(d_out, q, k, v, out, state, layout(packed), DIM**-0.5, window)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("most", ["sums", "offsets", "both"])
def test_parts_are_the_whole(monkeypatch, most: str, packed: bool, window: int | None) -> None:
    whole = run(packed, window)
    calls = []
    inner = attention._attend_backward
    monkeypatch.setattr(attention, "_attend_backward", lambda *a: calls.append(a[1].shape[1]) or inner(*a))
    if most != "offsets":
        monkeypatch.setattr(attention, "_ACCUMULATED", 4 * ROWS * LENGTH * N_Q * DIM // 3)
    if most != "sums":
        monkeypatch.setattr(attention, "_INT32", ROWS * LENGTH * DIM)
    found = run(packed, window)
    assert calls == ([N_Q] if most == "offsets" else [2] * N_K)
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
