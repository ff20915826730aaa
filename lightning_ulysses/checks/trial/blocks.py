"""Finds where inside a model the sequence can be split: the modules through which attention calls pass."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_ulysses.checks.trial.outputs import arguments_of, called
from lightning_ulysses.geometry.joint import ONLY_OUTPUT, Halo, Joined, Joint
from lightning_ulysses.geometry.split_plan import Dims, SequencePlan
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.regions.matching import submodules
from lightning_ulysses.upstream.torch_graph import reached


@dataclass
class Block:
    """A module that attention calls pass through.

    Attributes:
        name: Its name below the LightningModule.
        kind: Its class.
        in_list: Whether it is an element of a list of modules.
        lengths: The numbers of queries of the attention calls inside.
        others: The same for keys of other sequences.
        given: Tensors among its arguments, by name.
        memories: Arguments that keys depend on, and their queries do not.
        calls_attention: Whether a call was made by itself, and not by another one of these modules inside.
        sees_sequence: Whether keys of one of these calls may be those of the sequence.
        inputs: Parameters that carried the sequence, with the dimension.
        outputs: The same for outputs, by index or key.
        crossing: For each number of keys in ``others`` the parameters that carried as many tokens, with the dimension.
        partner: The parameter that carried another sequence, which attention joins with that of ``inputs``.
        both: Parameters that belong to both, with the dimension.
        is_silent: Whether no attention call inside tells where the sequence is, so that it was guessed.
        length: Of the sequence in ``inputs``.
    """

    name: str
    kind: str
    in_list: bool
    lengths: set[int] = field(default_factory=set)
    others: set[int] = field(default_factory=set)
    given: dict[str, Tensor] = field(default_factory=dict)
    memories: set[str] = field(default_factory=set)
    calls_attention: bool = False
    sees_sequence: bool = False
    inputs: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    crossing: dict[int, dict[str, int]] = field(default_factory=dict)
    partner: dict[str, int] = field(default_factory=dict)
    both: dict[str, int] = field(default_factory=dict)
    is_silent: bool = False
    length: int = 0

    @property
    def parent(self) -> str:
        """The name of the list."""
        return self.name.rpartition(".")[0]


class BlockFinder:
    """Watches the modules below ``root`` in one run on a whole sequence.

    Args:
        root: The user's LightningModule.
    """

    def __init__(self, root: nn.Module) -> None:
        self._open: list[Block] = []
        self._found: dict[str, Block] = {}
        #: For each attention call the innermost module around it, as messages call it.
        self.callers: list[str] = []
        self._handle = Handle()
        named = {".".join(parts): module for parts, module in submodules(root).items() if parts}
        lists = {name for name, module in named.items() if isinstance(module, (nn.ModuleList, nn.Sequential))}
        self._sizes = {name: sum(1 for _ in named[name].children()) for name in lists}
        for name, module in named.items():
            # A list is no module that a plan can split: its elements are.
            if name not in lists and any(True for _ in module.parameters()):
                self._watch(name, module, name.rpartition(".")[0] in lists)

    def _watch(self, name: str, module: nn.Module, in_list: bool) -> None:
        by_name = arguments_of(module)
        given: list[Mapping[str, Any]] = []
        widths = {size for p in module.parameters() for size in getattr(p, "ds_shape", p.shape)}

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            given.append(by_name(args, kwargs))
            tensors = {key: value for key, value in given[-1].items() if isinstance(value, Tensor)}
            self._open.append(Block(name, type(module).__name__, in_list, given=tensors))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            block, inputs = self._open.pop(), given.pop()
            if len(block.lengths) == 1:
                length, lengths = min(block.lengths), block.lengths | block.others
                block.length = length
                block.inputs = _dims(inputs, length, lengths, widths)
                block.outputs = _dims(outputs_of(output), length, lengths, widths)
                block.crossing = {
                    other: _dims(inputs, other, lengths, widths) for other in block.others - block.lengths
                }
                if length in block.others:
                    # Of the same length as the queries, so that only its use tells it apart.
                    memories = {key: block.inputs.pop(key) for key in [*block.inputs] if key in block.memories}
                    block.crossing[length] = memories
            if block.lengths:
                _note_pair(block, inputs, output, widths)
            if in_list and not (block.inputs and block.outputs):
                _guess(block, inputs, outputs_of(output), widths)
            block.given.clear()
            # In the order of the calls; of several calls of one module the last one counts.
            self._found.pop(name, None)
            self._found[name] = block

        self._handle.add(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        self._handle.add(module.register_forward_hook(leave).remove)

    def attends(self, queries: int, keys: int, q: Tensor | None, k: Tensor | None) -> None:
        """Notes a call in which tokens meet, in all modules that run.

        Args:
            queries: How many tokens see others.
            keys: How many are seen.
            q: The queries (..., S, D) of attention.
            k: Its keys.
        """
        is_other = queries != keys
        for block in self._open:
            block.lengths.add(queries)
            memories = None
            if queries == keys and q is not None and k is not None:
                memories = _memories(block.given, q, k)
            if memories is not None:
                block.memories |= memories
                is_other = True
            if queries != keys or memories is not None:
                block.others.add(keys)
        self.callers.append(called(self._open[-1].name, self._open[-1].kind) if self._open else "")
        if self._open:
            self._open[-1].calls_attention = True
            self._open[-1].sees_sequence |= not is_other

    def close(self) -> None:
        """Takes all hooks off."""
        self._handle.remove()

    def plans(self, sp_size: int) -> list[SequencePlan]:
        """Plans that may be exact, the one that divides most of the model first.

        Args:
            sp_size: P. A block with fewer tokens, such as the last stage of an image network, is left alone.
        """
        told = [block for block in self._found.values() if block.inputs and block.outputs]
        told = [block for block in told if block.partner or block.length >= sp_size]
        usable = [block for block in told if not block.is_silent]
        # Of lists in lists, the elements of the inner one attend, and those of the outer one may divide more.
        blocks = [block for block in usable if block.in_list and not self._has_inner(block)]
        outer = [block for block in usable if block.in_list and not self._is_inner(block, usable)]
        attending = [block for block in usable if block.sees_sequence]
        found = [*self._together(outer), *self._across(outer), *self._across(blocks)]
        if blocks:
            last = {block.parent: block for block in blocks}
            at_last = self._plan(blocks, list(last.values()))
            found += [replace(at_last, is_divided=True), at_last]
            # What happens between two blocks is that of the whole sequence.
            found.append(self._plan(blocks, blocks))
        if any(block.is_silent for block in told):
            # Attention that is not taken over runs on the joined sequence, and what is around it is divided.
            lists = [block for block in told if block.in_list]
            inner = [block for block in lists if not any(self._is_inner(other, [block]) for other in lists)]
            for listed in ([block for block in lists if not self._is_inner(block, told)], inner):
                at_last = self._plan(listed, list({block.parent: block for block in listed}.values()))
                found += [replace(at_last, is_divided=True), at_last, self._plan(listed, listed)]
        if attending:
            found.append(self._plan(attending, attending))
        return [plan for index, plan in enumerate(found) if plan not in found[:index]]

    def _across(self, blocks: list[Block]) -> list[SequencePlan]:
        """Plans in which blocks attend to slices of what other blocks return; none if no block does."""
        split = {length for block in blocks for length in block.lengths}
        cross: dict[str, dict[str, int]] = {block.name: {} for block in blocks}
        for block in blocks:
            for length in block.others & split:
                cross[block.name] |= block.crossing.get(length, {})
        if not any(cross.values()):
            return []
        last = {block.parent: block for block in blocks}
        plan = self._plan(blocks, list(last.values()), cross, split)
        return [replace(plan, is_divided=True), plan]

    def _together(self, blocks: list[Block]) -> list[SequencePlan]:
        """Plans for blocks whose attention joins two sequences; none if no block does."""
        together = [block for block in blocks if block.partner]
        if not together:
            return []
        found = []
        # Blocks of one sequence may not be split as well, such as those that refine a short text.
        for chosen in (blocks, together) if len(together) < len(blocks) else (together,):
            cross = {block.name: block.partner for block in chosen}
            plan = self._plan(chosen, list({block.parent: block for block in chosen}.values()), cross)
            both = {name: block.both for name in plan.split for block in chosen if self._fits(name, block)}
            plan = replace(plan, both={name: dims for name, dims in both.items() if dims})
            for first in (True, False):
                found += [replace(plan, cross_first=first, is_divided=divided) for divided in (True, False)]
        return found

    @staticmethod
    def _fits(pattern: str, block: Block) -> bool:
        return pattern in (block.name, f"{block.parent}.*")

    def _has_inner(self, block: Block) -> bool:
        prefix = f"{block.name}."
        return any(other.in_list and other.lengths and name.startswith(prefix) for name, other in self._found.items())

    @staticmethod
    def _is_inner(block: Block, usable: list[Block]) -> bool:
        return any(other.in_list and block.name.startswith(f"{other.name}.") for other in usable)

    def _plan(
        self,
        split: list[Block],
        join: list[Block],
        cross: Mapping[str, dict[str, int]] | None = None,
        lengths: Collection[int] = (),
    ) -> SequencePlan:
        """Joins after the blocks in ``join``. Elements of a list with the same inputs share a pattern.

        Args:
            split: The blocks.
            join: Some of them.
            cross: For each block the inputs that carry another sequence.
            lengths: Numbers of keys that are slices of another sequence.
        """
        patterns: dict[str, dict[str, int]] = {}
        others: dict[str, dict[str, int]] = {}
        given = cross or {}
        for block in split:
            other = given.get(block.name, {})
            alike = [
                each
                for each in split
                if each.parent == block.parent and each.inputs == block.inputs and given.get(each.name, {}) == other
            ]
            shared = block.in_list and len(alike) == self._sizes[block.parent]
            name = f"{block.parent}.*" if shared else block.name
            patterns[name] = block.inputs
            if other:
                others[name] = other
        # Keys of another length are a memory, such as a text, that every rank has whole.
        memory = [
            name
            for name, block in self._found.items()
            if block.calls_attention and not block.sees_sequence and not block.others & set(lengths)
        ]
        inside = tuple(name for name in memory if any(name.startswith(f"{block.name}.") for block in split))
        joined = {block.name: block.outputs for block in join}
        return SequencePlan(patterns, joined, inside, cross=others, is_absolute=True)


def _note_pair(block: Block, inputs: Mapping[str, Any], output: Any, widths: Collection[int]) -> None:
    """Finds two inputs (B, S_1, ...) and (B, S_2, ...) of a block whose attention sees both as one sequence."""
    length = max(block.lengths)
    given = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and value.dim() == 3}
    if block.inputs and any(key in given for key in block.inputs):
        return
    pairs = [
        (one, other)
        for one, a in given.items()
        for other, b in given.items()
        if one != other and a.shape[1] >= b.shape[1] and a.shape[1] + b.shape[1] == length
    ]
    if not pairs:
        return
    one, other = pairs[0]
    sizes = (given[one].shape[1], given[other].shape[1])
    lengths = {length, *sizes}
    alike = _dims(inputs, sizes[0], lengths, widths)
    block.inputs = {one: 1, **{key: dim for key, dim in alike.items() if key != other}}
    block.partner = {other: 1}
    # One tensor for both, or one for each.
    only = _only_dims(inputs, lengths, widths)
    block.both = {key: dim for key, dim in only.items() if key not in {*block.inputs, other}}
    returned = outputs_of(output)
    block.outputs = _dims(returned, sizes[0], lengths, widths) | _dims(returned, sizes[1], lengths, widths)


def _guess(block: Block, inputs: Mapping[str, Any], outputs: Mapping[str, Any], widths: Collection[int]) -> None:
    """Takes an input (B, S, ...) that comes back in the same shape for the sequence, where attention tells none."""
    shapes = {value.shape for value in outputs.values()}
    for value in inputs.values():
        if isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point() and value.shape in shapes:
            length = block.length = value.shape[1]
            block.inputs, block.outputs = (_dims(each, length, {length}, widths) for each in (inputs, outputs))
            block.is_silent = True
            return


def _only_dims(values: Mapping[str, Any], lengths: Collection[int], widths: Collection[int]) -> dict[str, int]:
    """For each value whose tensors have exactly one dimension as long as some sequence, the same for all, that one.

    Features may be as many as tokens: the last dimension does not count if a parameter of the module has its size.
    Masks (..., ..., S, S) have none.
    """
    found = {}
    for key, value in values.items():
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        dims = {
            tuple(d for d, size in enumerate(t.shape) if size in lengths and not (d and _is_width(t, d, widths)))
            for t in tensors
        }
        if len(dims) == 1 and len(only := dims.pop()) == 1:
            found[key] = only[0]
    return found


def _is_width(tensor: Tensor, dim: int, widths: Collection[int]) -> bool:
    size, is_mask = tensor.shape[dim], tensor.dim() == 4 and tensor.shape[-1] == tensor.shape[-2]
    return dim == tensor.dim() - 1 and size in widths and tensor.is_floating_point() and not is_mask


def _memories(given: Mapping[str, Tensor], q: Tensor, k: Tensor) -> set[str] | None:
    """The arguments of a block that may be another sequence, to which an attention call attends; None if none is.

    Args:
        given: The arguments.
        q: The queries.
        k: As many keys.
    """
    nodes = {tensor.grad_fn: name for name, tensor in given.items() if tensor.grad_fn is not None}
    of_queries = {nodes[node] for node in reached(q, nodes)}
    of_keys = {nodes[node] for node in reached(k, nodes)}
    # Without a gradient nothing is known: then it is the same sequence, as in most models.
    if not of_queries or of_queries & of_keys:
        return None
    # What an encoder returns that is not trained has no graph.
    frozen = {name for name, tensor in given.items() if tensor.grad_fn is None and tensor.is_floating_point()}
    return of_keys or {name for name in frozen if given[name].dim() == q.dim() - 1}


def written(plan: SequencePlan) -> dict[str, Any]:
    """A plan as a user would write it."""
    join = {name: outputs.get(ONLY_OUTPUT, dict(outputs)) for name, outputs in plan.join.items()}
    local = {"local": list(plan.local)} if plan.local else {}
    divided = {"divided": True} if plan.is_divided else {}
    split = {name: dict(dims) for name, dims in plan.split.items()}
    joints = {
        key: {name: _joint(joint) for name, joint in plan.joints.items() if isinstance(joint, kind)}
        for key, kind in (("whole", Joined), ("halo", Halo))
    }
    others = {key: {name: dict(dims) for name, dims in given.items()} for key, given in _others(plan)}
    kept = {key: value for key, value in {"split": split, **others, "join": join, **joints}.items() if value}
    order = {} if plan.cross_first else {"cross_first": False}
    return {**kept, **order, **local, **divided}


def _others(plan: SequencePlan) -> list[tuple[str, Mapping[str, Dims]]]:
    return [("cross", plan.cross), ("both", plan.both)]


def _joint(joint: Joint) -> Any:
    if isinstance(joint, Halo):
        return joint.dim if joint.padded == "before" else {"dim": joint.dim, "padded": joint.padded}
    if joint.outputs is None:
        return dict(joint.inputs)
    return {"inputs": dict(joint.inputs), "outputs": joint.outputs.get(ONLY_OUTPUT, dict(joint.outputs))}


def _dims(values: Mapping[str, Any], length: int, lengths: Collection[int], widths: Collection[int]) -> dict[str, int]:
    """For each value whose tensors have exactly one dimension as long as a sequence, that dimension.

    Args:
        values: By name.
        length: Of the sequence.
        lengths: Of all sequences. What has two of them, such as a mask, stays whole.
        widths: See `_only_dims`.
    """
    only = _only_dims(values, lengths, widths)
    tensors = {key: [leaf for leaf in tree_leaves(values[key]) if isinstance(leaf, Tensor)] for key in only}
    return {key: dim for key, dim in only.items() if all(t.shape[dim] == length for t in tensors[key])}


def outputs_of(output: Any) -> Mapping[str, Any]:
    """What a module returned, by index or key."""
    if isinstance(output, Tensor):
        return {ONLY_OUTPUT: output}
    if isinstance(output, Mapping):
        return {str(key): value for key, value in output.items() if isinstance(value, Tensor)}
    if isinstance(output, (tuple, list)):
        return {str(index): value for index, value in enumerate(output) if isinstance(value, Tensor)}
    return {}
