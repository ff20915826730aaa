"""Which tensors of a batch are sequences, and how they are shifted, padded and cut: once, on the host."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.documents import document_runs, valid_runs
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.layout import SequenceLayout

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
        pad_to_multiple_of: Pads S up to a multiple of this.
        ignore_index: The label that counts as no target.
    """

    sequence_dims: Mapping[str, int | None] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    ignore_index: int = -100


@dataclass(frozen=True)
class WholeBatch:
    """A batch that has been understood but not cut.

    Attributes:
        template: The batch as it came, for its type and for what is no sequence.
        tensors: Every sequence tensor, padded, with the derived ``shift_labels`` among them.
        dims: The dimension of each that carries the sequence.
        hidden: Keys in ``tensors`` that the module does not get to see.
        layout: The geometry of the cut.
        counts: For each tensor that may hold the targets, the valid ones per rank. ``"tokens"`` counts every token.
    """

    template: Any
    tensors: dict[str, Tensor]
    dims: dict[str, int]
    hidden: frozenset[str]
    layout: SequenceLayout
    counts: dict[str, tuple[float, ...]]

    @property
    def rows(self) -> int:
        """B."""
        return max(tensor.shape[0] if self.dims[key] else 1 for key, tensor in self.tensors.items())

    def counts_of_group(self) -> dict[str, float]:
        """Valid targets of the whole batch, for each tensor that may hold them."""
        return {name: sum(values) for name, values in self.counts.items()}

    def shard(self, rank: int, *, stand_in: bool = False) -> tuple[Any, dict[str, Tensor], dict[str, float]]:
        """Cuts out one rank's slice.

        Args:
            rank: Rank in the sequence-parallel group.
            stand_in: Gives a slice without a single valid target one that does not count, so that a mean over the
                slice's targets is finite: a loss of 0/0 would send NaN backward even when multiplied by zero.

        Returns:
            The batch in its own type, the slices by key, and the valid targets as the module sees them.
        """
        span = self.layout.span(rank)
        shards = {
            key: tensor.narrow(self.dims[key], span.start, span.stop - span.start).contiguous()
            for key, tensor in self.tensors.items()
        }
        seen = {name: counts[rank] for name, counts in self.counts.items()}
        if stand_in:
            for name in (name for name, count in seen.items() if count == 0 and name in shards):
                shards[name] = shards[name].clone()
                shards[name].view(-1)[0] = 1 if name in MASK_KEYS else 0
                seen[name] = 1.0
        return _rebuild(self.template, {k: v for k, v in shards.items() if k not in self.hidden}), shards, seen


def entries_of(batch: Any) -> dict[str, Any]:
    """The parts of a batch by key; those of a tuple by index.

    Raises:
        UlyssesError: If the batch has no parts that could be told apart.
    """
    if isinstance(batch, Tensor):
        return {"batch": batch}
    if isinstance(batch, Mapping):
        return dict(batch.items())
    if isinstance(batch, (tuple, list)):
        return {str(index): value for index, value in enumerate(batch)}
    raise UlyssesError(
        f"a batch of type {type(batch).__name__}",
        "a mapping, a tuple or list of tensors, or a tensor",
        "return a dict from the collate function",
    )


def _rebuild(template: Any, new: dict[str, Tensor]) -> Any:
    if isinstance(template, Tensor):
        return new["batch"]
    if isinstance(template, dict) and type(template) is dict:
        return {**template, **new}
    if isinstance(template, MutableMapping):
        result = copy.copy(template)
        result.update(new)
        return result
    if isinstance(template, Mapping):
        return {**template, **new}
    values = [new.get(str(index), value) for index, value in enumerate(template)]
    return type(template)(*values) if hasattr(template, "_fields") else type(template)(values)


def describe(entries: Mapping[str, Any]) -> str:
    """Names, shapes and dtypes of a batch, for a message."""
    seen = (
        f"{key!r}: {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        if isinstance(value, Tensor)
        else f"{key!r}: {type(value).__name__}"
        for key, value in entries.items()
    )
    return "{" + ", ".join(seen) + "}"


def _suggest(entries: Mapping[str, Any]) -> str:
    dims = {
        key: max(range(min(1, value.dim() - 1), value.dim()), key=value.shape.__getitem__)
        for key, value in entries.items()
        if isinstance(value, Tensor) and value.dim() > 0
    }
    return f"name the dimension that carries the sequence, such as sequence_dims={dims}, in the strategy"


def _usual_dim(key: str, tensor: Tensor) -> int:
    if key == "position_ids" and tensor.dim() == 1:
        return 0
    if tensor.dim() != 2:
        reason = {
            "attention_mask": "a 2-D padding mask (B, S), since a mask over pairs of tokens makes sense only locally",
            "labels": "one label for each token (B, S), since the loss has to be a mean over tokens",
        }.get(key, "a tensor (B, S)")
        raise UlyssesError(
            f"batch[{key!r}] of shape {tuple(tensor.shape)}",
            reason,
            f"change the collate function, or say which dimension is the sequence: sequence_dims={{{key!r}: ...}}",
        )
    return 1


def _find_dims(batch: Any, entries: dict[str, Any], rules: BatchRules) -> dict[str, int]:
    """The sequence dimension of every tensor that has one.

    Raises:
        UlyssesError: If no sequence is found, lengths differ, or it is not certain whether a tensor carries one.
    """
    unknown_keys = set(rules.sequence_dims) - set(entries)
    if unknown_keys and not set(rules.sequence_dims) & set(entries):
        raise UlyssesError(
            f"a batch {describe(entries)} with none of the keys in sequence_dims={dict(rules.sequence_dims)}",
            "a batch that holds the tensors named in sequence_dims",
            "use the batch's keys (for a tuple, the indices '0', '1', ...)",
        )
    dims: dict[str, int] = {}
    for key, value in entries.items():
        if not isinstance(value, Tensor) or key in WHOLE_KEYS:
            continue
        if key in rules.sequence_dims:
            dim = rules.sequence_dims[key]
            if dim is not None:
                dims[key] = dim % value.dim() if -value.dim() <= dim < value.dim() else _no_such_dim(key, dim, value)
        elif isinstance(batch, Mapping) and key in SEQUENCE_KEYS:
            dims[key] = _usual_dim(key, value)
    if not isinstance(batch, Mapping) and not rules.sequence_dims:
        tensors = list(entries.values())
        if all(isinstance(t, Tensor) and t.dim() == 2 and t.shape == tensors[0].shape for t in tensors) and (
            len(tensors) == 2 or (len(tensors) == 1 and not tensors[0].is_floating_point())
        ):
            dims = dict.fromkeys(entries, 1)
    if not dims:
        raise UlyssesError(
            f"a batch {describe(entries)} whose sequence cannot be identified",
            "a mapping with the usual keys (input_ids, labels, ...), a tuple (x, y) of equal (B, S), or sequence_dims",
            _suggest(entries),
        )
    return dims


def _no_such_dim(key: str, dim: int, tensor: Tensor) -> int:
    raise UlyssesError(
        f"sequence_dims={{{key!r}: {dim}}} for a tensor of shape {tuple(tensor.shape)}",
        f"a dimension between 0 and {tensor.dim() - 1}",
        f"change sequence_dims[{key!r}]",
    )


def _check_lengths(entries: dict[str, Any], dims: dict[str, int], rules: BatchRules) -> int:
    lengths = {key: entries[key].shape[dim] for key, dim in dims.items()}
    seq_len = next(iter(lengths.values()))
    if any(length != seq_len for length in lengths.values()):
        raise UlyssesError(
            f"sequence tensors of different lengths {lengths} in a batch {describe(entries)}",
            "one length S for all of them",
            "pad or cut them to one length in the collate function, or leave one out with sequence_dims={key: None}",
        )
    for key, value in entries.items():
        settled = key in dims or key in WHOLE_KEYS or key in rules.sequence_dims
        if not settled and isinstance(value, Tensor) and seq_len in value.shape:
            raise UlyssesError(
                f"batch[{key!r}] of shape {tuple(value.shape)}, one of whose dimensions equals the sequence length "
                f"{seq_len}, in a batch {describe(entries)}",
                "to know whether it carries the sequence",
                f"add sequence_dims={{{key!r}: {list(value.shape).index(seq_len)}}} to the strategy if it does, "
                f"or sequence_dims={{{key!r}: None}} if every rank needs all of it",
            )
    return seq_len


def _shift(tensor: Tensor, layout: SequenceLayout, fill: float) -> Tensor:
    """(B, S) -> (B, S): what the next token of the same document holds, ``fill`` at the end of each document."""
    shifted = torch.nn.functional.pad(tensor[:, 1:], (0, 1), value=fill)
    for row, documents in enumerate(layout.documents or ()):
        shifted[row, torch.tensor([end - 1 for _, end in documents])] = fill
    return shifted


def _pad(tensor: Tensor, key: str, dim: int, amount: int, rules: BatchRules, is_target: bool) -> Tensor:
    if key == "position_ids":
        last = tensor.narrow(dim, tensor.shape[dim] - 1, 1)
        return torch.cat([tensor, last + torch.arange(1, amount + 1, dtype=tensor.dtype)], dim=dim)
    if is_target and tensor.is_floating_point():
        raise UlyssesError(
            f"pad_to_multiple_of={rules.pad_to_multiple_of} with floating-point targets",
            "integer targets, in which padding can be marked to be ignored",
            "leave pad_to_multiple_of out; no multiple is required",
        )
    shape = list(tensor.shape)
    shape[dim] = amount
    return torch.cat([tensor, tensor.new_full(shape, rules.ignore_index if is_target else 0)], dim=dim)


def _count(tensor: Tensor, dim: int, layout: SequenceLayout, ignore_index: int, is_mask: bool) -> tuple[float, ...]:
    valid = tensor.double() if is_mask else (tensor != ignore_index).double()
    per_position = valid.movedim(dim, 0).flatten(1).sum(dim=1) if valid.dim() > 1 else valid
    return tuple(float(per_position[layout.span(rank)].sum()) for rank in range(layout.sp_size))


def read_batch(batch: Any, rules: BatchRules, sp_size: int) -> WholeBatch:
    """Understands a batch on the host.

    Args:
        batch: A mapping, a tuple or list, or a tensor, whole.
        rules: How to read it.
        sp_size: P.

    Returns:
        The sequence tensors with ``shift_labels`` added, the layout, and the counts of targets.

    Raises:
        UlyssesError: If the batch is not understood for certain; with the shapes and the setting to add.
    """
    entries = entries_of(batch)
    dims = _find_dims(batch, entries, rules)
    seq_len = _check_lengths(entries, dims, rules)
    tensors = {key: entries[key] for key in dims}
    is_mapping = isinstance(batch, Mapping)
    if is_mapping:
        candidates = [key for key in tensors if key in LABEL_KEYS + MASK_KEYS]
        candidates += [
            key for key, t in tensors.items() if key not in SEQUENCE_KEYS and not t.is_floating_point() and t.dim() > 1
        ]
    else:
        last = list(tensors)[-1]
        candidates = [last] if len(tensors) > 1 and not tensors[last].is_floating_point() else []
    amount = -seq_len % (rules.pad_to_multiple_of or 1)
    if amount:
        float_target = not is_mapping and len(tensors) > 1 and not candidates
        tensors = {
            key: _pad(t, key, dims[key], amount, rules, (key in candidates and key not in MASK_KEYS) or float_target)
            for key, t in tensors.items()
        }
    layout = SequenceLayout(
        seq_len=seq_len + amount,
        sp_size=sp_size,
        documents=document_runs(entries, tensors, dims, seq_len + amount),
        valid=valid_runs(tensors.get("attention_mask") if "attention_mask" in dims else None),
        num_padding=amount,
    )
    hidden: set[str] = set()
    if is_mapping:
        _add_shifted(tensors, dims, candidates, hidden, layout, rules)
    counts = {key: _count(tensors[key], dims[key], layout, rules.ignore_index, key in MASK_KEYS) for key in candidates}
    if not amount:
        rows = max(t.shape[0] if dims[key] else 1 for key, t in tensors.items())
        counts["tokens"] = tuple(float(rows * share) for share in layout.shares)
    return WholeBatch(batch, tensors, dims, frozenset(hidden), layout, counts)


def _add_shifted(
    tensors: dict[str, Tensor],
    dims: dict[str, int],
    candidates: list[str],
    hidden: set[str],
    layout: SequenceLayout,
    rules: BatchRules,
) -> None:
    """Adds what the model would compute wrongly from a slice, since a slice ends before its last label."""
    sources = [("labels", "shift_labels", rules.ignore_index), ("loss_mask", "shift_loss_mask", 0)]
    if not any(key in tensors for key in LABEL_KEYS):
        sources.append(("input_ids", "shift_input_ids", rules.ignore_index))
        hidden.add("shift_input_ids")
    if "shift_labels" in tensors:
        sources = sources[2:]
    for source, target, fill in sources:
        if source in tensors and target not in tensors and dims[source] == 1 and tensors[source].dim() == 2:
            tensors[target], dims[target] = _shift(tensors[source], layout, fill), 1
            if layout.num_padding and source == "input_ids":
                # The padding itself must not become a target.
                tensors[target][:, layout.seq_len - layout.num_padding - 1 :] = fill
            candidates.append(target)
