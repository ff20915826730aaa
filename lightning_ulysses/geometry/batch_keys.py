"""The keys of a batch that have a meaning, and how a user changes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LABEL_KEYS = ("labels", "shift_labels")


MASK_KEYS = ("loss_mask", "shift_loss_mask")


SEQUENCE_KEYS = ("input_ids", *LABEL_KEYS, "position_ids", "attention_mask", "token_type_ids", *MASK_KEYS)


WHOLE_KEYS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(frozen=True)
class BatchRules:
    """How to read a batch.

    Args:
        sequence_dims: For keys (or indices of a tuple) the dimension that carries the sequence; ``None`` for a tensor
            that every rank gets whole.
        pad_to_multiple_of: Pads S up to a multiple of this, where P > 1.
        ignore_index: The label that counts as no target.
        whole: Sequences that every rank gets whole, since a plan splits the model behind them.
        keeps_all: Whether every rank gets the whole batch; see `find_whole`.
    """

    sequence_dims: Mapping[str, int | None] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    ignore_index: int = -100
    whole: frozenset[str] = frozenset()
    keeps_all: bool = False
