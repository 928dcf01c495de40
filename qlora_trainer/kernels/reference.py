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

from .types import Adapter, HeadNorm, QuantizedWeight


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


def pack_adapters(adapters: Sequence[Adapter], extended: Tensor, n: int, k: int) -> None:
    """Fill the border of a group's extended weight [N+R, K+R]: A below the weight, scaling·B right of it.

    B is block-diagonal over the group's members, each in its own rows and rank columns.
    """
    extended[n:, :k] = 0
    extended[:n, k:] = 0
    for a in adapters:
        rank = a.A.shape[0]
        extended[n + a.rank0 : n + a.rank0 + rank, :k] = a.A
        extended[a.row0 : a.row0 + a.B.shape[0], k + a.rank0 : k + a.rank0 + rank] = a.B * a.scaling


def rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Write RMSNorm(x + delta)·(weight + offset) into `out` [M, K].

    Returns x + delta, rounded to x's dtype, and rstd, float32 [M]. `offset` is 1 where a checkpoint
    stores weight - 1 (Gemma).
    """
    total = x if delta is None else x + delta
    value = _wide(total)
    rstd = torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + eps)
    out.copy_(value * rstd * (_wide(weight) + offset))
    return total, rstd.squeeze(-1)


def rms_norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, offset: float, residual: Tensor | None, out: Tensor
) -> None:
    """Write d(loss)/dx of RMSNorm, plus the residual branch's gradient, into `out` [M, K].

    `residual` may be `out` itself.
    """
    grad = _wide(dy) * (_wide(weight) + offset)
    normed = _wide(x) * rstd[:, None]
    dx = rstd[:, None] * (grad - normed * (grad * normed).mean(-1, keepdim=True))
    out.copy_(dx if residual is None else dx + residual)


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


def glu(gate_up: Tensor, activation: str, out: Tensor) -> None:
    """Write activation(gate)·up into `out` [M, F]; gate_up [M, 2F]; activation "silu" or "gelu_tanh".

    SwiGLU and GeGLU: Shazeer 2020.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    out.copy_(_activate(_wide(gate), activation) * _wide(up))


def glu_backward_(d_act: Tensor, gate_up: Tensor, activation: str) -> None:
    """In place: gate_up [M, 2F] becomes its gradient, d_act [M, F] becomes activation(gate)·up."""
    gate, up = (_wide(part) for part in gate_up.chunk(2, dim=-1))
    grad = _wide(d_act)
    if activation == "silu":
        sigmoid = torch.sigmoid(gate)
        value, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    else:
        c, a = 0.7978845608028654, 0.044715  # sqrt(2/pi); Hendrycks & Gimpel 2016
        t = torch.tanh(c * (gate + a * gate**3))
        value = 0.5 * gate * (1 + t)
        slope = 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * c * (1 + 3 * a * gate * gate)
    act = value * up
    gate_up.copy_(torch.cat((grad * up * slope, grad * value), dim=-1))
    d_act.copy_(act)


def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor, softcap: float | None) -> Tensor:
    """Weighted cross-entropy of each row, float32 [S]; `logits` [S, V] become its gradient, in place.

    softcap: logits pass through cap·tanh(logits / cap) first (Gemma 2).
    """
    raw = _wide(logits)
    value = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    lse = torch.logsumexp(value, dim=-1)
    losses = (lse - value.gather(1, targets[:, None]).squeeze(1)) * weights
    grad = torch.exp(value - lse[:, None])
    grad.scatter_add_(1, targets[:, None], -torch.ones_like(grad[:, :1]))
    if softcap is not None:
        grad *= 1 - (value / softcap) ** 2
    logits.copy_(grad * weights[:, None])
    return losses


def thin_gradient(narrow: Tensor, wide: Tensor, row_scale: Tensor | None) -> Tensor:
    """narrowᵀ · (row_scale ∘ wide), float32 [R, C]: an adapter's gradient from [M, R] and [M, C]."""
    left = _wide(narrow) if row_scale is None else _wide(narrow) * row_scale[:, None]
    return left.T @ _wide(wide)


def quantize_fp8(x: Tensor, k: int, border: float, out: Tensor) -> Tensor:
    """Write e4m3 of x [M, K+R] into `out`, one scale a row; return the scales, float32 [M, 1].

    The scale comes from the first `k` columns; the rest are multiplied by `border` and saturate.
    """
    value = x.float()
    scale = value[:, :k].abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 448.0
    value = value / scale
    value[:, k:] *= border
    out.copy_(value.clamp_(-448.0, 448.0).to(torch.float8_e4m3fn))
    return scale
