"""Hooks of submodules in which tokens meet outside of attention: they run on the joined sequence, or with a halo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_ulysses.attention.whole_mask import whole_values
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.divided import joined
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.cut_and_join import join_shares
from lightning_ulysses.exchange.halo import Fetch, fetched
from lightning_ulysses.exchange.turns import BackwardTurns
from lightning_ulysses.geometry.joint import ONLY_OUTPUT, PADDED, Joined
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.geometry.split_plan import SequencePlan
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.patching.outside_graphs import eager
from lightning_ulysses.regions.matching import Inputs, Matcher
from lightning_ulysses.regions.notes import JointTally
from lightning_ulysses.regions.reach import reach_of


@dataclass
class _Call:
    """A call of a submodule.

    Attributes:
        layout: Of the sequence around it; None where that is not split.
        stack: Undoes what the call has changed.
        dim: The dimension that carries the sequence; that of a halo.
        begin: Where this rank's slice begins in what the submodule returns.
        longer: By how many tokens its input is longer than what the caller gave.
    """

    layout: SequenceLayout | None = None
    stack: ExitStack = field(default_factory=ExitStack)
    dim: int = 0
    begin: int = 0
    longer: int = 0


class _Hooks:
    """Runs a submodule on more than the slice of this rank.

    Args:
        context: Tells what is split at this moment.
        name: Name of the submodule.
        inputs: The inputs that carry the sequence.
    """

    def __init__(self, context: SequenceContext, name: str, inputs: Inputs) -> None:
        self._context = context
        self._name = name
        self._inputs = inputs
        # A stack, since calls of one submodule may nest.
        self._open: list[_Call] = []

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward pre-hook."""
        context = self._context
        # First, since the other hook runs after an exception in this one as well.
        self._open.append(call := _Call())
        region = context.split
        if region is None:
            return None
        # What an earlier region left divided.
        args, kwargs = joined(args), joined(kwargs)
        given = self._inputs.get(args, kwargs)
        new = {key: self._more(key, value, region.layout, call, module) for key, value in given.items()}
        call.layout = region.layout
        call.stack.enter_context(context.at(replace(context.place, region=None, is_joined=True)))
        context.notes.of(JointTally).calls += 1
        args, kwargs = self._inputs.put(args, kwargs, new)
        given = {key: self._whole(value, region) for key, value in kwargs.items()}
        return tuple(self._whole(value, region) for value in args), given

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The forward hook. It also runs after an exception, without an output."""
        call = self._open.pop() if self._open else _Call()
        call.stack.close()
        return None if call.layout is None or output is None else self._less(output, call)

    def _whole(self, leaf: Any, region: LocalBatch) -> Any:
        return leaf

    def _more(self, key: str, value: Any, layout: SequenceLayout, call: _Call, module: nn.Module) -> Any:
        raise NotImplementedError

    def _less(self, output: Any, call: _Call) -> Any:
        raise NotImplementedError

    def _taking_turns(self, tensor: Tensor) -> Tensor:
        """The result of an exchange, in whose backward ranks take turns."""
        self._context.notes.of(BackwardTurns).before(tensor)
        return tensor

    def _refusal(self, what: str, tensor: Tensor, expected: str, kind: str) -> UlyssesError:
        return UlyssesError(
            f"{what} of {self._name} of shape {tuple(tensor.shape)}",
            expected,
            f"change {kind}[{self._name!r}] in the plan",
        )


class JoinedHooks(_Hooks):
    """Joins the inputs of a submodule, and cuts its outputs.

    Args:
        context: Tells what is split at this moment.
        name: Name of the submodule.
        inputs: The inputs that carry the sequence.
        outputs: See `Joined`.
    """

    def __init__(self, context: SequenceContext, name: str, inputs: Inputs, outputs: Mapping[str, int] | None) -> None:
        super().__init__(context, name, inputs)
        self._outputs = outputs

    def _whole(self, leaf: Any, region: LocalBatch) -> Any:
        batches = (region, self._context.place.batch or region)
        return next((found for batch in batches if (found := whole_values(leaf, batch)) is not leaf), leaf)

    def _more(self, key: str, value: Any, layout: SequenceLayout, call: _Call, module: nn.Module) -> Any:
        dim = self._inputs.dims[key]
        return tree_map(lambda leaf: self._joined(key, leaf, dim, layout) if isinstance(leaf, Tensor) else leaf, value)

    def _joined(self, key: str, part: Tensor, wanted: int | None, layout: SequenceLayout) -> Tensor:
        mesh = self._context.mesh
        share = layout.shares[mesh.sp_rank]
        dims = [dim for dim, size in enumerate(part.shape) if size == share] if wanted is None else [wanted]
        if len(dims) != 1 or not -part.dim() <= dims[0] < part.dim() or part.shape[dims[0]] != share:
            where = "exactly one dimension" if wanted is None else f"dimension {wanted}"
            raise self._refusal(key, part, f"this rank's share, {share}, along {where}", "whole")
        assert mesh.sp_group is not None
        is_bool = part.dtype is torch.bool
        # Backends exchange no booleans.
        whole = join_shares(part.byte() if is_bool else part, dims[0], layout.shares, mesh.sp_rank, mesh.sp_group)
        whole = self._taking_turns(whole).bool() if is_bool else self._taking_turns(whole)
        # One process has no padding of this package.
        return whole.narrow(dims[0], 0, layout.real_len)

    def _less(self, output: Any, call: _Call) -> Any:
        layout = call.layout
        assert layout is not None
        if self._outputs is None:
            dims = {dim for dim in self._inputs.dims.values() if dim is not None}
            return tree_map(lambda leaf: self._cut(leaf, self._dim(leaf, dims, layout), layout), output)
        if ONLY_OUTPUT in self._outputs:
            return self._cut(output, self._outputs[ONLY_OUTPUT], layout)
        cut = {key: self._part(output, key, dim, layout) for key, dim in self._outputs.items()}
        if isinstance(output, tuple):
            parts = [cut.get(str(index), part) for index, part in enumerate(output)]
            return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
        # A list, a dict, or an output class of transformers or diffusers: changed in place, so its type stays.
        for key, part in cut.items():
            output[int(key) if key.isdigit() else key] = part
        return output

    def _part(self, output: Any, key: str, dim: int, layout: SequenceLayout) -> Any:
        try:
            part = output[int(key) if key.isdigit() else key]
        except (LookupError, TypeError, ValueError):
            raise UlyssesError(
                f"an output of {self._name} of type {type(output).__name__} without {key!r}",
                "the index or key of what carries the sequence",
                f"change the outputs under whole[{self._name!r}] in the plan",
            ) from None
        return tree_map(lambda leaf: self._cut(leaf, dim, layout), part)

    def _dim(self, leaf: Any, dims: set[int], layout: SequenceLayout) -> int | None:
        if not isinstance(leaf, Tensor):
            return None
        alike = [dim for dim in dims if -leaf.dim() <= dim < leaf.dim() and leaf.shape[dim] == layout.real_len]
        found = alike or [dim for dim, size in enumerate(leaf.shape) if size == layout.real_len]
        if len(found) > 1:
            raise self._refusal("an output", leaf, f"one dimension that is {layout.real_len} long", "whole")
        # What has no tokens, such as the last state of a recurrence, is the same on all ranks.
        return found[0] if found else None

    def _cut(self, leaf: Any, dim: int | None, layout: SequenceLayout) -> Any:
        if dim is None or not isinstance(leaf, Tensor):
            return leaf
        if not -leaf.dim() <= dim < leaf.dim() or leaf.shape[dim] != layout.real_len:
            raise self._refusal("an output", leaf, f"{layout.real_len} tokens along dimension {dim}", "whole")
        return own_slice(leaf, dim, layout, self._context.mesh.sp_rank)


class HaloHooks(_Hooks):
    """Gives a convolution or pooling the tokens beside a slice that it reaches, and cuts what it returns.

    Args:
        context: Tells what is split at this moment.
        name: Name of the submodule.
        inputs: The input that carries the sequence.
        padded: Where the caller has put zeros; see `Halo`.
    """

    def __init__(self, context: SequenceContext, name: str, inputs: Inputs, padded: str) -> None:
        super().__init__(context, name, inputs)
        self._part = PADDED[padded]

    def _more(self, key: str, value: Any, layout: SequenceLayout, call: _Call, module: nn.Module) -> Any:
        mesh, dim = self._context.mesh, self._inputs.dims[key]
        share, rank = layout.shares[mesh.sp_rank], mesh.sp_rank
        assert dim is not None and mesh.sp_group is not None
        if not isinstance(value, Tensor) or not -value.dim() <= dim < value.dim() or value.shape[dim] < share:
            got = value if isinstance(value, Tensor) else torch.empty(0)
            raise self._refusal(key, got, f"at least this rank's share, {share}, along dimension {dim}", "halo")
        # Zeros that the caller has put before and behind each slice.
        extra = value.shape[dim] - share
        before = int(extra * self._part)
        reach = reach_of(module, dim % value.dim(), value.dim(), before)
        if reach is None:
            raise UlyssesError(
                f"a halo of {self._name} ({type(module).__name__}) along dimension {dim}",
                "a convolution or pooling of torch with a stride of 1 and padding by zeros",
                f"name {self._name!r} under whole in the plan, with its inputs",
            )
        edges = (*(min(start, layout.real_len) for start in layout.starts), layout.real_len)
        wanted = reach.spans(layout)
        own = value.narrow(dim, before, edges[rank + 1] - edges[rank])
        tokens = self._taking_turns(fetched(own, dim, Fetch(edges, wanted, rank, mesh.sp_group)))
        (begin, end), call.dim = wanted[rank], dim
        if begin == end:
            # A slice of padding alone: nothing of it is used, but the exchange needs its place in the graph.
            more = torch.cat([tokens, value], dim)
        else:
            at_begin, at_end = before * (begin == 0), (extra - before) * (end == layout.real_len)
            call.begin = edges[rank] - begin - before + at_begin
            more = _zeros_around(tokens, dim, at_begin, at_end)
        call.longer = more.shape[dim] - value.shape[dim]
        return more

    def _less(self, output: Any, call: _Call) -> Any:
        layout, rank = call.layout, self._context.mesh.sp_rank
        assert layout is not None
        if not isinstance(output, Tensor):
            raise UlyssesError(
                f"an output of {self._name} of type {type(output).__name__}",
                "a tensor, as convolutions and poolings return",
                f"name {self._name!r} under whole in the plan, with its inputs",
            )
        span = layout.spans[rank]
        real = max(0, min(span.stop, layout.real_len) - span.start)
        # As long as it would be for what the caller gave: he cuts off what is behind the slice.
        length = output.shape[call.dim] - call.longer
        return _zeros_around(output.narrow(call.dim, call.begin, real), call.dim, 0, length - real)


def _zeros_around(tensor: Tensor, dim: int, before: int, after: int) -> Tensor:
    # F.pad counts dimensions from the last one.
    return F.pad(tensor, [0, 0] * (-1 - (dim if dim < 0 else dim - tensor.dim())) + [before, after])


def own_slice(whole: Tensor, dim: int, layout: SequenceLayout, rank: int) -> Tensor:
    """(..., S, ...) without padding -> (..., S_r, ...), with zeros for the tokens of padding."""
    span, end = layout.spans[rank], layout.real_len
    begin = min(span.start, end)
    part = whole.narrow(dim, begin, min(span.stop, end) - begin)
    missing = layout.shares[rank] - part.shape[dim]
    return _zeros_around(part, dim, 0, missing) if missing else part.contiguous()


def hooks_of(context: SequenceContext, matcher: Matcher, plan: SequencePlan) -> list[tuple[nn.Module, Any, Any]]:
    """For each submodule that the joints of a plan name, its forward pre-hook and its forward hook.

    Args:
        context: Tells what is split at this moment.
        matcher: Resolves the plan's patterns.
        plan: The plan.

    Raises:
        UlyssesError: If the plan names a submodule or an input that does not exist.
    """
    found = []
    for pattern, joint in plan.joints.items():
        for name, module in matcher.find("whole or halo", pattern):
            hooks: _Hooks
            if isinstance(joint, Joined):
                inputs = Inputs(name, module, joint.inputs, plan.is_family, "whole")
                hooks = JoinedHooks(context, name, inputs, joint.outputs)
            else:
                hooks = HaloHooks(context, name, Inputs(name, module, {"0": joint.dim}, plan.is_family), joint.padded)
            found.append((module, _in_use(context, plan, hooks.enter), _in_use(context, plan, hooks.leave)))
    return found


def install(hooks: list[tuple[nn.Module, Any, Any]], handle: Handle) -> None:
    """Registers what `hooks_of` returned; ``handle`` takes the undo."""
    for module, enter, leave in hooks:
        # Before other hooks, such as those that tell a transformers model the positions of a slice.
        handle.add(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
        # `always_call`: what follows an exception must not stay whole.
        handle.add(module.register_forward_hook(leave, always_call=True).remove)


def _in_use(context: SequenceContext, plan: SequencePlan, hook: Callable[..., Any]) -> Callable[..., Any]:
    """``hook``, run in steps that follow ``plan`` and while it is tried, and kept out of compiled graphs."""
    outside = eager(hook)

    def choose(*args: Any) -> Any:
        is_off = context.chosen is not plan or context.place.batch is None
        return None if is_off else outside(*args)

    return choose


def joint_modules(root: nn.Module, plan: SequencePlan) -> list[nn.Module]:
    """The submodules below ``root`` that the joints of a plan name."""
    matcher = Matcher(root, plan)
    return [module for pattern in plan.joints for _, module in matcher.find("whole or halo", pattern)]
