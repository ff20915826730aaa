"""Attention over whole sequences, exact for packed documents, padding and sliding windows.

Nothing here builds an S x S mask for packed documents: each document is one call of the kernel, so that cost grows with
the sum of the squared document lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Bound at import, before anything is patched: `attend` must reach the kernel and not the interceptor.
from torch.nn.functional import scaled_dot_product_attention as _sdpa

from lightning_ulysses.layout import Runs


@dataclass(frozen=True)
class MaskSpec:
    """Which keys a query may see, without a mask tensor.

    Args:
        causal: Query i sees keys up to i.
        window: With ``causal``, query i sees keys after i - window only.
        documents: Per row, the documents that must not see each other.
        valid: Per row, the runs of keys that a padding mask keeps.
        num_padding: Keys at the end of every row that nothing may see.
    """

    causal: bool
    window: int | None = None
    documents: tuple[Runs, ...] | None = None
    valid: tuple[Runs, ...] | None = None
    num_padding: int = 0


# The CPU kernel reads k and v once per block of queries. From about this many keys on it gains more (3 to 10 percent)
# from heads that lie close together in memory than it costs to move them there.
_COPY_FROM = 1024


@dataclass(frozen=True)
class _Kernel:
    """The arguments that every call of the kernel shares."""

    scale: float | None
    dropout_p: float

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None) -> Tensor:
        gqa = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        if q.device.type == "cpu" and k.shape[2] >= _COPY_FROM:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        return _sdpa(q, k, v, attn_mask=mask, dropout_p=self.dropout_p, is_causal=causal, scale=self.scale, **gqa)


def _cat(parts: list[Tensor]) -> Tensor:
    """Joins (B, H, S_i, D) along S, laid out in memory as (B, S, H, D), which the way back sends without a copy."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def _split(tensor: Tensor, lengths: list[int]) -> list[Tensor]:
    """Cuts (B, H, S, D) along S, for gradients that are joined as in `_cat`.

    The backward of a slice is a whole tensor of zeros with the slice filled in, one for each; that of a split is one
    concatenation.
    """
    if len(lengths) == 1:
        return [tensor]
    return [part.transpose(1, 2) for part in tensor.transpose(1, 2).split(lengths, dim=1)]


def _windowed(kernel: _Kernel, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal sliding window in blocks of queries: S * 2 * window instead of S * S."""
    length, outputs = q.shape[2], []
    lengths = [min(window, length - begin) for begin in range(0, length, window)]
    queries, keys, values = (_split(tensor, lengths) for tensor in (q, k, v))
    for index, block in enumerate(queries):
        begin, seen = index * window, slice(max(0, index - 1), index + 1)
        end, first = begin + lengths[index], seen.start * window
        query = torch.arange(begin, end, device=q.device)[:, None]
        key = torch.arange(first, end, device=q.device)[None, :]
        mask = (key <= query) & (key > query - window)
        outputs.append(kernel(block, _cat(keys[seen]), _cat(values[seen]), mask=mask))
    return _cat(outputs)


def _masked_keys(kernel: _Kernel, q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, valid: Runs) -> Tensor:
    """One document of which only the runs ``valid`` may be seen; queries outside of them are computed as well."""
    length = q.shape[2]
    if not valid:
        return (q.sum(dim=-1, keepdim=True) * 0).expand(*q.shape[:3], v.shape[3])
    if spec.causal and spec.window is not None:
        keep = torch.zeros(length, dtype=torch.bool, device=q.device)
        for begin, end in valid:
            keep[begin:end] = True
        query = torch.arange(length, device=q.device)[:, None]
        key = torch.arange(length, device=q.device)[None, :]
        return kernel(q, k, v, mask=(key <= query) & (key > query - spec.window) & keep)
    keys = _cat([k[:, :, begin:end] for begin, end in valid])
    values = _cat([v[:, :, begin:end] for begin, end in valid])
    if not spec.causal:
        return kernel(q, keys, values)
    # Seen among themselves, the kept tokens are plainly causal; a dropped query sees all the kept keys before it.
    kept = kernel(_cat([q[:, :, begin:end] for begin, end in valid]), keys, values, causal=True)
    outputs, position, seen = [], 0, 0
    for begin, end in (*valid, (length, length)):
        if position < begin:
            hidden = q[:, :, position:begin]
            if seen:
                outputs.append(kernel(hidden, keys[:, :, :seen], values[:, :, :seen]))
            else:
                outputs.append((hidden.sum(dim=-1, keepdim=True) * 0).expand(*hidden.shape[:3], v.shape[3]))
        if begin < end:
            outputs.append(kept[:, :, seen : seen + end - begin])
        position, seen = end, seen + end - begin
    return _cat(outputs)


def _document(kernel: _Kernel, q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, valid: Runs | None) -> Tensor:
    """One document, (B, H, S_doc, D)."""
    if valid is not None and valid != ((0, q.shape[2]),):
        return _masked_keys(kernel, q, k, v, spec, valid)
    if spec.causal and spec.window is not None and spec.window < q.shape[2]:
        return _windowed(kernel, q, k, v, spec.window)
    return kernel(q, k, v, causal=spec.causal)


def _clip(runs: Runs, begin: int, end: int) -> Runs:
    """The part of ``runs`` inside ``begin:end``, counted from ``begin``."""
    clipped = ((max(left, begin) - begin, min(right, end) - begin) for left, right in runs)
    return tuple((left, right) for left, right in clipped if left < right)


def _row_runs(spec: MaskSpec, row: int, length: int) -> tuple[Runs, Runs | None]:
    """Documents and kept keys of one row, with padding folded into the latter where it matters."""
    documents = spec.documents[row] if spec.documents is not None else ((0, length),)
    valid = spec.valid[row] if spec.valid is not None else None
    if spec.num_padding and not spec.causal:
        valid = _clip(valid if valid is not None else ((0, length),), 0, length - spec.num_padding)
    return documents, valid


def _with_bias(bias: Tensor, spec: MaskSpec, rows: list[tuple[Runs, Runs | None]], length: int) -> Tensor:
    """(B | 1, H_r | 1, S, S) with everything hidden that ``spec`` hides."""
    padding = length - bias.shape[-1]
    if padding:
        bias = torch.nn.functional.pad(bias, (0, padding, 0, padding), value=bias.dtype == torch.bool)
    place = torch.arange(length, device=bias.device)
    kept = []
    for documents, valid in rows:
        number = torch.zeros(length, dtype=torch.int64, device=bias.device)
        seen = torch.full((length,), valid is None, device=bias.device)
        for index, (begin, end) in enumerate(documents):
            number[begin:end] = index
        for begin, end in valid or ():
            seen[begin:end] = True
        kept.append((number[:, None] == number) & seen & (place < length - spec.num_padding))
    keep = torch.stack(kept).unsqueeze(1)
    if spec.causal:
        keep = keep & (place <= place[:, None])
    if spec.causal and spec.window is not None:
        keep = keep & (place > place[:, None] - spec.window)
    # Nobody asks for what padding gets, but a row without a key would be NaN.
    keep = keep | ~keep.any(dim=-1, keepdim=True)
    return bias & keep if bias.dtype == torch.bool else bias.masked_fill(~keep, float("-inf"))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: MaskSpec,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    kv_index: tuple[int, ...] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention over whole sequences.

    Args:
        q: (B, H_r, S, D).
        k: (B, heads, S, D), where heads divides H_r, or ``kv_index`` is given.
        v: (B, heads, S, D_v).
        spec: Which keys each query sees.
        scale: Of the scores; 1 / sqrt(D) if None.
        dropout_p: Dropout probability of the attention weights.
        kv_index: For each query head its key/value head, where groups are uneven.
        bias: (B | 1, H_r | 1, S, S) added to the scores, or True where a query sees a key; on top of ``spec``.

    Returns:
        (B, H_r, S, D_v).
    """
    if kv_index is not None:
        index = torch.tensor(kv_index, device=k.device)
        k, v = k.index_select(1, index), v.index_select(1, index)
    kernel = _Kernel(scale, dropout_p)
    rows = [_row_runs(spec, row, q.shape[2]) for row in range(q.shape[0])]
    if bias is not None:
        return kernel(q, k, v, mask=_with_bias(bias, spec, rows, q.shape[2]))
    if all(row == rows[0] for row in rows):
        rows = rows[:1]
    outputs = []
    q_rows, k_rows, v_rows = (tensor.split(1) if len(rows) > 1 else (tensor,) for tensor in (q, k, v))
    for (documents, valid), *row in zip(rows, q_rows, k_rows, v_rows, strict=True):
        lengths = [end - begin for begin, end in documents]
        queries, keys, values = (_split(tensor, lengths) for tensor in row)
        parts = []
        for number, run in enumerate(documents):
            runs = None if valid is None else _clip(valid, *run)
            parts.append(_document(kernel, queries[number], keys[number], values[number], spec, runs))
        outputs.append(_cat(parts))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
