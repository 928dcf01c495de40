"""Every operation of the fast path in plain torch: the specification, and what a CPU runs.

Comes in: 2-D activations [M, width] (M tokens, rows possibly strided), frozen weights, adapters.
Goes out: the same results as the Triton files beside it, up to rounding. Arithmetic is float32
inside an operation (float64 for float64 inputs) and rounds once, to the dtype of what it writes.

Shape legend: M tokens, K input width, N output width, R (padded) adapter rank of a group,
F feed-forward width, H heads, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .types import Adapter, Dropout, Fp8Rows, HeadNorm, QuantizedWeight, Target


def _wide(x: Tensor) -> Tensor:
    """`x` in the precision operations compute in."""
    return x if x.dtype == torch.float64 else x.float()


def block_scales(weight: QuantizedWeight) -> Tensor:
    """float32 [N*K / blocksize]: absmax of each block, the second level of quantization undone.

    QLoRA (Dettmers et al. 2023) section 3, "double quantization": c1 = code2[c1_8bit] * c2 + mean.
    """
    if weight.nested is None:
        return weight.absmax
    nested = weight.nested
    block = torch.arange(weight.absmax.numel(), device=weight.absmax.device) // nested.blocksize
    return nested.code[weight.absmax.int()] * nested.absmax[block] + nested.offset


def dequantize(weight: QuantizedWeight, out: Tensor) -> None:
    """Write the [N, K] values of a 4-bit weight into `out`; two codes a byte, high nibble first."""
    packed = weight.packed.view(-1)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)
    blocks = weight.code[codes.int()].view(-1, weight.blocksize)
    out.copy_((blocks * block_scales(weight)[:, None]).view(out.shape))


def pack_adapters(adapters: Sequence[Adapter], a: Tensor, b: Tensor) -> None:
    """Lay a group's adapters out for one product: `a` [R, K] is A, `b` [N, R] is scaling·B.

    B is block-diagonal over the group's members, each in its own rows and rank columns; what no
    member owns becomes zero. `a` and `b` may be the border of an extended weight (strided).
    """
    a.zero_()
    b.zero_()
    for x in adapters:
        rank = slice(x.rank0, x.rank0 + x.A.shape[0])
        a[rank] = x.A
        b[x.row0 : x.row0 + x.B.shape[0], rank] = x.B * x.scaling


_FACTORS = 0x21F0AAAD, 0xD35A2D97 - (1 << 32)  # as int32, whose products wrap
_GOLDEN = 0x9E3779B9 - (1 << 32)  # 2^32 / golden ratio, odd: its multiples are spread evenly


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32 bits, each bit of whose result depends on every bit of `x`, int32.

    Two rounds of multiply and xor-shift, with the public-domain constants of least bias that
    github.com/skeeto/hash-prospector lists. A CPU does five int32 products in the time of an int64 one.
    """
    x = x ^ (x >> 16 & 0xFFFF)  # >> is arithmetic: the mask makes it a shift of bits
    x *= _FACTORS[0]
    x ^= x >> 15 & 0x1FFFF
    x *= _FACTORS[1]
    x ^= x >> 15 & 0x1FFFF
    return x


def kept(dropout: Dropout, adapter: int, rows: int, columns: int) -> Tensor:
    """bool [rows, columns]: which elements of its input the group's `adapter` (0, 1, …) sees.

    Row and column are spread over 32 bits apart and mixed together, so that no counter of elements
    exists that could overflow, and no row's bits are another's moved along. One mixture decides on
    two neighbouring columns.
    """
    low, high = dropout.seed.view(1).view(torch.int32)
    key = _mixed(_mixed(_mixed(low) ^ high) ^ (dropout.first + adapter))
    row = torch.arange(dropout.row0, dropout.row0 + rows, dtype=torch.int32, device=key.device)
    pair = torch.arange((columns + 1) // 2, dtype=torch.int32, device=key.device)
    bits = _mixed(_mixed(key ^ row)[:, None] ^ pair * _GOLDEN)
    return (torch.stack((bits << 16, bits), dim=-1) >= dropout.threshold).flatten(1)[:, :columns]


def _seen(x: Tensor, dropout: Dropout, adapter: int) -> Tensor:
    """mask ∘ x."""
    return x * kept(dropout, adapter, *x.shape).to(x.dtype)  # a product with bool is not vectorised


def project_dropped(x: Tensor, a: Tensor, dropout: Dropout, out: Tensor) -> None:
    """scale · (mask ∘ x)·Aᵀ of each adapter into its columns of `out` [M, R]; the others become zero.

    x [M, K]; a [≥ all ranks, K], the adapters' A one below the other. Dropout as PEFT applies it:
    to the input of A, not to that of the frozen weight.
    """
    out.zero_()
    for i, (start, end) in enumerate(dropout.spans):
        out[:, start:end] = _seen(_wide(x), dropout, i) @ _wide(a[start:end]).T * dropout.scale


def add_dropped_(dx: Tensor, v: Tensor, a: Tensor, dropout: Dropout) -> None:
    """dx [M, K] += scale · mask ∘ (v·A), summed over the adapters: the way back of `project_dropped`."""
    total = _wide(dx)
    for i, (start, end) in enumerate(dropout.spans):
        part = _wide(v[:, start:end]) @ _wide(a[start:end])
        total.add_(_seen(part, dropout, i), alpha=dropout.scale)
    dx.copy_(total)


def rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float, out: Tensor,
    rows: Fp8Rows | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write RMSNorm(x + delta)·(weight + offset) into `out` [M, K], and `out` in e4m3 into `rows`.

    Returns x + delta, rounded to x's dtype, which takes the place of `delta`, and rstd, float32 [M].
    `offset` is 1 where a checkpoint stores weight - 1 (Gemma).
    """
    total = x if delta is None else delta.add_(x)
    value = _wide(total)
    rstd = torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + eps)
    out.copy_(value * rstd * (_wide(weight) + offset))
    if rows is not None:
        quantize_fp8(out, rows)
    return total, rstd.squeeze(-1)


def rms_norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, offset: float, residual: Tensor | None, out: Tensor,
    rows: Fp8Rows | None = None,
) -> None:  # fmt: skip
    """Write d(loss)/dx of RMSNorm, plus the residual branch's gradient, into `out` [M, K].

    `residual` may be `out` itself. `rows` takes `out` in e4m3.
    """
    grad = _wide(dy) * (_wide(weight) + offset)
    normed = _wide(x) * rstd[:, None]
    dx = rstd[:, None] * (grad - normed * (grad * normed).mean(-1, keepdim=True))
    out.copy_(dx if residual is None else dx + residual)
    if rows is not None:
        quantize_fp8(out, rows)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2·half of D in pairs (i, i + half); x [M, H, D], cos and sin [M, half]."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def rotary(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int, int], bias: Tensor | None,
    norms: tuple[HeadNorm, HeadNorm] | None, out: Tensor,
) -> None:  # fmt: skip
    """Bias, per-head norm and rotation of a fused [M, (Hq + 2·Hk)·D] projection, written into `out`.

    heads: (Hq, Hk, D). cos, sin: float32 [M, half], half ≤ D/2. `out` may be `qkv` itself.
    RoPE: Su et al. 2021, in the half-split layout of the Llama checkpoints.
    """
    n_q, n_k, dim = heads
    value = _wide(qkv if bias is None else qkv + bias)
    value = value.view(-1, n_q + 2 * n_k, dim)
    parts = [value[:, :n_q], value[:, n_q : n_q + n_k]]
    if norms is not None:
        parts = [
            p * torch.rsqrt(p.pow(2).mean(-1, keepdim=True) + n.eps) * (_wide(n.weight) + n.offset)
            for p, n in zip(parts, norms, strict=True)
        ]
    cos, sin = cos.to(value.dtype), sin.to(value.dtype)
    turned = [_rotate(p, cos, sin) for p in parts]
    out.copy_(torch.cat((*turned, value[:, n_q + n_k :]), dim=1).view(out.shape))


def rotary_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor | None, cos: Tensor, sin: Tensor,
    heads: tuple[int, int, int], bias: Tensor | None, norms: tuple[HeadNorm, HeadNorm] | None, out: Tensor,
) -> None:  # fmt: skip
    """Gradient of the fused projection into `out` [M, (Hq + 2·Hk)·D] from dq [M, Hq, D], dk, dv [M, Hk, D].

    `qkv` is the projection as it came from the product; only per-head norms need it.
    """
    n_q, n_k, dim = heads
    back = [_rotate(_wide(g), cos.to(_wide(g).dtype), -sin.to(_wide(g).dtype)) for g in (dq, dk)]
    if norms is not None:
        assert qkv is not None
        value = _wide(qkv if bias is None else qkv + bias).view(-1, n_q + 2 * n_k, dim)
        for i, (x, n) in enumerate(zip((value[:, :n_q], value[:, n_q : n_q + n_k]), norms, strict=True)):
            rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + n.eps)
            grad = back[i] * (_wide(n.weight) + n.offset)
            back[i] = rstd * (grad - x * rstd * (grad * x * rstd).mean(-1, keepdim=True))
    out.copy_(torch.cat((*back, _wide(dv)), dim=1).view(out.shape))


def _activate(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh")


def glu(gate_up: Tensor, activation: str, out: Tensor, rows: Fp8Rows | None = None) -> None:
    """Write activation(gate)·up into `out` [M, F], and `out` in e4m3 into `rows`.

    gate_up [M, 2F]; activation "silu" or "gelu_tanh". SwiGLU and GeGLU: Shazeer 2020.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    out.copy_(_activate(_wide(gate), activation) * _wide(up))
    if rows is not None:
        quantize_fp8(out, rows)


def glu_backward_(
    d_act: Tensor, gate_up: Tensor, activation: str, v: Tensor, u: Tensor,
    ranks: tuple[tuple[int, int], tuple[int, int]],
    down: Sequence[Target], gate: Sequence[Target], up: Sequence[Target], dropout: Dropout | None = None,
) -> None:  # fmt: skip
    """gate_up [M, 2F] becomes its gradient, in place; d_act [M, F] is used up.

    Also adds the thin products with what passes by: vᵀ·activation to `down` (v [M, r]), and, with
    (first column, columns) of u [M, R] from `ranks`, u_gateᵀ·d_gate to `gate` and u_upᵀ·d_up to `up`.
    dropout: of the down projection's adapter, on the activation.
    """
    g, x = (_wide(part) for part in gate_up.chunk(2, dim=-1))
    grad = _wide(d_act)
    if activation == "silu":
        sigmoid = torch.sigmoid(g)
        value, slope = g * sigmoid, sigmoid * (1 + g * (1 - sigmoid))
    else:
        c, k = 0.7978845608028654, 0.044715  # sqrt(2/pi); Hendrycks & Gimpel 2016
        t = torch.tanh(c * (g + k * g**3))
        value = 0.5 * g * (1 + t)
        slope = 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * c * (1 + 3 * k * g * g)
    act = (value * x).to(gate_up.dtype)
    gate_up.copy_(torch.cat((grad * x * slope, grad * value), dim=-1))
    d_gate, d_up = gate_up.chunk(2, dim=-1)
    for narrow, wide, targets, masks in (
        (v, act, down, dropout),
        (u[:, ranks[0][0] : sum(ranks[0])], d_gate, gate, None),
        (u[:, ranks[1][0] : sum(ranks[1])], d_up, up, None),
    ):
        if targets:
            adapter_grad(narrow, wide, None, None, targets, masks)


def cross_entropy_(logits: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """Cross-entropy of each row, float32 [S]; `logits` [S, V] become its gradient, in place.

    softcap: logits pass through cap·tanh(logits / cap) first (Gemma 2).
    """
    raw = _wide(logits)
    value = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    lse = torch.logsumexp(value, dim=-1)
    losses = lse - value.gather(1, targets[:, None]).squeeze(1)
    grad = torch.exp(value - lse[:, None])
    grad.scatter_add_(1, targets[:, None], -torch.ones_like(grad[:, :1]))
    if softcap is not None:
        grad *= 1 - (value / softcap) ** 2
    logits.copy_(grad)
    return losses


def adapter_grad(
    narrow: Tensor,
    wide: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    targets: Sequence[Target],
    dropout: Dropout | None = None,
) -> None:
    """narrowᵀ · (row_scale ∘ wide ∘ column_scale) of [M, R] and [M, C], parts of it added to `targets`.

    dropout: each adapter's columns of `narrow` meet only what its mask leaves of `wide`, times scale.
    """
    left = _wide(narrow) if row_scale is None else _wide(narrow) * row_scale[:, None]
    if dropout is None:
        product = left.T @ _wide(wide)
    else:
        spans = enumerate(dropout.spans)
        parts = [left[:, start:end].T @ _seen(_wide(wide), dropout, i) for i, (start, end) in spans]
        product = torch.cat(parts) * dropout.scale
    if column_scale is not None:
        product = product * column_scale
    for t in targets:
        rows, columns = (t.out.shape[1], t.out.shape[0]) if t.transposed else t.out.shape
        part = product[t.row0 : t.row0 + rows, t.column0 : t.column0 + columns]
        t.out.add_(part.T if t.transposed else part, alpha=t.alpha)


def quantize_fp8(x: Tensor, rows: Fp8Rows) -> None:
    """Write `x` [M, K] in e4m3 into K columns of `rows`, each row's largest value as 448, and the scales."""
    scale = x.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 448.0
    rows.scales.copy_(scale)
    rows.values[:, : x.shape[1]].copy_((x.float() / scale).clamp_(-448.0, 448.0).to(torch.float8_e4m3fn))


def pack_fp8(source: Tensor, scale: Tensor, factor: float, out: Tensor) -> None:
    """Write e4m3 of factor · source / scale [n, 1] into `out` [n, R]; saturates; `source` may be strided."""
    value = source.float() * (factor / scale)
    out.copy_(value.clamp_(-448.0, 448.0).to(torch.float8_e4m3fn))


def fp8_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, out: Tensor) -> None:
    """(x_scale ∘ x) · (weight_scale ∘ weight)ᵀ into `out` [M, N]; e4m3 x [M, K], weight [N, K]."""
    out.copy_((x.float() * x_scale) @ (weight.float() * weight_scale).T)
