"""Attention over whole sequences, exact for packed documents, padding and sliding windows.

Nothing here builds an S x S mask for packed documents: each document is one call of the kernel, so that cost grows with
the sum of the squared document lengths.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ulysses.attention.draws import own_draws
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.attention.kernel import Kernel
from lightning_ulysses.attention.packed import attend_packed, fits
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.layout import Runs
from lightning_ulysses.geometry.mask_spec import MaskSpec

# Queries that share a mask tensor.
_LONGEST_BLOCK = 2048


def _cat(parts: list[Tensor]) -> Tensor:
    """Joins (B, H, S_i, D) along S, laid out in memory as (B, S, H, D), which the way back sends without a copy."""
    if len(parts) == 1:
        return parts[0]
    # Each (B, H, S_i, D) -> (B, S_i, H, D) -> (B, S, H, D) -> (B, H, S, D)
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def _split(tensor: Tensor, lengths: list[int]) -> list[Tensor]:
    """Cuts (B, H, S, D) along S, for gradients that are joined as in `_cat`.

    The backward of a slice is a whole tensor of zeros with the slice filled in, one for each; that of a split is one
    concatenation.
    """
    if len(lengths) == 1:
        return [tensor]
    # (B, H, S, D) -> (B, S, H, D) -> each (B, S_i, H, D) -> (B, H, S_i, D)
    return [part.transpose(1, 2) for part in tensor.transpose(1, 2).split(lengths, dim=1)]


def _nothing(q: Tensor, v: Tensor) -> Tensor:
    """What queries get that see no key: zeros, (B, H, S, D_v), with a gradient of zeros."""
    return (q.sum(dim=-1, keepdim=True) * 0).expand(*q.shape[:3], v.shape[3])


def _blocks(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, valid: Runs | None) -> Tensor:
    """Blocks of queries with a mask each: with a window S * 3 * window instead of S * S, and that much memory."""
    length, outputs = q.shape[2], []
    back, ahead = spec.reach or (length, 0 if spec.causal else length)
    # Blocks as long as the window see their neighbours only; longer ones would need large masks.
    size = min(max(back + 1, ahead), _LONGEST_BLOCK)
    lengths = [min(size, length - begin) for begin in range(0, length, size)]
    queries, keys, values = (_split(tensor, lengths) for tensor in (q, k, v))
    keep = None
    if valid is not None:
        keep = torch.zeros(length, dtype=torch.bool, device=q.device)
        for begin, end in valid:
            keep[begin:end] = True
    for index, block in enumerate(queries):
        begin = index * size
        end = begin + lengths[index]
        seen = slice(max(0, begin - back) // size, (min(length, end + ahead) - 1) // size + 1)
        first, last = seen.start * size, min(length, seen.stop * size)
        distance = torch.arange(begin, end, device=q.device)[:, None] - torch.arange(first, last, device=q.device)
        mask = (distance <= back) & (distance >= -ahead)
        sees = None
        if keep is not None:
            mask = mask & keep[first:last]
            # (queries, 1); one that sees nothing would be NaN in some kernels, and its gradient everywhere.
            sees = mask.any(dim=-1, keepdim=True)
            mask = mask | ~sees
        out = kernel(block, _cat(keys[seen]), _cat(values[seen]), mask=mask, offset=begin - first)
        outputs.append(out if sees is None else out.masked_fill(~sees, 0))
    return _cat(outputs)


def _masked_keys(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, valid: Runs) -> Tensor:
    """One document of which only the runs ``valid`` may be seen; queries outside of them are computed as well."""
    length = q.shape[2]
    if not valid:
        return _nothing(q, v)
    if spec.reach is not None or (kernel.extras and kernel.extras.alibi_slopes is not None):
        return _blocks(kernel, q, k, v, spec, valid)
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
                outputs.append(_nothing(hidden, v))
        if begin < end:
            outputs.append(kept[:, :, seen : seen + end - begin])
        position, seen = end, seen + end - begin
    return _cat(outputs)


def _document(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, valid: Runs | None) -> Tensor:
    """One document, (B, H, S_doc, D)."""
    if valid is not None and valid != ((0, q.shape[2]),):
        return _masked_keys(kernel, q, k, v, spec, valid)
    if spec.reach is not None and min(spec.reach[0], q.shape[2] if spec.causal else spec.reach[1]) < q.shape[2] - 1:
        return _blocks(kernel, q, k, v, spec, None)
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
    if spec.chunk is not None:
        # Left padding is no part of the first chunk; behind it, a document's chunks are documents of their own.
        left = valid[0][0] if valid else 0
        if 0 < left < documents[0][1]:
            documents = ((0, left), (left, documents[0][1]), *documents[1:])
        documents = tuple(
            (place, min(place + spec.chunk, end)) for begin, end in documents for place in range(begin, end, spec.chunk)
        )
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
    if spec.reach is not None:
        distance = place[:, None] - place
        keep = keep & (distance <= spec.reach[0]) & (distance >= -spec.reach[1])
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
    extras: Extras | None = None,
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
        extras: Softcap, sinks and ALiBi, of the query heads of ``q``.

    Returns:
        (B, H_r, S, D_v).
    """
    if kv_index is not None:
        index = torch.tensor(kv_index, device=k.device)
        k, v = k.index_select(1, index), v.index_select(1, index)
    kernel = Kernel(scale, dropout_p, extras)
    rows = [_row_runs(spec, row, q.shape[2]) for row in range(q.shape[0])]
    if bias is not None:
        return kernel(q, k, v, mask=_with_bias(bias, spec, rows, q.shape[2]))
    if all(row == rows[0] for row in rows):
        rows = rows[:1]
    if any(len(documents) > 1 for documents, _ in rows) and fits(q, v, kernel, rows):
        window = spec.reach or (-1, 0 if spec.causal else -1)
        return attend_packed(q, k, v, kernel, [documents for documents, _ in rows], window)
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


@dataclass(frozen=True)
class Softmax:
    """Softmax attention: arguments of `attend` for all H heads.

    Args:
        spec: Which keys each query sees.
        bias: (S, S), (H, S, S) or (B | 1, H | 1, S, S) of the whole sequence.
        scale: Of the scores; 1 / sqrt(D) if None.
        dropout_p: Dropout probability of the attention weights.
        extras: Softcap, sinks and ALiBi.
    """

    spec: MaskSpec
    bias: Tensor | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    extras: Extras | None = None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, heads: slice, kv_index: tuple[int, ...] | None, mesh: SequenceMesh
    ) -> Tensor:
        """See `attention.call.Meaning`."""
        bias = None
        if self.bias is not None:
            # (S, S) or (H, S, S) or (B | 1, H | 1, S, S) -> (B | 1, H_r | 1, S, S)
            bias = self.bias[(None,) * (4 - self.bias.dim())]
            bias = bias if bias.shape[1] == 1 else bias[:, heads]
        draws = own_draws(mesh, q.device) if self.dropout_p and mesh.sp_group is not None else nullcontext()
        with draws:
            return attend(
                q,
                k,
                v,
                self.spec,
                scale=self.scale,
                dropout_p=self.dropout_p,
                kv_index=kv_index,
                bias=bias,
                extras=self.extras and self.extras.heads(heads),
            )
