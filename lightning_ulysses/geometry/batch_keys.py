"""Batch keys that are recognized without settings, and the user's settings for all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# `labels` are not shifted, `shift_labels` are: entry t is the label of token t + 1.
LABEL_KEYS = ("labels", "shift_labels")


# 1 where a token counts in the loss. The shifted mask belongs to the shifted labels.
MASK_KEYS = ("loss_mask", "shift_loss_mask")


# Tensors (B, S) that are cut without a setting.
SEQUENCE_KEYS = ("input_ids", *LABEL_KEYS, "position_ids", "attention_mask", "token_type_ids", "seq_idx", *MASK_KEYS)


# Cumulative lengths of documents, the first that is there.
EDGE_KEYS = ("cu_seqlens", "cu_seq_lens_q")


# These describe the whole row, so every rank gets them as they are.
WHOLE_KEYS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


# After the key of a mask, counts of the tokens that it keeps.
KEPT = ">0"


@dataclass(frozen=True)
class BatchRules:
    """How to read a batch.

    Args:
        sequence_dims: For each key (or index of a tuple) the dimension that carries the sequence. ``None`` marks a
            tensor that every rank gets whole.
        pad_to_multiple_of: Pads S up to a multiple of this. Only used if P > 1.
        ignore_index: The label that counts as no target.
        whole: Keys of sequences that every rank gets whole, because a plan splits the model after them.
        keeps_all: Whether every rank gets the whole batch. See `find_whole`.
    """

    sequence_dims: Mapping[str, int | None] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    ignore_index: int = -100
    whole: frozenset[str] = frozenset()
    keeps_all: bool = False
