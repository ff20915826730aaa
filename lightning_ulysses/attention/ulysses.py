"""Exchange, attend, exchange: the one path that every interceptor and hand-written model goes through."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_ulysses.attention.attend import attend
from lightning_ulysses.attention.draws import own_draws
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.attention.kernel import attend_memory
from lightning_ulysses.attention.stand_in import probe_attention
from lightning_ulysses.context import SequenceState, current_state, eager_while_live, sharded_state
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.all_to_all import heads_to_seq, seq_to_heads
from lightning_ulysses.geometry.heads import head_layout
from lightning_ulysses.geometry.layout import Runs, SequenceLayout, cu_seqlens_to_runs
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.patching.outside_graphs import eager
from lightning_ulysses.sequence import check_share

Compute = Callable[[Tensor, Tensor, Tensor, slice, tuple[int, ...] | None], Tensor]


def exchanged(state: SequenceState, q: Tensor, k: Tensor, v: Tensor, compute: Compute) -> Tensor:
    """Runs ``compute`` on the whole sequence of the live batch, for this rank's share of the heads.

    Args:
        state: The strategy's state, with a live batch.
        q: (B, H, S_r, D).
        k: (B, H_kv, S_r, D).
        v: (B, H_kv, S_r, D_v).
        compute: Makes (B, H_r, S, D_v) from q (B, H_r, S, D), k and v (B, heads needed, S, ...), the query heads that
            these are, and for each of them its key/value head, where groups are uneven, else None.

    Returns:
        (B, H, S_r, D_v).

    Raises:
        UlyssesError: If a length is not this rank's share, or P > H.
    """
    batch, mesh = state.batch, state.mesh
    assert batch is not None
    check_share(q.shape[2], batch.layout, mesh.sp_rank, "attention")
    check_share(k.shape[2], batch.layout, mesh.sp_rank, "attention with keys")
    state.attention_calls += 1
    if mesh.sp_group is None:
        return compute(q, k, v, slice(0, q.shape[1]), None)
    mesh.check_heads(q.shape[1])
    heads = head_layout(q.shape[1], k.shape[1], mesh.sp_size)
    shares = batch.layout.shares
    q, k, v = seq_to_heads(q, k, v, heads, shares, mesh.sp_rank, mesh.sp_group)
    kv_index = None if heads.is_grouped(mesh.sp_rank) else heads.kv_index(mesh.sp_rank)
    out = compute(q, k, v, slice(*heads.query_range(mesh.sp_rank)), kv_index)
    return heads_to_seq(out, heads, shares, mesh.sp_rank, mesh.sp_group)


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
    extras: Extras | None = None,
) -> Tensor:
    """Attention of the live batch: q (B, H, S_r, D), k (B, H_kv, S_r, D), v (B, H_kv, S_r, D_v) -> (B, H, S_r, D_v).

    ``bias`` is that of the whole sequence, see `covers_sequence`; ``extras`` are those of all H heads.

    Raises:
        UlyssesError: If a length is not this rank's share, or P > H.
    """

    def compute(q: Tensor, k: Tensor, v: Tensor, heads: slice, kv_index: tuple[int, ...] | None) -> Tensor:
        ours = None
        if bias is not None:
            # (S, S) or (H, S, S) or (B | 1, H | 1, S, S) -> (B | 1, H_r | 1, S, S)
            ours = bias[(None,) * (4 - bias.dim())]
            ours = ours if ours.shape[1] == 1 else ours[:, heads]
        own = extras.heads(heads) if extras is not None else None
        with own_draws(state.mesh, q.device, dropout_p if state.mesh.sp_group is not None else 0.0):
            return attend(q, k, v, spec, scale=scale, dropout_p=dropout_p, kv_index=kv_index, bias=ours, extras=own)

    return exchanged(state, q, k, v, compute)


def sees_memory(state: SequenceState, q: Tensor, k: Tensor, is_causal: bool) -> bool:
    """Whether keys (..., S_k, D) are a memory's, whole on every rank, so that nothing has to be exchanged.

    That they are, and no pooled slice, has been tried on the model; see `checks.probing`.

    Raises:
        UlyssesError: For causal attention to a memory, which has no positions in the sequence.
    """
    batch = state.sharded_batch
    if batch is None or not state.attends_memory or k.shape[-2] in batch.layout.shares:
        return False
    if q.shape[-2] != batch.layout.shares[state.mesh.sp_rank]:
        return False
    if is_causal:
        raise UlyssesError(
            f"causal attention of {q.shape[-2]} tokens to {k.shape[-2]} keys",
            "attention to a memory without is_causal, or to the sequence itself",
            "leave is_causal out where keys are not those of the sequence",
        )
    state.attention_calls += 1
    return True


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


def _window(window: int | tuple[int, int] | None, is_causal: bool) -> tuple[int | None, int | None]:
    """The two numbers of a `MaskSpec`."""
    if window is None:
        return None, None
    left, right = (window - 1, 0) if isinstance(window, int) else window
    if left < 0 or right < 0 or (isinstance(window, int) and not is_causal):
        raise UlyssesError(
            f"window={window} with is_causal={is_causal}",
            "a positive window of a causal attention, or (left, right), how many keys on each side a query sees",
            "set is_causal=True, write window=(left, right), or leave window out",
        )
    return left + 1, right


def _check_per_head(extras: Extras, num_heads: int) -> None:
    for name, tensor in (("sinks", extras.sinks), ("alibi_slopes", extras.alibi_slopes)):
        if tensor is not None and tensor.shape != (num_heads,):
            raise UlyssesError(
                f"{name} of shape {tuple(tensor.shape)} for {num_heads} query heads",
                f"one value for each query head of the whole model, ({num_heads},)",
                f"pass {name} of all heads; each rank takes those of its own",
            )


@eager_while_live
def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    window: int | tuple[int, int] | None = None,
    chunk: int | None = None,
    cu_seqlens: Tensor | None = None,
    attn_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention for hand-written models; plain when nothing is sharded.

    Args:
        q: (B, H, S_r, D).
        k: (B, H_kv, S_r, D); H must be a multiple of H_kv.
        v: (B, H_kv, S_r, D_v).
        is_causal: Query i sees keys up to i, counted in the whole sequence.
        scale: Of the scores; 1 / sqrt(D) if None.
        dropout_p: Dropout probability of the attention weights.
        window: With ``is_causal``, the number of keys that a query sees, itself included; or (left, right), how many
            keys before and behind its own place a query sees.
        chunk: Queries see keys of their own chunk of so many tokens only, counted from the start of each document.
        cu_seqlens: (documents + 1,) cumulative document lengths of the whole sequence, with B = 1; documents do not
            see each other.
        attn_mask: (S, S), (H, S, S) or (B | 1, H | 1, S, S) of the whole sequence, the same on every rank: added to the
            scores, or True where a query sees a key. Each rank uses what belongs to its heads.
        softcap: Scores s become softcap * tanh(s / softcap) before anything is masked.
        sinks: (H,) one further score per head that takes weight and gives nothing.
        alibi_slopes: (H,) slope * distance of query and key is subtracted from the scores.

    Returns:
        (B, H, S_r, D_v).

    Raises:
        UlyssesError: If lengths do not fit the live batch, P > H, or ``window``, ``cu_seqlens`` or a tensor of one
            value per head cannot be used.

    Source:
        DeepSpeed-Ulysses, arXiv 2309.14509.
    """
    before, ahead = _window(window, is_causal)
    extras = Extras(softcap, sinks, alibi_slopes)
    _check_per_head(extras, q.shape[1])
    probed = current_state()
    if probed is not None and probed.probing:
        return probe_attention(probed, q, k, v)
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
    padding = layout.num_padding if layout else 0
    spec = MaskSpec(is_causal, before, documents, num_padding=padding, ahead=ahead, chunk=chunk)
    if state is not None and sees_memory(state, q, k, is_causal):
        bias = attn_mask[(None,) * (4 - attn_mask.dim())] if attn_mask is not None else None
        return attend_memory(q, k, v, scale=scale, dropout_p=dropout_p, mask=bias, extras=extras)
    if attn_mask is not None and layout is not None and not covers_sequence(attn_mask, layout):
        raise local_mask_error(attn_mask, layout)
    if state is None:
        bias = attn_mask[(None,) * (4 - attn_mask.dim())] if attn_mask is not None else None
        return attend(q, k, v, spec, scale=scale, dropout_p=dropout_p, bias=bias, extras=extras)
    return sharded_attention(state, q, k, v, spec, scale=scale, dropout_p=dropout_p, bias=attn_mask, extras=extras)
