"""Attention over whole sequences, exact for packed documents, padding and sliding windows.

Packed documents need no S x S mask here. Each document is one call of the kernel, so the cost grows with the sum of the
squared document lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_ulysses.attention import device
from lightning_ulysses.attention.draws import own_draws
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.attention.fused_extras import attend_fused, why_by_formula
from lightning_ulysses.attention.grouped import heads_of
from lightning_ulysses.attention.kernel import Kernel
from lightning_ulysses.attention.packed import VariableLength, attend_packed, variable_length
from lightning_ulysses.attention.rows import Row, parts_of, rows_of, tokens_of
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.layout import Runs, clip
from lightning_ulysses.geometry.mask_spec import MaskSpec

# Largest number of queries in a block. Each block has a mask tensor, so this bounds its memory.
_LONGEST_BLOCK = 2048


def _cat(parts: list[Tensor]) -> Tensor:
    """Concatenates (B, H, S_i, D) along S, in the memory layout (B, S, H, D).

    The exchange after attention sends this layout without a copy if B = 1.
    """
    if len(parts) == 1:
        return parts[0]
    # Each (B, H, S_i, D) -> (B, S_i, H, D) -> (B, S, H, D) -> (B, H, S, D)
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def _split(tensor: Tensor, lengths: list[int]) -> list[Tensor]:
    """Splits (B, H, S, D) along S.

    Not by slices: the backward of each slice would fill a tensor of zeros as large as the whole one. The backward of a
    split is one concatenation. Transposed as here, it gives the memory layout of `_cat`.
    """
    if len(lengths) == 1:
        return [tensor]
    # (B, H, S, D) -> (B, S, H, D) -> each (B, S_i, H, D) -> (B, H, S_i, D)
    return [part.transpose(1, 2) for part in tensor.transpose(1, 2).split(lengths, dim=1)]


def _nothing(q: Tensor, v: Tensor) -> Tensor:
    """The output of queries that see no key: zeros (B, H, S, D_v), with zero gradients."""
    # Computed from q, so that q stays in the autograd graph and its exchange runs backward on every rank.
    # (B, H, S, D) -> (B, H, S, 1) -> (B, H, S, D_v)
    return (q.sum(dim=-1, keepdim=True) * 0).expand(*q.shape[:3], v.shape[3])


def _blocks(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, valid: Runs | None, first: int = 0
) -> Tensor:
    """Attention in blocks of queries, each with a mask of its own; query i is that of key ``first + i``.

    With a sliding window, a block sees its neighbouring blocks only. Time is about S * 3 * window instead of S * S.
    """
    length, outputs = k.shape[2], []
    # Without a window, queries reach to the ends; blocks then only serve the mask of `valid`.
    back, ahead = spec.reach or (length, 0 if spec.causal else length)
    # A block as long as the window sees only its neighbours. A longer one would need a larger mask.
    size = min(max(back + 1, ahead), _LONGEST_BLOCK)
    queries = _split(q, [min(size, q.shape[2] - begin) for begin in range(0, q.shape[2], size)])
    keys, values = (_split(t, [min(size, length - begin) for begin in range(0, length, size)]) for t in (k, v))
    keep = None
    if valid is not None:
        keep = torch.zeros(length, dtype=torch.bool, device=q.device)
        for begin, end in valid:
            keep[begin:end] = True
    for index, block in enumerate(queries):
        begin = first + index * size
        end = begin + block.shape[2]
        # Blocks of keys that some query of this block sees. Keys are taken in whole blocks, `first` to `last`.
        seen = slice(max(0, begin - back) // size, (min(length, end + ahead) - 1) // size + 1)
        left, right = seen.start * size, min(length, seen.stop * size)
        # (queries, 1) - (keys,) -> (queries, keys): index of the query minus index of the key.
        distance = torch.arange(begin, end, device=q.device)[:, None] - torch.arange(left, right, device=q.device)
        mask = (distance <= back) & (distance >= -ahead)
        sees = None
        if keep is not None:
            mask = mask & keep[left:right]
            # (queries, 1); a query that sees no key gives NaN in some kernels, and its gradient would spread the NaN.
            # So it sees all keys here, and its output is set to 0 below.
            sees = mask.any(dim=-1, keepdim=True)
            mask = mask | ~sees
        out = kernel(block, _cat(keys[seen]), _cat(values[seen]), mask=mask, offset=begin - left)
        outputs.append(out if sees is None else out.masked_fill(~sees, 0))
    return _cat(outputs)


def _masked_keys(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, valid: Runs, first: int) -> Tensor:
    """Attention in one document, of which only the runs ``valid`` are seen as keys."""
    length = k.shape[2]
    if not valid:
        return _nothing(q, v)
    # A window and ALiBi depend on distances, which would change if hidden keys were left out below.
    has_distances = spec.reach is not None or (kernel.extras and kernel.extras.alibi_slopes is not None)
    if has_distances or (spec.causal and first):
        return _blocks(kernel, q, k, v, spec, valid, first)
    keys = _cat([k[:, :, begin:end] for begin, end in valid])
    values = _cat([v[:, :, begin:end] for begin, end in valid])
    if not spec.causal:
        return kernel(q, keys, values)
    # Among the kept tokens alone, attention is plainly causal. A dropped query sees all kept keys before it.
    kept = kernel(_cat([q[:, :, begin:end] for begin, end in valid]), keys, values, causal=True)
    outputs, position, seen = [], 0, 0
    # The empty last run makes the loop also handle dropped queries after the last kept run.
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


def _document(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, valid: Runs | None, first: int
) -> Tensor:
    """Attention in one document.

    Args:
        kernel: The arguments of the attention call.
        q: (B, H, S_q, D), a run of the document's queries.
        k: (B, heads, S_k, D), from the first one of the document on; if causal, up to that of the last query.
        v: (B, heads, S_k, D_v).
        spec: The keys that each query sees.
        valid: Runs of keys that are seen; None for all.
        first: The key of the first query.

    Returns:
        (B, H, S_q, D_v).
    """
    length = k.shape[2]
    if valid is not None and valid != ((0, length),):
        return _masked_keys(kernel, q, k, v, spec, valid, first)
    # A window that covers the whole document is no window.
    if spec.reach is not None and min(spec.reach[0], length if spec.causal else spec.reach[1]) < length - 1:
        return _blocks(kernel, q, k, v, spec, None, first)
    # Kernels of torch count from the first key: with fewer queries, their causal mask is another one.
    if spec.causal and first and not kernel.extras:
        return _blocks(kernel, q, k, v, spec, None, first)
    return kernel(q, k, v, causal=spec.causal, offset=first)


def visible(spec: MaskSpec, rows: list[Row], length: int, first: int, last: int, device: torch.device) -> Tensor:
    """(B, 1, S_q | 1, S) bool: the keys that queries ``first:last`` see."""
    place = torch.arange(length, device=device)
    query = place[first:last, None]
    kept = []
    for documents, valid in rows:
        # (S,) the number of each token's document.
        number = torch.zeros(length, dtype=torch.int64, device=device)
        seen = torch.full((length,), valid is None, device=device)
        for index, (begin, end) in enumerate(documents):
            number[begin:end] = index
        for begin, end in valid or ():
            seen[begin:end] = True
        seen = seen & (place < length - spec.num_padding)
        # (S_q, 1) and (S,) -> (S_q, S); keys of another sequence are seen by all queries, (1, S)
        kept.append(seen[None] if spec.is_other else (number[first:last, None] == number) & seen)
    # B times (S_q | 1, S) -> (B, S_q | 1, S) -> (B, 1, S_q | 1, S)
    keep = torch.stack(kept).unsqueeze(1)
    if spec.causal:
        keep = keep & (place <= query)
    if spec.reach is not None:
        distance = query - place
        keep = keep & (distance <= spec.reach[0]) & (distance >= -spec.reach[1])
    return keep


def _with_bias(bias: Tensor, spec: MaskSpec, rows: list[Row], length: int, first: int, last: int) -> Tensor:
    """The bias (B | 1, H_r | 1, S | 1, S) for queries ``first:last``, with everything hidden that ``spec`` hides.

    Returns:
        (B, H_r | 1, S_q, S).
    """
    padding = length - bias.shape[-1]
    if padding:
        # Filled with True for a mask and 0.0 for a bias: neither hides anything. `keep` hides the padding.
        queries = padding if bias.shape[-2] > 1 else 0
        bias = torch.nn.functional.pad(bias, (0, padding, 0, queries), value=bias.dtype == torch.bool)
    bias = bias if bias.shape[-2] == 1 else bias[..., first:last, :]
    keep = visible(spec, rows, length, first, last, bias.device)
    # A query that sees no key would give NaN. It is padding, so its output does not matter: it sees all keys.
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
    flash: VariableLength | None = None,
    first: int = 0,
) -> Tensor:
    """Softmax attention over whole sequences.

    Args:
        q: (B, H_r, S_q, D), the queries of all keys, or a run of them, or those of another sequence.
        k: (B, heads, S, D). The number of heads divides H_r, unless ``kv_index`` is given.
        v: (B, heads, S, D_v).
        spec: The keys that each query sees.
        scale: Scale of the scores; 1 / sqrt(D) if None.
        dropout_p: Dropout probability of the attention weights.
        kv_index: For each query head its key/value head, if groups are uneven.
        bias: (B | 1, H_r | 1, S, S), in addition to ``spec``. Floats are added to the scores; a bool is True where a
            query sees a key.
        extras: Softcap, sinks and ALiBi for the query heads of ``q``.
        flash: The variable-length kernel that the caller prefers.
        first: The key of the first query.

    Returns:
        (B, H_r, S_q, D_v).
    """
    # Kernels group heads evenly only, so each query head gets a copy of its key/value head.
    if kv_index is not None:
        k, v = heads_of(k, kv_index), heads_of(v, kv_index)
    kernel = Kernel(scale, dropout_p, extras)
    length, last = k.shape[2], first + q.shape[2]
    # One row stands for all if they are cut alike: they go through the kernel together, as one batch.
    rows = rows_of(spec, q.shape[0], length)
    if bias is not None:
        return kernel(q, k, v, mask=_with_bias(bias, spec, rows, length, first, last), offset=first)
    if kernel.extras and device.is_gpu(q) and (flash is None or flash.lacks(q, v, kernel)):
        reason = why_by_formula(q, k, v, kernel) if q.shape[2] == length else "fewer queries than keys"
        if reason is None:
            return attend_fused(q, k, v, kernel, rows, spec.causal, spec.reach)
        kernel = replace(kernel, slow=reason)
    # It counts queries and keys by the same edges.
    function = None if spec.is_other else variable_length(q, k, v, kernel, rows, spec, flash)
    if function is not None:
        window = spec.reach or (-1, 0 if spec.causal else -1)
        return attend_packed(q, k, v, kernel, [documents for documents, _ in rows], window, function, first)
    outputs = []
    # Otherwise row by row, and within a row document by document.
    q_rows, k_rows, v_rows = (tensor.split(1) if len(rows) > 1 else (tensor,) for tensor in (q, k, v))
    for (documents, valid), *row in zip(rows, q_rows, k_rows, v_rows, strict=True):
        if spec.is_other:
            outputs.append(_document(kernel, row[0], row[1], row[2], spec, valid, 0))
            continue
        parts = parts_of(documents, first, last, spec.causal)
        queries = _split(row[0], [part.queries for part in parts])
        # Keys of other documents are left out.
        begin, end = parts[0].begin, parts[-1].begin + parts[-1].keys
        keys, values = (_split(tokens_of(t, begin, end), [part.keys for part in parts]) for t in row[1:])
        found = []
        for number, part in enumerate(parts):
            runs = None if valid is None else clip(valid, part.begin, part.begin + part.keys)
            found.append(_document(kernel, queries[number], keys[number], values[number], spec, runs, part.first))
        outputs.append(_cat(found))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@dataclass(frozen=True)
class Softmax:
    """Softmax attention: the arguments of `attend`, for all H heads.

    Args:
        spec: The keys that each query sees.
        bias: (S, S), (H, S, S) or (B | 1, H | 1, S, S) of the whole sequence.
        scale: Scale of the scores; 1 / sqrt(D) if None.
        dropout_p: Dropout probability of the attention weights.
        extras: Softcap, sinks and ALiBi.
        flash: The variable-length kernel that the caller prefers, such as flash-attn's.
    """

    spec: MaskSpec
    bias: Tensor | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    extras: Extras | None = None
    flash: VariableLength | None = None

    def _tensors(self) -> tuple[Tensor | None, ...]:
        sinks, slopes = (self.extras.sinks, self.extras.alibi_slopes) if self.extras else (None, None)
        return self.bias, sinks, slopes

    @property
    def learned(self) -> tuple[Tensor, ...]:
        """See `attention.call.Meaning`."""
        return tuple(tensor for tensor in self._tensors() if tensor is not None and tensor.requires_grad)

    @property
    def grows(self) -> bool:
        """See `attention.call.Meaning`."""
        return self.spec.causal and self.spec.reach is None and self.spec.chunk is None and self.bias is None

    def given(self, learned: Sequence[Tensor]) -> Softmax:
        """See `attention.call.Meaning`."""
        if not learned:
            return self
        rest = iter(learned)
        bias, sinks, slopes = (
            next(rest) if tensor is not None and tensor.requires_grad else tensor for tensor in self._tensors()
        )
        extras = self.extras and replace(self.extras, sinks=sinks, alibi_slopes=slopes)
        return replace(self, bias=bias, extras=extras)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: slice,
        kv_index: tuple[int, ...] | None,
        mesh: SequenceMesh,
        first: int,
    ) -> Tensor:
        """See `attention.call.Meaning`."""
        bias = None
        if self.bias is not None:
            # (S, S) or (H, S, S) or (B | 1, H | 1, S, S) -> (B | 1, H_r | 1, S, S)
            bias = self.bias[(None,) * (4 - self.bias.dim())]
            bias = bias if bias.shape[1] == 1 else bias[:, heads]
        # Each rank has other heads, which need dropout masks of their own.
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
                flash=self.flash,
                first=first,
            )
