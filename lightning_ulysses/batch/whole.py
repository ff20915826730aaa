"""Reads a whole batch on the host: shifts labels, pads, counts targets, and cuts slices."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.batch.recognition import (
    check_dense,
    check_lengths,
    check_not_nested,
    check_whole,
    count_rows,
    entries_of,
    find_dims,
    find_whole,
    names_inside,
)
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.batch_keys import KEPT, LABEL_KEYS, MASK_KEYS, SEQUENCE_KEYS, BatchRules
from lightning_ulysses.geometry.documents import document_runs, sequences_without_cache, valid_runs
from lightning_ulysses.geometry.layout import SequenceLayout


@dataclass(frozen=True)
class WholeBatch:
    """A batch that has been read but not cut.

    Attributes:
        template: The original batch. It gives the type and the entries that carry no sequence.
        tensors: Every sequence tensor, padded. Includes derived ones such as ``shift_labels``.
        dims: For each of these the dimension that carries the sequence.
        hidden: Keys in ``tensors`` that the module does not get.
        layout: The geometry of the cut.
        counts: For each tensor that may hold the targets, the number of targets that each rank sees. ``"tokens"``
            counts all tokens.
        rows: B.
        whole: Keys in ``tensors`` that every rank gets whole.
        keeps_all: Whether every rank gets all tensors whole and sees all targets.
    """

    template: Any
    tensors: dict[str, Tensor]
    dims: dict[str, int]
    hidden: frozenset[str]
    layout: SequenceLayout
    counts: dict[str, tuple[float, ...]]
    rows: int = 1
    whole: frozenset[str] = frozenset()
    keeps_all: bool = False

    def counts_of_group(self) -> dict[str, float]:
        """The number of targets of the whole batch, for each tensor that may hold them."""
        return {name: values[0] if self.keeps_all else sum(values) for name, values in self.counts.items()}

    def counts_of_rank(self, rank: int) -> dict[str, float]:
        """One rank's part of these numbers. They add up to `counts_of_group`."""
        # If each of P ranks computes the loss of all n targets, each counts for n / P of them, see `loss.token_mean`.
        copies = self.layout.sp_size if self.keeps_all else 1
        return {name: values[rank] / copies for name, values in self.counts.items()}

    def shard(
        self, rank: int, *, stand_in: bool = False, targets: str | None = None, pin: bool = False
    ) -> tuple[Any, dict[str, Tensor], dict[str, float]]:
        """Cuts out one rank's slice.

        Args:
            rank: Rank in the sequence-parallel group.
            stand_in: Whether a slice without a target gets a stand-in target, which does not count. The mean over no
                targets is 0/0, and its backward gives NaN even after a multiplication by 0.
            targets: The tensor that holds the targets, where it is known. A mask of the user's own gets a stand-in only
                then: it may as well mean something else.
            pin: Whether slices are put into pinned memory, from which a GPU copies them without a wait of the host.

        Returns:
            The batch in its original type, the slices by key, and the number of targets that the module sees.
        """
        span = self.layout.spans[rank]
        shards = {
            key: tensor
            if key in self.whole
            else tensor.narrow(self.dims[key], span.start, span.stop - span.start).contiguous()
            for key, tensor in self.tensors.items()
        }
        seen = {name: counts[rank] for name, counts in self.counts.items()}
        if stand_in:
            # The weight of this slice's loss is 0 (see `token_weight`), so the stand-in has no effect on gradients.
            names = {name for name in seen if not name.endswith(KEPT)} | {targets}
            for name in [name for name in seen if seen[name] == 0]:
                key = name.removesuffix(KEPT)
                if key not in shards:
                    continue
                # A slice may be a view of the user's own tensor. Masks may be filled later, see `pipeline.fill_mask`.
                shards[key] = shards[key].clone()
                if name not in names:
                    continue
                # Not the first label, if the module itself shifts whole labels: it would drop that one.
                place = int(self.keeps_all and f"shift_{key}" in self.tensors)
                # 1 in a mask keeps the token. 0 in labels is some class.
                shards[key].view(-1)[place] = 1 if key in MASK_KEYS or name != key else 0
                seen[name] = 1.0
        if pin:
            # Last, since a clone or a copy would leave pinned memory again.
            shards = {key: pinned(tensor) for key, tensor in shards.items()}
        return rebuild(self.template, {k: v for k, v in shards.items() if k not in self.hidden}), shards, seen


def pinned(tensor: Tensor) -> Tensor:
    """The same values in pinned memory; the tensor itself if it is there already, or not on the host."""
    return tensor if tensor.device.type != "cpu" or tensor.is_pinned() else tensor.pin_memory()


def rebuild(template: Any, new: dict[str, Any]) -> Any:
    """A batch of the type of ``template``, with other tensors by key; those of an entry as ``"0.features"``."""
    entries = entries_of(template)
    heads = {key: key.split(".")[0] for key in new if key not in entries and "." in key}
    if heads:
        inside = {
            head: rebuild(entries[head], {key[len(head) + 1 :]: new[key] for key in heads if heads[key] == head})
            for head in dict.fromkeys(heads.values())
        }
        new = {**{key: value for key, value in new.items() if key not in heads}, **inside}
    if isinstance(template, Tensor):
        return new["batch"]
    if isinstance(template, dict) and type(template) is dict:
        return {**template, **new}
    # Such as a BatchEncoding of transformers: a copy keeps the class.
    if isinstance(template, MutableMapping):
        result = copy.copy(template)
        result.update(new)
        return result
    if isinstance(template, Mapping):
        return {**template, **new}
    values = [new.get(str(index), value) for index, value in enumerate(template)]
    # A namedtuple takes its values one by one.
    return type(template)(*values) if hasattr(template, "_fields") else type(template)(values)


def _shift(tensor: Tensor, layout: SequenceLayout, fill: float) -> Tensor:
    """(B, S) -> (B, S): the entry of the next token of the same document; ``fill`` at the end of each document."""
    shifted = torch.nn.functional.pad(tensor[:, 1:], (0, 1), value=fill)
    for row, documents in enumerate(layout.documents or ()):
        shifted[row, torch.tensor([end - 1 for _, end in documents])] = fill
    return shifted


def _pad(tensor: Tensor, key: str, dim: int, amount: int, rules: BatchRules, is_target: bool) -> Tensor:
    if key == "position_ids":
        # Positions go on counting: a restart would mark a new document.
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
    # (..., S, ...) -> (S, ...) -> (S, elements) -> (S,)
    per_position = valid.movedim(dim, 0).flatten(1).sum(dim=1) if valid.dim() > 1 else valid
    return tuple(float(per_position[layout.spans[rank]].sum()) for rank in range(layout.sp_size))


def _count_samples(
    tensors: Mapping[str, Tensor], dims: Mapping[str, int], rows: int, rules: BatchRules
) -> dict[str, float]:
    """Counts of targets for a loss over samples: classes (B,), and the samples if nothing carries a sequence."""
    found = {} if dims else {"tokens": float(rows)}
    for key, tensor in tensors.items():
        if tensor.shape == (rows,) and not tensor.is_floating_point() and tensor.dtype != torch.bool:
            found[key] = float((tensor != rules.ignore_index).sum())
    return found


def read_batch(batch: Any, rules: BatchRules, sp_size: int) -> WholeBatch:
    """Reads a whole batch on the host.

    Args:
        batch: A mapping, a tuple or list, or a tensor.
        rules: The rules for reading it.
        sp_size: P.

    Returns:
        The sequence tensors with ``shift_labels`` added, the layout, and the counts of targets.

    Raises:
        UlyssesError: If the batch cannot be read for certain. The error shows the shapes and the setting to add.
    """
    entries = entries_of(batch, deep=names_inside(rules))
    check_not_nested(entries)
    if rules.keeps_all:
        dims = find_whole(batch, entries, rules, sp_size)
        # A batch without a sequence gets S = P, the smallest length that a layout allows.
        seq_len = max((entries[key].shape[dim] for key, dim in dims.items()), default=sp_size)
    else:
        check_whole(entries, rules)
        dims = find_dims(batch, entries, rules)
        seq_len = check_lengths(entries, dims, rules)
    tensors = {key: entries[key] for key in dims}
    check_dense(tensors, dims)
    is_mapping = isinstance(batch, Mapping)
    candidates = [key for key in _candidates(tensors, is_mapping) if key not in rules.whole]
    # Not on one rank: there attention is plain and would see the padding, and `predict` would return it.
    amount = -seq_len % (rules.pad_to_multiple_of or 1) if sp_size > 1 else 0
    if amount:
        # A pair (x, y) with floats as y, in which padding cannot be marked. `_pad` refuses it.
        float_target = not is_mapping and len(tensors) > 1 and not candidates
        tensors = {
            key: _pad(t, key, dims[key], amount, rules, (key in candidates and key not in MASK_KEYS) or float_target)
            for key, t in tensors.items()
        }
    everything = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    rows = count_rows(tensors or everything, dims)
    mask = tensors.get("attention_mask") if "attention_mask" in dims else None
    positions = tensors.get("position_ids")
    layout = SequenceLayout(
        seq_len=seq_len + amount,
        sp_size=sp_size,
        documents=document_runs(entries, positions, rows, seq_len + amount, mask) if dims else None,
        valid=valid_runs(mask),
        num_padding=amount,
        uncached=sequences_without_cache(positions, rows) if dims else None,
    )
    hidden: set[str] = set()
    if is_mapping or rules.keeps_all:
        _add_shifted(tensors, dims, candidates, hidden, layout, rules)
    counts = {key: _count(tensors[key], dims[key], layout, rules.ignore_index, key in MASK_KEYS) for key in candidates}
    counts |= {
        f"{key}{KEPT}": _count(tensor, dims[key], layout, rules.ignore_index, is_mask=True)
        for key, tensor in tensors.items()
        if _is_mask(key, tensor, is_mapping) and key not in rules.whole
    }
    # With padding, "all tokens" is no candidate: the module's mean would include the padding.
    if not amount:
        counts["tokens"] = tuple(float(rows * share) for share in layout.shares)
    # Every rank sees all targets, and the module gets all tensors.
    if rules.keeps_all:
        counts = {key: (sum(values),) * sp_size for key, values in counts.items()}
        counts |= {key: (count,) * sp_size for key, count in _count_samples(everything, dims, rows, rules).items()}
        tensors = {**everything, **tensors}
    whole = frozenset(tensors) if rules.keeps_all else rules.whole & set(tensors)
    return WholeBatch(batch, tensors, dims, frozenset(hidden), layout, counts, rows, whole, rules.keeps_all)


def _is_mask(key: str, tensor: Tensor, is_named: bool) -> bool:
    """Whether it may say which tokens a loss is a mean over, and with which weights, beside `MASK_KEYS`."""
    if key in MASK_KEYS or key == "attention_mask" or tensor.dim() < 2:
        return False
    # Weights (B, S), one for each token.
    is_weight = is_named and tensor.is_floating_point() and tensor.dim() == 2 and bool((tensor >= 0).all())
    return "mask" in key or tensor.dtype == torch.bool or is_weight


def _candidates(tensors: Mapping[str, Tensor], is_mapping: bool) -> list[str]:
    """Keys of the tensors that may hold the targets."""
    # In a tuple, the last one of several.
    if not is_mapping:
        last = list(tensors)[-1:]
        return last if len(tensors) > 1 and not tensors[last[0]].is_floating_point() else []
    known = [key for key in tensors if key in LABEL_KEYS + MASK_KEYS]
    return known + [
        key for key, t in tensors.items() if key not in SEQUENCE_KEYS and not t.is_floating_point() and t.dim() > 1
    ]


def _add_shifted(
    tensors: dict[str, Tensor],
    dims: dict[str, int],
    candidates: list[str],
    hidden: set[str],
    layout: SequenceLayout,
    rules: BatchRules,
) -> None:
    """Adds shifted labels. A model cannot shift a slice itself: the label of its last token lies on the next rank."""
    sources = [("labels", "shift_labels", rules.ignore_index), ("loss_mask", "shift_loss_mask", 0)]
    if not any(key in tensors for key in LABEL_KEYS):
        # Without labels, the step may pass input_ids as labels to a transformers model.
        sources.append(("input_ids", "shift_input_ids", rules.ignore_index))
        hidden.add("shift_input_ids")
    if list(tensors) == ["batch"] and not tensors["batch"].is_floating_point():
        # A single tensor of tokens, from which the module makes inputs and targets itself.
        sources = [("batch", "shift_batch", rules.ignore_index)]
        hidden.add("shift_batch")
    # The user has shifted already.
    if "shift_labels" in tensors:
        sources = sources[2:]
    for source, target, fill in sources:
        if source in tensors and target not in tensors and dims[source] == 1 and tensors[source].dim() == 2:
            tensors[target], dims[target] = _shift(tensors[source], layout, fill), 1
            if layout.num_padding and source == "input_ids":
                # The padding itself must not become a target.
                tensors[target][:, layout.real_len - 1 :] = fill
            candidates.append(target)
