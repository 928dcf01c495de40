"""Exact causal attention, forward and backward, by the fastest of PyTorch's own operations.

Comes in: q [M, Hq, D], k and v [M, Hk, D], possibly strided views of one projection, and the
`Layout` of the M tokens. Goes out: attention output [M, Hq, D] and what its backward needs.

    dense rows, CUDA, no window, D ≤ 128   cuDNN (1.7 times FlashAttention-2 on Hopper)
    other CUDA                             FlashAttention-2, variable lengths for packed rows
    CPU                                    the flash kernel of scaled_dot_product_attention

Grouped-query heads are never repeated where the operation takes them as they are. Long sequences go
through the backward pass some heads at a time: its float32 sums, and the keys' gradients before their
groups are added, would take more memory than anything else of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

_aten = torch.ops.aten
_ACCUMULATED = 1 << 29  # bytes of float32 gradient that a backward pass may sum up in at once
_INT32 = 1 << 31  # elements: what is larger does not reach an operation whole


@dataclass
class Layout:
    """How M = batch * length tokens form sequences.

    cu_seqlens: int32 [n+1], borders of documents among the M tokens, when packed on CUDA; repeats of
    the last border are empty documents. document_ids: int32 [batch, length] when packed on the CPU.
    """

    batch: int
    length: int
    cu_seqlens: Tensor | None = None
    document_ids: Tensor | None = None
    _masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Additive mask [batch or 1, 1, length, length], or None where plain causality is enough."""
        if window is not None and window >= self.length:
            window = None
        if self.document_ids is None and window is None:
            return None
        key = (window, dtype)
        if key not in self._masks:
            position = torch.arange(self.length, device=device)
            distance = position[:, None] - position[None, :]
            allowed = (distance >= 0)[None]
            if window is not None:
                allowed = allowed & (distance < window)
            if self.document_ids is not None:
                allowed = allowed & (self.document_ids[:, :, None] == self.document_ids[:, None, :])
            zero = torch.zeros((), dtype=dtype, device=device)
            self._masks[key] = torch.where(allowed, zero, float("-inf"))[:, None]
        return self._masks[key]


State = tuple[
    Tensor | None, ...
]  # what the backward needs beside q, k, v and the output; [0] is the log-sum-exp


def backend(device: torch.device, layout: Layout, head_dim: int, window: int | None) -> str:
    """Which operation serves: "cudnn", "flash" or "cpu"."""
    if device.type != "cuda":
        return "cpu"
    windowed = window is not None and window < layout.length
    if layout.cu_seqlens is not None or windowed or head_dim > 128 or head_dim % 8:
        return "flash"
    return "cudnn" if torch.cuda.get_device_capability(device) >= (8, 0) else "flash"


def _rows(x: Tensor, layout: Layout) -> Tensor:
    """[M, H, D] -> [batch, H, length, D], no copy."""
    return x.unflatten(0, (layout.batch, layout.length)).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """[batch, H, length, D] -> [M, H, D]."""
    return x.transpose(1, 2).flatten(0, 1)


@cache
def _cudnn_takes_groups(device: torch.device) -> bool:
    """Whether cuDNN's operation accepts fewer key heads than query heads (it does from cuDNN 9)."""
    q = torch.randn(1, 2, 64, 64, device=device, dtype=torch.bfloat16)
    try:
        out = _aten._scaled_dot_product_cudnn_attention(q, q[:, :1], q[:, :1], None, True, 0.0, True, False)
        grads = _aten._scaled_dot_product_cudnn_attention_backward(
            out[0],
            q,
            q[:, :1],
            q[:, :1],
            out[0],
            out[1],
            out[6],
            out[7],
            None,
            out[2],
            out[3],
            64,
            64,
            0.0,
            True,
        )
    except RuntimeError:
        return False
    return grads[1].shape == (1, 1, 64, 64)


def _repeat(x: Tensor, n: int) -> Tensor:
    return x if n == 1 else x.repeat_interleave(n, dim=1)


def _unrepeat(grad: Tensor, n: int) -> Tensor:
    return grad if n == 1 else grad.unflatten(1, (-1, n)).sum(2)


def _parts(heads: int, size: int, most: int) -> int:
    """The smallest divisor of the key `heads` that cuts `size` into parts of `most` or less; else all."""
    return next((n for n in range(1, heads + 1) if heads % n == 0 and size <= n * most), heads)


def accumulation_parts(q_numel: int, key_heads: int) -> int:
    """Shares of the heads that a backward pass over `q_numel` elements of queries takes one after another."""
    return _parts(key_heads, 4 * q_numel, _ACCUMULATED)


def copies(numel: int) -> bool:
    """Whether a tensor of `numel` elements reaches an operation only as copies of its heads."""
    return numel >= _INT32


def _span(x: Tensor) -> int:
    """Elements from the first of a [M, H, D] view to its last."""
    return (x.shape[0] - 1) * x.stride(0) + x.shape[1] * x.shape[2]


def _share(x: Tensor, part: int, parts: int) -> Tensor:
    """The heads of one part: a view, or a copy where its rows lie too far apart for 32-bit offsets."""
    heads = x.shape[1] // parts
    view = x[:, part * heads : (part + 1) * heads]
    return view.contiguous() if copies(_span(x)) else view


def _head_axis(log_sum_exp: Tensor) -> int:
    return 0 if log_sum_exp.dim() == 2 else 1  # [H, M] of packed rows, else [batch, H, length, …]


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None
) -> tuple[Tensor, State]:
    """Causal attention; `window` keeps the last `window` keys of each query (Mistral's convention)."""
    parts = _parts(k.shape[1], max(_span(q), _span(k), _span(v)), _INT32 - 1)
    if parts == 1:
        return _attend(q, k, v, layout, scale, window)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sums: list[Tensor] = []
    rest: State = ()
    width = q.shape[1] // parts
    for part in range(parts):
        some_q, some_k, some_v = (_share(x, part, parts) for x in (q, k, v))
        heads, (log_sum_exp, *others) = _attend(some_q, some_k, some_v, layout, scale, window)
        out[:, part * width : (part + 1) * width] = heads
        assert log_sum_exp is not None
        sums.append(log_sum_exp)
        rest = tuple(others)
        del some_q, some_k, some_v, heads
    return out, (torch.cat(sums, _head_axis(sums[0])), *rest)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None
) -> tuple[Tensor, State]:
    which = backend(q.device, layout, q.shape[-1], window)
    left = window - 1 if window is not None and window < layout.length else None
    if which == "flash":
        cu, length = layout.cu_seqlens, layout.length
        if cu is None:
            q, k, v = (x.unflatten(0, (layout.batch, layout.length)) for x in (q, k, v))
        out, lse, rng, unused, _ = _aten._flash_attention_forward(
            q, k, v, cu, cu, length, length, 0.0, True, False, scale=scale,
            window_size_left=left, window_size_right=None if left is None else 0,
        )  # fmt: skip
        return (out if cu is not None else out.flatten(0, 1)), (lse, rng, unused)
    groups = q.shape[1] // k.shape[1]
    q, k, v = (_rows(x, layout) for x in (q, k, v))
    if which == "cudnn":
        if groups > 1 and not _cudnn_takes_groups(q.device):
            k, v = _repeat(k, groups), _repeat(v, groups)
        result = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
        out, lse, cum_q, cum_k, _, _, seed, offset, _ = result
        return _flat(out), (lse, cum_q, cum_k, seed, offset)
    mask = layout.mask(window, q.dtype, q.device)
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        q, _repeat(k, groups), _repeat(v, groups), 0.0, mask is None, attn_mask=mask, scale=scale
    )
    return _flat(out), (lse,)


def attend_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: State, layout: Layout, scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q [M, Hq, D] and of k, v [M, Hk, D]. That of q may take the place of `d_out`."""
    parts = accumulation_parts(q.numel(), k.shape[1])
    if parts == 1:
        return _attend_backward(d_out, q, k, v, out, state, layout, scale, window)
    log_sum_exp, *rest = state
    assert log_sum_exp is not None
    shares = log_sum_exp.chunk(parts, _head_axis(log_sum_exp))
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    for part, share in enumerate(shares):
        some_d, some_q, some_k, some_v, some_out = (_share(x, part, parts) for x in (d_out, q, k, v, out))
        found = _attend_backward(
            some_d, some_q, some_k, some_v, some_out, (share.contiguous(), *rest), layout, scale, window
        )
        for whole, gradient in zip((d_out, dk, dv), found, strict=True):
            heads = whole.shape[1] // parts
            whole[:, part * heads : (part + 1) * heads] = gradient
        del some_d, some_q, some_k, some_v, some_out, found, gradient
    return d_out, dk, dv


def _attend_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: State, layout: Layout, scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    which = backend(q.device, layout, q.shape[-1], window)
    left = window - 1 if window is not None and window < layout.length else None
    if which == "flash":
        cu, length = layout.cu_seqlens, layout.length
        lse, rng, unused = state
        if cu is None:
            d_out, q, k, v, out = (
                x.unflatten(0, (layout.batch, layout.length)) for x in (d_out, q, k, v, out)
            )
        grads = _aten._flash_attention_backward(
            d_out, q, k, v, out, lse, cu, cu, length, length, 0.0, True, rng, unused, scale=scale,
            window_size_left=left, window_size_right=None if left is None else 0,
        )  # fmt: skip
        return grads if cu is not None else tuple(g.flatten(0, 1) for g in grads)
    groups = q.shape[1] // k.shape[1]
    d_out, q, k, v, out = (_rows(x, layout) for x in (d_out, q, k, v, out))
    if which == "cudnn":
        repeats = 1 if groups == 1 or _cudnn_takes_groups(q.device) else groups
        lse, cum_q, cum_k, seed, offset = state
        dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
            d_out, q, _repeat(k, repeats), _repeat(v, repeats), out, lse, seed, offset, None, cum_q, cum_k,
            layout.length, layout.length, 0.0, True, scale=scale,
        )  # fmt: skip
    else:
        repeats = groups
        mask = layout.mask(window, q.dtype, q.device)
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, _repeat(k, groups), _repeat(v, groups), out, state[0], 0.0, mask is None,
            attn_mask=mask, scale=scale,
        )  # fmt: skip
    return _flat(dq), _flat(_unrepeat(dk, repeats)), _flat(_unrepeat(dv, repeats))
