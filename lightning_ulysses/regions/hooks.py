"""Hooks that split the inputs of submodules and join their outputs: they begin and end the regions of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_ulysses.context import LocalBatch, Place, SequenceContext
from lightning_ulysses.divided import Divided, Division, joined
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.cut_and_join import cut, join
from lightning_ulysses.exchange.turns import BackwardTurns
from lightning_ulysses.geometry.joint import ONLY_OUTPUT
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.geometry.split_plan import SequencePlan
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.patching.outside_graphs import eager
from lightning_ulysses.regions import joints, recompute
from lightning_ulysses.regions.matching import Inputs, Matcher
from lightning_ulysses.regions.notes import RegionSizes, RegionTally
from lightning_ulysses.regions.others import OtherInputs, other_inputs
from lightning_ulysses.regions.same_inputs import check_same_inputs

# Regions of a run whose inputs are compared over the group; each comparison is a collective.
_CHECKED_REGIONS = 3


def _describe(leaves: Mapping[str, list[Tensor]]) -> str:
    return ", ".join(f"{name} {' and '.join(str(tuple(t.shape)) for t in tensors)}" for name, tensors in leaves.items())


class Splitter:
    """Cuts the inputs of one submodule. Begins a region if none has begun.

    Args:
        context: Tells what is split at this moment.
        name: Name of the submodule.
        inputs: The inputs to cut.
        others: Inputs that carry other sequences.
    """

    def __init__(self, context: SequenceContext, name: str, inputs: Inputs, others: OtherInputs) -> None:
        self._context = context
        self._name = name
        self._inputs = inputs
        self._others = others

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward pre-hook."""
        context = self._context
        # What an earlier region left divided, such as the output of an encoder.
        others = self._others.get(args, kwargs)
        args, kwargs = joined(self._others.put(args, kwargs, dict.fromkeys(others)))
        given = self._inputs.get(args, kwargs)
        others |= self._others.as_long(given, others, self._inputs)
        given = {key: value for key, value in given.items() if key not in others}
        leaves = {key: self._tensors(key, value) for key, value in given.items()}
        region = context.region
        if region is None:
            region = self._begin(leaves)
        # Inside a region, inputs that are slices already pass unchanged.
        new = {key: self._cut(key, value, leaves, region.layout) for key, value in given.items()}
        context.enter(region)
        new |= self._others.cut(others, region, self._context.mesh.sp_rank, self._inputs)
        new |= self._others.cut_both(args, kwargs, region, self._context.mesh.sp_rank)
        return self._inputs.put(args, kwargs, new)

    def _tensors(self, key: str, value: Any) -> list[Tensor]:
        leaves = tree_flatten(value)[0]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        # Such as the scale beside the angles of a rotary embedding.
        others = [leaf for leaf in leaves if not isinstance(leaf, (Tensor, int, float, type(None)))]
        if others or (not tensors and any(leaf is not None for leaf in leaves)):
            raise UlyssesError(
                f"{key} of {self._name} of type {type(value).__name__}",
                "a tensor, or a tuple, list or dict of tensors",
                f"drop {key!r} from the plan's split",
            )
        return tensors

    def _sizes(self, leaves: Mapping[str, list[Tensor]]) -> set[int]:
        sizes = set()
        for key, tensors in leaves.items():
            dim = self._inputs.dims[key]
            for tensor in tensors:
                # Found in `_only_dim` once the length is known.
                if dim is None:
                    continue
                if not -tensor.dim() <= dim < tensor.dim():
                    raise self._refusal(leaves, f"{key} to have a dimension {dim}")
                sizes.add(tensor.shape[dim])
        return sizes

    def _refusal(self, leaves: Mapping[str, list[Tensor]], expected: str) -> UlyssesError:
        return UlyssesError(
            f"inputs of {self._name} of shapes {_describe(leaves)}",
            expected,
            f"change split[{self._name!r}] in the plan, or run a forward on other data inside "
            "`with lightning_ulysses.unsharded():`",
        )

    def _begin(self, leaves: Mapping[str, list[Tensor]]) -> LocalBatch:
        """A new region, as long as the inputs. These are whole, since nothing is split yet."""
        context, mesh = self._context, self._context.mesh
        running, sizes = context.place.batch, self._sizes(leaves)
        assert running is not None
        length = running.layout.seq_len
        # Without a join the labels are cut like the batch, so the model must be split into the same slices.
        if not context.is_joined:
            if length not in sizes:
                raise self._refusal(leaves, f"at least one that is as long as the batch, {length}")
            region = running
        else:
            if len(sizes) != 1 or min(sizes) < mesh.sp_size:
                raise self._refusal(
                    leaves, f"one length S of at least {mesh.sp_size} along the dimensions {self._inputs.dims}"
                )
            seq_len = sizes.pop()
            # Inputs as long as the batch have its documents and padding. Patches of an image, for example, do not.
            layout = running.layout if seq_len == length else SequenceLayout(seq_len, mesh.sp_size)
            region = LocalBatch(layout, rows=running.rows)
            region.cross_first = context.plan is None or context.plan.cross_first
            # `predict` joins by this layout if the batch itself has no sequence.
            note = running.notes.of(RegionSizes)
            note.layout = layout
            note.layouts.append(layout)
        tally = context.notes.of(RegionTally)
        if tally.begun < _CHECKED_REGIONS:
            check_same_inputs(mesh, self._name, leaves)
        tally.begun += 1
        return region

    def _cut(self, key: str, value: Any, leaves: Mapping[str, list[Tensor]], layout: SequenceLayout) -> Any:
        rank, wanted = self._context.mesh.sp_rank, self._inputs.dims[key]
        share = layout.shares[rank]
        flat, spec = tree_flatten(value)
        for index, tensor in enumerate(flat):
            if not isinstance(tensor, Tensor):
                continue
            # A dimension of None: positions come in several shapes, and only one dimension has the length.
            dim = wanted if wanted is not None else self._only_dim(key, tensor, leaves, layout.seq_len, share)
            if not -tensor.dim() <= dim < tensor.dim() or tensor.shape[dim] not in (share, layout.seq_len):
                raise self._refusal(
                    leaves, f"{key} to be {layout.seq_len} long along dimension {dim}, or {share}, this rank's share"
                )
            if tensor.shape[dim] != share:
                flat[index] = cut(tensor, dim, layout, rank)
        return tree_unflatten(flat, spec)

    def _only_dim(self, key: str, tensor: Tensor, leaves: Mapping[str, list[Tensor]], seq_len: int, share: int) -> int:
        # The whole length first: a tensor that has it is not cut yet.
        for length in (seq_len, share):
            dims = [dim for dim, size in enumerate(tensor.shape) if size == length]
            if dims:
                break
        if len(dims) == 1:
            return dims[0]
        raise self._refusal(leaves, f"{key} to have exactly one dimension that is {seq_len} long")


class Joiner:
    """Joins outputs of one submodule and ends the region.

    Args:
        context: Tells what is split at this moment.
        name: Name of the submodule.
        dims: The outputs to join, with the dimension of the sequence in each.
        is_divided: Whether they are joined only where they must be.
    """

    def __init__(self, context: SequenceContext, name: str, dims: Mapping[str, int], is_divided: bool) -> None:
        self._context = context
        self._name = name
        self._dims = dims
        self._is_divided = is_divided

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The forward hook."""
        region = self._context.region
        if region is None:
            # Outside of a region the output is whole, unless the region ended too early.
            self._check_whole(output)
            return None
        # All outputs are checked before the first collective.
        parts = {key: self._part(key, output) for key in self._dims if self._is_there(key, output)}
        joined = {key: self._join(key, part, region.layout) for key, part in parts.items()}
        self._context.leave(region.layout)
        return self._rebuild(output, joined)

    def _is_there(self, key: str, output: Any) -> bool:
        """The last block may return nothing of one of two sequences."""
        return not (len(self._dims) > 1 and isinstance(output, tuple) and key.isdigit() and output[int(key)] is None)

    def _part(self, key: str, output: Any) -> Tensor:
        try:
            # Indices are strings in a plan.
            part = output if key == ONLY_OUTPUT else output[int(key) if key.isdigit() else key]
        except (LookupError, TypeError, ValueError):
            part = None
        if not isinstance(part, Tensor):
            raise UlyssesError(
                f"an output of {self._name} of type {type(output).__name__}, of which the plan joins {key or 'all'}",
                "a tensor there",
                f"give join[{self._name!r}] the index or key of the tensor with its dimension, such as {{0: 1}}",
            )
        return part

    def _refusal(self, part: Tensor, expected: str) -> UlyssesError:
        return UlyssesError(
            f"an output of {self._name} of shape {tuple(part.shape)}",
            expected,
            f"change join[{self._name!r}] in the plan",
        )

    def _join(self, key: str, part: Tensor, layout: SequenceLayout) -> Tensor:
        mesh, dim = self._context.mesh, self._dims[key]
        others = self._context.region.others if self._context.region is not None else ()
        if -part.dim() <= dim < part.dim():
            length = part.shape[dim]
            layout = next((each for each in (layout, *others) if each.shares[mesh.sp_rank] == length), layout)
        share = layout.shares[mesh.sp_rank]
        if not -part.dim() <= dim < part.dim() or part.shape[dim] != share:
            raise self._refusal(part, f"this rank's share, {share}, along dimension {dim}")
        assert mesh.sp_group is not None
        if self._is_divided:
            return Divided(part, Division(dim % part.dim(), ((*layout.starts, layout.seq_len),), mesh))
        whole = join(part, dim, layout, mesh.sp_rank, mesh.sp_group)
        self._context.notes.of(BackwardTurns).before(whole)
        return whole

    def _check_whole(self, output: Any) -> None:
        """Refuses an output that is a slice although the region has ended: it would never be joined."""
        last = self._context.place.last
        if last is None:
            return
        for key, dim in self._dims.items():
            part = self._part(key, output)
            # The output is still as long as this rank's slice of the last region.
            if -part.dim() <= dim < part.dim() and part.shape[dim] == last.shares[self._context.mesh.sp_rank]:
                raise self._refusal(
                    part, "one join behind each split; this one comes when the sequence is joined already"
                )

    @staticmethod
    def _rebuild(output: Any, joined: Mapping[str, Tensor]) -> Any:
        if ONLY_OUTPUT in joined:
            return joined[ONLY_OUTPUT]
        if isinstance(output, tuple):
            parts = [joined.get(str(index), part) for index, part in enumerate(output)]
            return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
        # A list, a dict, or an output class of transformers or diffusers: changed in place, so its type stays.
        for key, part in joined.items():
            output[int(key) if key.isdigit() else key] = part
        return output


class Local:
    """Makes attention inside one submodule plain."""

    def __init__(self, context: SequenceContext) -> None:
        self._context = context
        # A stack, since calls of one submodule may nest.
        self._open: list[ExitStack] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        """The forward pre-hook."""
        stack, place = ExitStack(), self._context.place
        # A trial runs without the plan, and answers all calls itself.
        if place.trial is None:
            inside = Place(hidden=place.region, watch=place.watch, is_uncompiled=place.is_uncompiled)
            stack.enter_context(self._context.at(inside))
        self._open.append(stack)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """The forward hook. It also runs after an exception."""
        if self._open:
            self._open.pop().close()


def _in_steps(context: SequenceContext, plan: SequencePlan, hook: Callable[..., Any]) -> Callable[..., Any]:
    """``hook``, run only in steps that ``plan`` splits and not in a trial, and kept out of compiled graphs."""
    outside = eager(hook)

    def choose(*args: Any) -> Any:
        place = context.place
        is_off = place.trial is not None or place.batch is None or context.chosen is not plan
        return None if is_off else outside(*args)

    return choose


def install(context: SequenceContext, root: nn.Module, plan: SequencePlan) -> Handle:
    """Registers the hooks of a plan.

    Args:
        context: Tells what is split at this moment. P > 1.
        root: The user's LightningModule.
        plan: The plan.

    Returns:
        A handle whose ``remove()`` removes all hooks.

    Raises:
        UlyssesError: If the plan names a submodule or an input that does not exist.
    """
    matcher = Matcher(root, plan)
    handle = Handle()
    inputs: dict[str, tuple[nn.Module, dict[str, int | None]]] = {}
    for pattern, dims in plan.split.items():
        for name, module in matcher.find("split", pattern):
            # Several patterns may match one submodule. Their inputs are cut by one hook.
            inputs.setdefault(name, (module, {}))[1].update(dims)
    others = other_inputs(matcher, plan, {name: module for name, (module, _) in inputs.items()})
    splitters = [
        (module, Splitter(context, name, Inputs(name, module, dims, plan.is_family), others[name]))
        for name, (module, dims) in inputs.items()
    ]
    joiners = [
        (module, Joiner(context, name, dims, plan.is_divided))
        for pattern, dims in plan.join.items()
        for name, module in matcher.find("join", pattern)
    ]
    # In a plan for several models some names may be missing, but not all.
    if plan.join and not joiners:
        raise matcher.nothing("join", list(plan.join))
    local = [module for pattern in plan.local for _, module in matcher.find("local", pattern)]
    whole = joints.hooks_of(context, matcher, plan)
    for module, splitter in splitters:
        handle.add(module.register_forward_pre_hook(_in_steps(context, plan, splitter), with_kwargs=True).remove)
    for module, joiner in joiners:
        handle.add(module.register_forward_hook(_in_steps(context, plan, joiner)).remove)
    for module in local:
        hooks = Local(context)
        handle.add(module.register_forward_pre_hook(eager(hooks.enter)).remove)
        # `always_call`: attention must not stay plain after an exception.
        handle.add(module.register_forward_hook(eager(hooks.leave), always_call=True).remove)
    joints.install(whole, handle)
    recompute.install(context, root, handle)
    return handle
