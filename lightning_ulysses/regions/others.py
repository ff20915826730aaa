"""Inputs of a split submodule that carry another sequence than the first one, or both in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_ulysses.context import LocalBatch
from lightning_ulysses.divided import Divided, joined
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.cut_and_join import cut
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.geometry.split_plan import Dims, SequencePlan
from lightning_ulysses.regions.matching import Inputs, Matcher


def _length(inputs: Inputs, key: str, value: Any) -> int | None:
    dim = inputs.dims[key]
    if dim is None or not isinstance(value, Tensor) or not -value.dim() <= dim < value.dim():
        return None
    return int(value.shape[dim])


def _slice(value: Tensor, dim: int, layout: SequenceLayout, rank: int) -> Tensor:
    """This rank's slice of a whole tensor, or of one that an earlier region left divided."""
    if isinstance(value, Divided):
        # The slice of an earlier region is this one, unless slices lie elsewhere than even shares.
        bounds = ((*layout.starts, layout.seq_len),)
        if value.division.dim == dim % value.dim() and value.division.rows == bounds:
            return value.local
        value = joined(value)
    return cut(value, dim, layout, rank)


class OtherInputs:
    """Cuts inputs of one submodule by the geometry of the sequences that they carry.

    Args:
        name: Name of the submodule.
        cross: Inputs that carry another sequence.
        both: Inputs that belong to both: a tensor for both, one after the other, or one for each.
    """

    def __init__(self, name: str, cross: Inputs, both: Inputs) -> None:
        self._name = name
        self._cross = cross
        self._both = both

    def get(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Those that carry another sequence, as far as a call has them."""
        return self._cross.get(args, kwargs)

    def put(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], new: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with some of them replaced."""
        return self._cross.put(args, kwargs, new)

    def as_long(self, given: Mapping[str, Any], others: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
        """Inputs as long as another sequence and not as the first one, such as a mask over its tokens.

        Where the plan was found, both may have had one length.

        Args:
            given: Inputs of the first sequence.
            others: Those of another one.
            inputs: Where those of the first one are.
        """
        lengths = {_length(self._cross, key, value) for key, value in others.items()}
        own = {key: _length(inputs, key, value) for key, value in given.items()}
        first = next(iter(own.values()), None)
        return {key: given[key] for key, length in own.items() if length in lengths - {first, None}}

    def cut(self, others: Mapping[str, Any], region: LocalBatch, rank: int, inputs: Inputs) -> dict[str, Any]:
        """This rank's slices of other sequences.

        Args:
            others: Whole tensors, or slices that were cut before in this region.
            region: Where they are split.
            rank: Whose slices.
            inputs: Where those of the first sequence are, of which some may belong to others.

        Raises:
            UlyssesError: If one of them is no tensor with this dimension, or too short.
        """
        found = {}
        for key, value in others.items():
            dim = self._cross.dims.get(key, inputs.dims.get(key))
            if dim is None or not isinstance(value, Tensor) or not -value.dim() <= dim < value.dim():
                shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
                raise UlyssesError(
                    f"{key} of {self._name} of {shown}",
                    f"a tensor with a dimension {dim}, which carries another sequence",
                    f"change cross[{self._name!r}] in the plan",
                )
            found[key] = value
            # What an earlier block of the region returned is a slice already.
            if not region.is_slice(value.shape[dim], rank):
                found[key] = _slice(value, dim, region.admit(value.shape[dim]), rank)
        return found

    def cut_both(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], region: LocalBatch, rank: int
    ) -> dict[str, Any]:
        """This rank's slices of inputs that carry both sequences."""
        found = {}
        for key, value in self._both.get(args, kwargs).items():
            dim = self._both.dims[key]
            flat, spec = tree_flatten(value)
            for index, tensor in enumerate(flat):
                if dim is not None and isinstance(tensor, Tensor) and -tensor.dim() <= dim < tensor.dim():
                    layout = region.layout_of(tensor.shape[dim])
                    if layout.seq_len == tensor.shape[dim]:
                        flat[index] = cut(tensor, dim, layout, rank)
            found[key] = tree_unflatten(flat, spec)
        return found


def other_inputs(matcher: Matcher, plan: SequencePlan, split: Mapping[str, nn.Module]) -> dict[str, OtherInputs]:
    """For each submodule that is split its inputs of other sequences.

    Args:
        matcher: Resolves patterns.
        plan: The plan.
        split: The submodules by name.

    Raises:
        UlyssesError: If the plan names an input of a submodule that is not split.
    """
    cross, both = (_by_name(matcher, key, dims, split) for key, dims in (("cross", plan.cross), ("both", plan.both)))
    return {
        name: OtherInputs(name, *(Inputs(name, module, each.get(name, {}), plan.is_family) for each in (cross, both)))
        for name, module in split.items()
    }


def _by_name(
    matcher: Matcher, key: str, patterns: Mapping[str, Dims], split: Mapping[str, nn.Module]
) -> dict[str, dict[str, int | None]]:
    found: dict[str, dict[str, int | None]] = {}
    for pattern, dims in patterns.items():
        for name, _ in matcher.find(key, pattern):
            if name not in split:
                raise UlyssesError(
                    f"a plan with {key}[{pattern!r}], while split names no input of {name}",
                    "inputs of submodules that are split",
                    f"name the input with the queries under split[{pattern!r}]",
                )
            found.setdefault(name, {}).update(dims)
    return found
