"""Attention over more elements than 32 bits can count, against a plain computation of a few rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_trainer.kernels.attention import Layout, attend, attend_backward, backend

pytestmark = pytest.mark.gpu

N_Q, N_K, DIM = 32, 8, 128
FEW = 64  # rows with a gradient: their share of dk and dv is the whole of it


def plain(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> tuple[Tensor, ...]:
    """The last rows of one group's attention and all gradients that they cause, in float32."""
    q, k, v = (x.float().requires_grad_() for x in (q, k, v))
    scores = torch.einsum("mhd,nd->hmn", q, k) * DIM**-0.5
    row = torch.arange(len(k) - FEW, len(k), device=k.device)
    later = torch.arange(len(k), device=k.device)[None, :] > row[:, None]
    out = torch.einsum("hmn,nd->mhd", scores.masked_fill(later, float("-inf")).softmax(-1), v)
    out.backward(d_out.float())
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return out.detach(), q.grad, k.grad, v.grad


@pytest.mark.parametrize(
    ("tokens", "packed"),
    [
        (131_072, False),
        (277_504, False),
        (351_232, False),
        (544_512, False),
        (131_072, True),
        (351_232, True),
    ],
)
def test_long_rows_are_right_to_their_last(tokens: int, packed: bool) -> None:
    """131,072: heads in parts; 351,232: q, k, v span 2^31 elements; 544,512: so does the output."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.empty((tokens, N_Q + 2 * N_K, DIM), dtype=torch.bfloat16, device=device)
    qkv.normal_(generator=generator)
    q, k, v = qkv.split((N_Q, N_K, N_K), dim=1)
    borders = torch.tensor([0, 1000, tokens], dtype=torch.int32, device=device) if packed else None
    layout = Layout(1, tokens, borders)
    assert backend(device, layout, DIM, None) == ("flash" if packed else "cudnn")
    d_out = torch.zeros((tokens, N_Q, DIM), dtype=torch.bfloat16, device=device)
    d_out[-FEW:].normal_(generator=generator)
    given = d_out[-FEW:].clone()
    out, state = attend(q, k, v, layout, DIM**-0.5, None)
    dq, dk, dv = attend_backward(d_out, q, k, v, out, state, layout, DIM**-0.5, None)
    first = 1000 if packed else 0
    for group in range(0, N_K, 7):
        heads = slice(4 * group, 4 * group + 4)
        expected = plain(q[-FEW:, heads], k[first:, group], v[first:, group], given[:, heads])
        found = (out[-FEW:, heads], dq[-FEW:, heads], dk[first:, group], dv[first:, group])
        for a, b in zip(found, expected, strict=True):
            assert (a.float() - b).norm() < 0.02 * b.norm()
