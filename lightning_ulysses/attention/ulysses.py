"""Exchange, attend, exchange: the one path that every interceptor and hand-written model goes through."""

from __future__ import annotations

from torch import Tensor

from lightning_ulysses.all_to_all import heads_to_seq, seq_to_heads
from lightning_ulysses.attention.attend import MaskSpec, attend
from lightning_ulysses.attention.dropout import own_draws
from lightning_ulysses.attention.stand_in import keep_apart
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.graphs import eager
from lightning_ulysses.heads import head_layout
from lightning_ulysses.layout import Runs, SequenceLayout, cu_seqlens_to_runs
from lightning_ulysses.state import SequenceState, check_share, current_state, eager_while_live, sharded_state


@eager
def sharded_attention(
    state: SequenceState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: MaskSpec,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of the live batch: q (B, H, S_r, D), k (B, H_kv, S_r, D), v (B, H_kv, S_r, D_v) -> (B, H, S_r, D_v).

    ``bias`` is that of the whole sequence, see `covers_sequence`.

    Raises:
        UlyssesError: If a length is not this rank's share, or P > H.
    """
    batch, mesh = state.batch, state.mesh
    assert batch is not None
    check_share(q.shape[2], batch.layout, mesh.sp_rank, "attention")
    check_share(k.shape[2], batch.layout, mesh.sp_rank, "attention with keys")
    state.attention_calls += 1
    if mesh.sp_group is None:
        return attend(q, k, v, spec, scale=scale, dropout_p=dropout_p, bias=bias)
    mesh.check_heads(q.shape[1])
    heads = head_layout(q.shape[1], k.shape[1], mesh.sp_size)
    shares = batch.layout.shares
    q, k, v = seq_to_heads(q, k, v, heads, shares, mesh.sp_rank, mesh.sp_group)
    kv_index = None if heads.is_grouped(mesh.sp_rank) else heads.kv_index(mesh.sp_rank)
    if bias is not None:
        # (S, S) or (H, S, S) or (B | 1, H | 1, S, S) -> (B | 1, H_r | 1, S, S)
        bias = bias[(None,) * (4 - bias.dim())]
        bias = bias if bias.shape[1] == 1 else bias[:, slice(*heads.query_range(mesh.sp_rank))]
    with own_draws(mesh, q.device, dropout_p):
        out = attend(q, k, v, spec, scale=scale, dropout_p=dropout_p, kv_index=kv_index, bias=bias)
    return heads_to_seq(out, heads, shares, mesh.sp_rank, mesh.sp_group)


def covers_sequence(attn_mask: Tensor, layout: SequenceLayout) -> bool:
    """Whether a mask is one of the whole sequence, (..., S, S), and not of one rank's slice."""
    real = layout.seq_len - layout.num_padding
    return 2 <= attn_mask.dim() <= 4 and attn_mask.shape[-2:] == (real, real)


def local_mask_error(attn_mask: Tensor, layout: SequenceLayout) -> UlyssesError:
    """For a mask tensor made from one rank's slice."""
    real = layout.seq_len - layout.num_padding
    return UlyssesError(
        f"an attention mask of shape {tuple(attn_mask.shape)} inside a step",
        f"no mask tensor, or that of the whole sequence, (..., {real}, {real}), the same on every rank; one made from "
        "this rank's slice makes sense only locally",
        "use is_causal=True, or call lightning_ulysses.ulysses_attention(..., is_causal=, window=, cu_seqlens=)",
    )


def document_runs(cu_seqlens: Tensor, seq_len: int) -> Runs:
    """Reads ``cu_seqlens`` once for each batch: from a GPU this waits for everything that is queued there."""
    state = current_state()
    batch = state.batch if state is not None else None
    key = (cu_seqlens.data_ptr(), cu_seqlens.numel(), cu_seqlens._version, seq_len)
    if batch is not None and key in batch.runs:
        return batch.runs[key]
    runs = cu_seqlens_to_runs(cu_seqlens.tolist(), seq_len)
    if batch is not None:
        batch.keep.append(cu_seqlens)
        batch.runs[key] = runs
    return runs


@eager_while_live
def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """Attention for hand-written models; plain when nothing is sharded.

    Args:
        q: (B, H, S_r, D).
        k: (B, H_kv, S_r, D); H must be a multiple of H_kv.
        v: (B, H_kv, S_r, D_v).
        is_causal: Query i sees keys up to i, counted in the whole sequence.
        scale: Of the scores; 1 / sqrt(D) if None.
        dropout_p: Dropout probability of the attention weights.
        window: With ``is_causal``, the number of keys that a query sees, itself included.
        cu_seqlens: (documents + 1,) cumulative document lengths of the whole sequence, with B = 1; documents do not
            see each other.
        attn_mask: (S, S), (H, S, S) or (B | 1, H | 1, S, S) of the whole sequence, the same on every rank: added to the
            scores, or True where a query sees a key. Each rank uses what belongs to its heads.

    Returns:
        (B, H, S_r, D_v).

    Raises:
        UlyssesError: If lengths do not fit the live batch, P > H, or ``window`` or ``cu_seqlens`` cannot be used.

    Source:
        DeepSpeed-Ulysses, arXiv 2309.14509.
    """
    if window is not None and (not is_causal or window < 1):
        raise UlyssesError(
            f"window={window} with is_causal={is_causal}",
            "a positive window of a causal attention",
            "set is_causal=True, or leave window out",
        )
    probed = current_state()
    if probed is not None and probed.probing:
        return keep_apart(q, k, v)
    state = sharded_state()
    layout = state.sharded_batch.layout if state is not None and state.sharded_batch is not None else None
    documents = None
    if cu_seqlens is not None:
        if q.shape[0] != 1:
            raise UlyssesError(
                f"cu_seqlens with a batch of {q.shape[0]} rows",
                "one row",
                "pack the documents into one row, (1, S), or pass the rows one by one",
            )
        documents = (document_runs(cu_seqlens, layout.seq_len if layout else q.shape[2]),)
    spec = MaskSpec(is_causal, window, documents, num_padding=layout.num_padding if layout else 0)
    if attn_mask is not None and layout is not None and not covers_sequence(attn_mask, layout):
        raise local_mask_error(attn_mask, layout)
    if state is None:
        bias = attn_mask[(None,) * (4 - attn_mask.dim())] if attn_mask is not None else None
        return attend(q, k, v, spec, scale=scale, dropout_p=dropout_p, bias=bias)
    return sharded_attention(state, q, k, v, spec, scale=scale, dropout_p=dropout_p, bias=attn_mask)
