"""Every operation against its plain-torch reference, and the reference against autograd in float64."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qlora_trainer.kernels import (
    Adapter,
    Fp8Rows,
    HeadNorm,
    NestedScales,
    Operations,
    QuantizedWeight,
    Target,
    plain,
    triton_set,
)

PLAIN = plain()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RANKS = (4, 8, 16, 64, 256)


@pytest.fixture(scope="module")
def fast() -> Operations:
    pytest.importorskip("triton")
    return triton_set()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def wide(m: int, k: int, border: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Poisoned, so that anything left unwritten shows."""
    return torch.full((m, k + border), float("nan"), dtype=dtype, device=DEVICE)


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    assert error < tolerance, f"relative error {error:.2e}"


def quantized(n: int, k: int, quant_type: str = "nf4", nested: bool = True) -> tuple[QuantizedWeight, Tensor]:
    """A weight in bitsandbytes' format and bitsandbytes' own dequantization of it."""
    packed, state = bnb.quantize_4bit(random(n, k), quant_type=quant_type, compress_statistics=nested)
    inner = state.state2
    scales = NestedScales(inner.code, inner.absmax, state.offset, inner.blocksize) if nested else None
    weight = QuantizedWeight(packed, state.code, state.absmax, scales, state.blocksize, (n, k))
    return weight, bnb.dequantize_4bit(packed, state)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("n", "k"), [(5, 64), (3, 192), (130, 576)])
def test_dequantized_values_are_those_of_bitsandbytes(
    fast: Operations, n: int, k: int, quant_type: str, nested: bool
) -> None:
    weight, expected = quantized(n, k, quant_type, nested)
    for operations in (PLAIN, fast):
        out = wide(n, k, 7)
        operations.dequantize(weight, out[:, :k])
        close(out[:, :k], expected, 1e-6)
        assert out[:, k:].isnan().all()


def test_dequantization_of_blocks_that_straddle_rows(fast: Operations) -> None:
    weight, expected = quantized(8, 24, nested=False)
    out = wide(8, 24, 0)
    fast.dequantize(weight, out)
    close(out, expected, 1e-6)


@pytest.mark.parametrize("rank", RANKS)
def test_adapters_land_in_the_border_of_the_extended_weight(fast: Operations, rank: int) -> None:
    k, rows, border = 70, (33, 5, 6), 3 * rank + 2
    n = sum(rows)
    for present in ((0, 1, 2), (2,), (0, 2)):
        adapters = [
            Adapter(random(rank, k, seed=i), random(rows[i], rank, seed=i), 0.5 + i, sum(rows[:i]), j * rank)
            for j, i in enumerate(present)
        ]
        expected, found = wide(n + border, k, border), wide(n + border, k, border)
        for operations, out in ((PLAIN, expected), (fast, found)):
            operations.pack_adapters(adapters, out[n:, :k], out[:n, k:])
        assert torch.equal(found[n:, :k], expected[n:, :k])
        close(found[:n, k:], expected[:n, k:])
        assert found[:n, :k].isnan().all() and found[n:, k:].isnan().all()


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("m", "k"), [(1, 64), (3, 123), (2, 576)])
def test_norm_with_residual_and_its_gradient(fast: Operations, m: int, k: int, offset: float) -> None:
    x, delta, weight, dy, residual = (random(m, k, seed=i) for i in range(5))
    weight = weight[0]
    a, b = (t.double().requires_grad_() for t in (x, delta))
    total = a + b
    y = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5) * (weight.double() + offset)
    y.backward(dy.double())
    for operations in (PLAIN, fast):
        out = wide(m, k, 5)
        added = delta.clone()
        stream, rstd = operations.rms_norm(x, added, weight, 1e-5, offset, out[:, :k])
        assert stream is added
        close(stream, total)
        close(out[:, :k], y)
        alone = wide(m, k, 0)
        operations.rms_norm(stream, None, weight, 1e-5, offset, alone)
        close(alone, y)
        dx = wide(m, k, 3)
        operations.rms_norm_backward(dy, stream, rstd, weight, offset, residual, dx[:, :k])
        assert a.grad is not None
        close(dx[:, :k], a.grad + residual)
        replaced = residual.clone()
        operations.rms_norm_backward(dy, stream, rstd, weight, offset, replaced, replaced)
        assert torch.equal(replaced, dx[:, :k])
        assert out[:, k:].isnan().all() and dx[:, k:].isnan().all()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("heads", "half"), [((4, 2, 16), 8), ((3, 1, 24), 8), ((9, 3, 64), 32)])
def test_rotation_and_its_gradient(
    fast: Operations, heads: tuple[int, int, int], half: int, biased: bool, normed: bool
) -> None:
    n_q, n_k, dim = heads
    m, n = 3, (n_q + 2 * n_k) * dim
    qkv, grad = random(m, n), random(m, n, seed=1)
    angle = random(m, half, seed=2)
    cos, sin = angle.cos(), angle.sin()
    bias = random(n, seed=3) if biased else None
    norms = None
    if normed:
        norms = HeadNorm(random(dim, seed=4), 1e-6, 0.0), HeadNorm(random(dim, seed=5), 1e-6, 0.0)

    raw = qkv.double().requires_grad_()
    value = (raw if bias is None else raw + bias.double()).view(m, n_q + 2 * n_k, dim)
    parts = list(value.split((n_q, n_k, n_k), dim=1))
    if norms is not None:
        for i, norm in enumerate(norms):
            rstd = torch.rsqrt(parts[i].pow(2).mean(-1, keepdim=True) + 1e-6)
            parts[i] = parts[i] * rstd * norm.weight.double()
    for i in (0, 1):
        first, second, rest = parts[i].split((half, half, dim - 2 * half), dim=-1)
        c, s = cos.double()[:, None], sin.double()[:, None]
        parts[i] = torch.cat((first * c - second * s, second * c + first * s, rest), dim=-1)
    expected = torch.cat(parts, dim=1).view(m, n)
    expected.backward(grad.double())

    dq, dk, dv = (g.contiguous() for g in grad.view(m, -1, dim).split((n_q, n_k, n_k), dim=1))
    for operations in (PLAIN, fast):
        out = wide(m, n, 0)
        operations.rotary(qkv, cos, sin, heads, bias, norms, out)
        close(out, expected)
        if norms is None:
            inside = qkv.clone()
            operations.rotary(inside, cos, sin, heads, bias, norms, inside)
            close(inside, expected)
        back = wide(m, n, 9)
        operations.rotary_backward(dq, dk, dv, qkv, cos, sin, heads, bias, norms, back[:, :n])
        assert raw.grad is not None
        close(back[:, :n], raw.grad)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("m", "f"), [(1, 96), (3, 123), (2, 1536)])
def test_gated_unit_and_its_gradient_in_place(fast: Operations, m: int, f: int, activation: str) -> None:
    gate_up, d_act = random(m, 2 * f), random(m, f, seed=1)
    x = gate_up.double().requires_grad_()
    gate, up = x.chunk(2, dim=-1)
    function = torch.nn.functional
    act = (function.silu(gate) if activation == "silu" else function.gelu(gate, approximate="tanh")) * up
    act.backward(d_act.double())
    narrow = torch.zeros(m, 0, device=DEVICE)
    for operations in (PLAIN, fast):
        out = wide(m, f, 5)
        operations.glu(gate_up, activation, out[:, :f])
        close(out[:, :f], act)
        both, single = wide(m, 2 * f, 3), d_act.clone()
        both[:, : 2 * f] = gate_up
        nothing = ((0, 0), (0, 0))
        operations.glu_backward_(single, both[:, : 2 * f], activation, narrow, narrow, nothing, (), (), ())
        assert x.grad is not None
        close(both[:, : 2 * f], x.grad)
        assert both[:, 2 * f :].isnan().all()


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("m", "f"), [(1, 96), (3, 123), (300, 200)])
def test_gated_unit_makes_adapter_gradients(fast: Operations, m: int, f: int, rank: int) -> None:
    gate_up, d_act = random(m, 2 * f), random(m, f, seed=1)
    v, u = random(m, rank, seed=2), random(m, 2 * rank, seed=3)
    ranks = ((0, rank), (rank, rank))
    act = wide(m, f, 0)
    PLAIN.glu(gate_up, "silu", act)
    for operations in (PLAIN, fast):
        grads = gate_up.clone()
        of_a = torch.ones(rank, f, device=DEVICE)
        of_gate, of_up = (torch.ones(f, rank, device=DEVICE) for _ in range(2))
        operations.glu_backward_(
            d_act.clone(), grads, "silu", v, u, ranks,
            [Target(of_a, 0, 0, 1.0, False)],
            [Target(of_gate, 0, 0, 2.0, True)], [Target(of_up, 0, 0, 2.0, True)],
        )  # fmt: skip
        close(of_a - 1, v.double().T @ act.double(), 2e-5)
        close(of_gate - 1, 2 * grads[:, :f].double().T @ u[:, :rank].double(), 2e-5)
        close(of_up - 1, 2 * grads[:, f:].double().T @ u[:, rank:].double(), 2e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("rows", "v"), [(1, 11), (3, 263), (2, 5000)])
def test_cross_entropy_and_its_gradient_in_place(
    fast: Operations, rows: int, v: int, softcap: float | None
) -> None:
    logits = random(rows, v) * 4
    targets = torch.arange(rows, device=DEVICE) * 7 % v
    x = logits.double().requires_grad_()
    value = x if softcap is None else softcap * torch.tanh(x / softcap)
    expected = torch.nn.functional.cross_entropy(value, targets, reduction="none")
    expected.sum().backward()
    for operations in (PLAIN, fast):
        found = logits.clone()
        close(operations.cross_entropy_(found, targets, softcap), expected)
        assert x.grad is not None
        close(found, x.grad, 5e-6)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("m", "c"), [(1, 40), (77, 130), (300, 64)])
def test_adapter_grad(fast: Operations, m: int, c: int, rank: int) -> None:
    narrow, wide_ = random(m, rank + 3), random(m, c, seed=1)
    scale, factor = random(m, seed=2), random(c, seed=3)
    half = c // 2
    for row_scale, column_scale in ((None, None), (scale, factor)):
        expected = narrow.double().T @ wide_.double()
        if row_scale is not None:
            expected = (narrow.double() * scale.double()[:, None]).T @ (wide_.double() * factor.double())
        for operations in (PLAIN, fast):
            plain_part = torch.ones(rank, half, device=DEVICE)
            turned_part = torch.ones(c - half, 3, device=DEVICE)
            targets = [Target(plain_part, 0, 0, 1.0, False), Target(turned_part, rank, half, 0.5, True)]
            operations.adapter_grad(narrow, wide_, row_scale, column_scale, targets)
            close(plain_part - 1, expected[:rank, :half], 2e-5)
            close((turned_part - 1).T, 0.5 * expected[rank:, half:], 2e-5)


def test_fp8_rows_carry_their_own_scale(fast: Operations) -> None:
    # Triton's interpreter cuts off where a GPU rounds to nearest
    coarse = 1.0 if DEVICE.type == "cuda" else 3.0
    m, k = 5, 96
    rows = torch.logspace(-4, 4, m, device=DEVICE)[:, None]
    x, u = random(m, k) * rows, random(m, 16, seed=1) * rows
    found = []
    for operations in (PLAIN, fast):
        out = Fp8Rows.empty(m, k + 16, DEVICE)
        operations.quantize_fp8(x, out)
        operations.pack_fp8(u, out.scales, 0.25, out.values[:, k:])
        value = out.values.float() * out.scales
        for i in range(m):
            close(value[i, :k], x[i], 0.04 * coarse)
            close(value[i, k:] * 4, u[i], 0.06 * coarse)
        found.append(value)
    close(found[1], found[0], 0.01 if coarse == 1.0 else 0.1)


@pytest.mark.parametrize("width", [96, 130])
def test_what_makes_a_row_gives_the_e4m3_that_quantizing_it_would(fast: Operations, width: int) -> None:
    m, dtype = 5, torch.bfloat16
    x, delta, dy = (random(m, width, seed=seed).to(dtype) for seed in range(3))
    weight, gate_up = random(width, seed=3).to(dtype), random(m, 2 * width, seed=4).to(dtype)
    for operations in (PLAIN, fast):
        _, rstd = operations.rms_norm(x, delta, weight, 1e-5, 0.0, torch.empty_like(x))

        def norm(out: Tensor, rows: Fp8Rows, operations: Operations = operations) -> None:
            operations.rms_norm(x, delta, weight, 1e-5, 0.0, out, rows)

        def back(
            out: Tensor, rows: Fp8Rows, operations: Operations = operations, rstd: Tensor = rstd
        ) -> None:
            operations.rms_norm_backward(dy, x, rstd, weight, 0.0, delta, out, rows)

        def gated(out: Tensor, rows: Fp8Rows, operations: Operations = operations) -> None:
            operations.glu(gate_up, "silu", out, rows)

        for make in (norm, back, gated):
            out = torch.empty(m, width + 16, dtype=dtype, device=DEVICE)[:, :width]
            fused, apart = (Fp8Rows.empty(m, width + 16, DEVICE) for _ in range(2))
            make(out, fused)
            operations.quantize_fp8(out, apart)
            assert torch.equal(fused.scales, apart.scales)
            assert torch.equal(fused.values[:, :width].float(), apart.values[:, :width].float())
            assert out.float().abs().max() > 0.1


def test_fp8_adapters_stand_at_their_weights_scale(fast: Operations) -> None:
    coarse = 1.0 if DEVICE.type == "cuda" else 3.0
    source, scale = random(70, 20), random(70, 1, seed=1).abs() * 0.01 + 0.01
    for operations in (PLAIN, fast):
        for matrix in (source, source.T.contiguous().T):
            out = torch.empty(70, 20, dtype=torch.float8_e4m3fn, device=DEVICE)
            operations.pack_fp8(matrix, scale, 0.5, out)
            close(out.float() * scale * 2, source, 0.04 * coarse)
