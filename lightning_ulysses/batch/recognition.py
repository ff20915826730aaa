"""Finds the tensors of a batch that carry the sequence, and the dimension. If this is not certain, it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.batch_keys import LABEL_KEYS, SEQUENCE_KEYS, WHOLE_KEYS, BatchRules


def entries_of(batch: Any, *, deep: bool = False) -> dict[str, Any]:
    """The entries of a batch by key. Those of a tuple or list go by index, ``"0"``, ``"1"``, ...

    Args:
        batch: The batch.
        deep: Whether entries of entries follow, such as ``"0.features"``.

    Raises:
        UlyssesError: If the batch is no mapping, tuple, list or tensor.
    """
    if isinstance(batch, Tensor):
        return {"batch": batch}
    if isinstance(batch, (Mapping, tuple, list)):
        found = dict(batch.items() if isinstance(batch, Mapping) else ((str(i), each) for i, each in enumerate(batch)))
        nested = {key: value for key, value in found.items() if deep and isinstance(value, (Mapping, tuple, list))}
        inner = {
            f"{key}.{name}": part
            for key, value in nested.items()
            for name, part in entries_of(value, deep=True).items()
        }
        return {**inner, **found}
    raise UlyssesError(
        f"a batch of type {type(batch).__name__}",
        "a mapping, a tuple or list of tensors, or a tensor",
        "return a dict from the collate function",
    )


def names_inside(rules: BatchRules) -> bool:
    """Whether ``sequence_dims`` names entries of entries, such as ``"0.features"``."""
    return any("." in key for key in rules.sequence_dims)


def check_not_nested(entries: Mapping[str, Any]) -> None:
    """Refuses nested tensors, which have no one length."""
    nested = [key for key, value in entries.items() if isinstance(value, Tensor) and value.is_nested]
    if nested:
        raise UlyssesError(
            f"batch[{nested[0]!r}], a nested tensor",
            "dense tensors, which can be cut along the sequence",
            "pad it in the collate function, tensor.to_padded_tensor(0), and add an attention_mask",
        )


def check_dense(tensors: Mapping[str, Tensor], dims: Mapping[str, int]) -> None:
    """Refuses sequence tensors that cannot be cut, and batches without a row.

    Raises:
        UlyssesError: With the shapes of the batch.
    """
    for key, dim in dims.items():
        tensor = tensors[key]
        if tensor.layout != torch.strided:
            raise UlyssesError(
                f"batch[{key!r}] of layout {str(tensor.layout).removeprefix('torch.')}",
                "dense tensors, which can be cut along the sequence",
                "convert it in the collate function: tensor.to_dense()",
            )
        if dim > 0 and tensor.shape[0] == 0:
            raise UlyssesError(
                f"a batch {_describe(tensors)} without a row",
                "at least one row",
                "set drop_last=True in the dataloader, or skip empty batches",
            )


def _describe(entries: Mapping[str, Any]) -> str:
    """Keys, shapes and dtypes of a batch, for an error message."""
    seen = (
        f"{key!r}: {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        if isinstance(value, Tensor)
        else f"{key!r}: {type(value).__name__}"
        for key, value in entries.items()
    )
    return "{" + ", ".join(seen) + "}"


def _suggest(entries: Mapping[str, Any]) -> str:
    # The longest dimension, except for the first one, which usually counts rows.
    dims = {
        key: max(range(min(1, value.dim() - 1), value.dim()), key=value.shape.__getitem__)
        for key, value in entries.items()
        if isinstance(value, Tensor) and value.dim() > 0
    }
    if not dims:
        return "have the dataset or collate_fn yield tensors"
    images = [key for key in dims if entries[key].dim() > 3 and entries[key].is_floating_point()]
    if images:
        return (
            f"set split='blocks' in the strategy, since a model makes a sequence of {images[0]!r} itself, such as one "
            "of patches; or name the dimension that carries the sequence by sequence_dims"
        )
    return f"name the dimension that carries the sequence, such as sequence_dims={dims}, in the strategy"


def _usual_dim(key: str, tensor: Tensor) -> int:
    # Positions (S,) that all rows share.
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


def _check_tensors(entries: Mapping[str, Any], rules: BatchRules) -> None:
    """Refuses numbers under a usual key that are no tensor: nobody would cut them, shift them or count them."""
    for key in SEQUENCE_KEYS:
        value = entries.get(key)
        if isinstance(value, Tensor) or key in rules.sequence_dims or not _is_numbers(value):
            continue
        raise UlyssesError(
            f"batch[{key!r}], a {type(value).__name__} of numbers",
            "a tensor (B, S)",
            f"make it a tensor in the collate function, or name it in sequence_dims={{{key!r}: None}} if it is no "
            "sequence",
        )


def _is_numbers(value: Any) -> bool:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    return isinstance(value, (int, float)) or (kind != "" and kind in "biuf") or isinstance(value, Tensor)


def _check_flat(entries: Mapping[str, Any]) -> None:
    # Lightning combines several dataloaders into a dict or list of batches.
    nested = [value for value in entries.values() if isinstance(value, (Mapping, tuple, list))]
    has_tensors = any(isinstance(value, Tensor) for value in entries.values())
    if not has_tensors and any(isinstance(part, Tensor) for value in nested for part in entries_of(value).values()):
        raise UlyssesError(
            f"a batch {_describe(entries)} that holds batches, as several dataloaders together make it",
            "one batch for each step, a mapping or tuple of tensors, whose sequence is cut and whose targets count",
            "use one dataloader, such as over a torch.utils.data.ConcatDataset of the datasets; for a batch whose "
            "inputs are a mapping, name them in sequence_dims={'0.features': 1}, or flatten it in the collate function",
        )


def find_dims(batch: Any, entries: dict[str, Any], rules: BatchRules) -> dict[str, int]:
    """The sequence dimension of every tensor that has one.

    Raises:
        UlyssesError: If no sequence is found, or the batch consists of batches. Also if a tensor under a usual key has
            an unusual shape.
    """
    if not names_inside(rules):
        _check_flat(entries)
    if isinstance(batch, Mapping):
        _check_tensors(entries, rules)
    # A key may be missing in some batches, but not all keys in one batch.
    unknown_keys = set(rules.sequence_dims) - set(entries)
    if unknown_keys and not set(rules.sequence_dims) & set(entries):
        raise UlyssesError(
            f"a batch {_describe(entries)} with none of the keys in sequence_dims={dict(rules.sequence_dims)}",
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
                # Negative dimensions count from the end.
                dims[key] = dim % value.dim() if -value.dim() <= dim < value.dim() else _no_such_dim(key, dim, value)
        elif isinstance(batch, Mapping) and key in SEQUENCE_KEYS:
            dims[key] = _usual_dim(key, value)
    # A pair (x, y) of equal shapes (B, S), or one tensor of tokens (B, S).
    if not isinstance(batch, Mapping) and not rules.sequence_dims:
        tensors = list(entries.values())
        if all(isinstance(t, Tensor) and t.dim() == 2 and t.shape == tensors[0].shape for t in tensors) and (
            len(tensors) == 2 or (len(tensors) == 1 and not tensors[0].is_floating_point())
        ):
            dims = dict.fromkeys(entries, 1)
    if not dims:
        raise UlyssesError(
            f"a batch {_describe(entries)} whose sequence cannot be identified",
            "a mapping with the usual keys (input_ids, labels, ...), a tuple (x, y) of equal (B, S), or sequence_dims",
            _suggest(entries),
        )
    return dims


def find_whole(batch: Any, entries: dict[str, Any], rules: BatchRules, sp_size: int) -> dict[str, int]:
    """The sequence dimensions of a batch that is not cut, as far as they are certain.

    They are only used to shift and count labels, so no batch is refused. Without labels, samples are counted.
    """
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor) and key not in WHOLE_KEYS}
    named = {key: dim for key, dim in rules.sequence_dims.items() if key in tensors and dim is not None}
    if named:
        dims = {key: dim % tensors[key].dim() for key, dim in named.items()}
    elif isinstance(batch, Mapping):
        # Also positions (S,) that all rows share, which tell the documents apart.
        usual = {key: (1, 2) if key == "position_ids" else (2,) for key in SEQUENCE_KEYS}
        dims = {key: _usual_dim(key, value) for key, value in tensors.items() if value.dim() in usual.get(key, ())}
    else:
        alike = {tuple(value.shape) for value in tensors.values() if value.dim() == 2}
        # A pair (x, y), or one tensor.
        dims = dict.fromkeys(tensors, 1) if len(alike) == 1 and len(tensors) == len(entries) <= 2 else {}
        dims = {key: 1 for key in dims if tensors[key].dim() == 2}
    # The labels set the length S. Tensors of another length are no part of the sequence.
    first = next((key for key in (*LABEL_KEYS, *dims) if key in dims), None)
    length = tensors[first].shape[dims[first]] if first is not None else 0
    return {key: dim for key, dim in dims.items() if tensors[key].shape[dim] == length >= sp_size}


def _no_such_dim(key: str, dim: int, tensor: Tensor) -> int:
    raise UlyssesError(
        f"sequence_dims={{{key!r}: {dim}}} for a tensor of shape {tuple(tensor.shape)}",
        f"a dimension between 0 and {tensor.dim() - 1}",
        f"change sequence_dims[{key!r}]",
    )


def check_lengths(entries: dict[str, Any], dims: dict[str, int], rules: BatchRules) -> int:
    """S, after checking that all tensors in ``dims`` have this length and no other tensor has.

    Raises:
        UlyssesError: If lengths differ, or another tensor could carry the sequence as well.
    """
    lengths = {key: entries[key].shape[dim] for key, dim in dims.items()}
    seq_len = next(iter(lengths.values()))
    if any(length != seq_len for length in lengths.values()):
        raise UlyssesError(
            f"sequence tensors of different lengths {lengths} in a batch {_describe(entries)}",
            "one length S for all of them",
            "pad or cut them to one length in the collate function, or leave one out with sequence_dims={key: None}; "
            "if they are those of an encoder and a decoder, set split='blocks' in the strategy",
        )
    for key, value in entries.items():
        # A setting or a known key says for certain that the tensor carries no sequence.
        settled = key in dims or key in WHOLE_KEYS or key in rules.sequence_dims or key in rules.whole
        if not settled and isinstance(value, Tensor) and seq_len in value.shape:
            raise UlyssesError(
                f"batch[{key!r}] of shape {tuple(value.shape)}, one of whose dimensions equals the sequence length "
                f"{seq_len}, in a batch {_describe(entries)}",
                "to know whether it carries the sequence",
                f"add sequence_dims={{{key!r}: {list(value.shape).index(seq_len)}}} to the strategy if it does, "
                f"or sequence_dims={{{key!r}: None}} if every rank needs all of it",
            )
    return seq_len


def check_whole(entries: Mapping[str, Any], rules: BatchRules) -> None:
    """Raises `UlyssesError` if the batch has none of the keys that the plan keeps whole."""
    if rules.whole and not rules.whole & set(entries):
        raise UlyssesError(
            f"a batch {_describe(entries)} without any of {sorted(rules.whole)}",
            "the inputs that the plan keeps whole",
            "name the batch's keys under `whole` in the plan (for a tuple, the indices '0', '1', ...)",
        )


def count_rows(tensors: Mapping[str, Tensor], dims: Mapping[str, int]) -> int:
    """B. Tensors (B, S, ...) tell it for certain; dimension 0 of others, such as (3, B, S), may be something else."""
    found = [tensor.shape[0] for key, tensor in tensors.items() if dims.get(key) == 1]
    found = found or [tensor.shape[0] if dims[key] else 1 for key, tensor in tensors.items() if key in dims]
    # If nothing carries a sequence, the batch consists of samples (B, ...).
    return max(found or [tensor.shape[0] for tensor in tensors.values() if tensor.dim()], default=1)
