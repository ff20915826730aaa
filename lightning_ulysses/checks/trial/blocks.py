"""Finds where inside a model the sequence can be split: the modules through which attention calls pass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_ulysses.checks.trial.outputs import called
from lightning_ulysses.geometry.split_plan import ONLY_OUTPUT, SequencePlan
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.regions.matching import submodules


@dataclass
class Block:
    """A module that attention calls pass through.

    Attributes:
        name: Its name below the LightningModule.
        kind: Its class.
        in_list: Whether it is an element of a list of modules.
        lengths: The numbers of queries of the attention calls inside.
        calls_attention: Whether a call was made by itself, and not by another one of these modules inside.
        sees_sequence: Whether keys of one of these calls may be those of the sequence.
        inputs: Parameters that carried the sequence, with the dimension.
        outputs: The same for outputs, by index or key.
    """

    name: str
    kind: str
    in_list: bool
    lengths: set[int] = field(default_factory=set)
    calls_attention: bool = False
    sees_sequence: bool = False
    inputs: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)

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
        parameters = inspect.signature(module.forward).parameters.values()
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        given: list[Mapping[str, Any]] = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            # Positions stand for names that a forward does not have.
            positional = {names[i] if i < len(names) else str(i): value for i, value in enumerate(args)}
            given.append({**positional, **kwargs})
            self._open.append(Block(name, type(module).__name__, in_list))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            block, inputs = self._open.pop(), given.pop()
            if len(block.lengths) == 1:
                block.inputs = _dims(inputs, min(block.lengths))
                block.outputs = _dims(_outputs(output), min(block.lengths))
            # In the order of the calls; of several calls of one module the last one counts.
            self._found.pop(name, None)
            self._found[name] = block

        self._handle.add(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        self._handle.add(module.register_forward_hook(leave).remove)

    def attends(self, queries: int, keys: int) -> None:
        """Notes an attention call of so many queries and keys, in all modules that run."""
        for block in self._open:
            block.lengths.add(queries)
        self.callers.append(called(self._open[-1].name, self._open[-1].kind) if self._open else "")
        if self._open:
            self._open[-1].calls_attention = True
            self._open[-1].sees_sequence |= queries == keys

    def close(self) -> None:
        """Takes all hooks off."""
        self._handle.remove()

    def plans(self) -> list[SequencePlan]:
        """Plans that may be exact, the one that divides most of the model first."""
        usable = [block for block in self._found.values() if block.inputs and block.outputs]
        # Of lists in lists, the elements of the inner one attend.
        blocks = [block for block in usable if block.in_list and not self._has_inner(block)]
        attending = [block for block in usable if block.sees_sequence]
        found = []
        if blocks:
            last = {block.parent: block for block in blocks}
            at_last = self._plan(blocks, list(last.values()))
            found += [replace(at_last, is_divided=True), at_last]
            # What happens between two blocks is that of the whole sequence.
            found.append(self._plan(blocks, blocks))
        if attending:
            found.append(self._plan(attending, attending))
        return [plan for index, plan in enumerate(found) if plan not in found[:index]]

    def _has_inner(self, block: Block) -> bool:
        prefix = f"{block.name}."
        return any(other.in_list and other.lengths and name.startswith(prefix) for name, other in self._found.items())

    def _plan(self, split: list[Block], join: list[Block]) -> SequencePlan:
        """Joins after the blocks in ``join``. Elements of a list with the same inputs share a pattern."""
        patterns: dict[str, dict[str, int]] = {}
        for block in split:
            alike = [other for other in split if other.parent == block.parent and other.inputs == block.inputs]
            shared = block.in_list and len(alike) == self._sizes[block.parent]
            patterns[f"{block.parent}.*" if shared else block.name] = block.inputs
        # Keys of another length are a memory, such as a text, that every rank has whole.
        memory = [name for name, block in self._found.items() if block.calls_attention and not block.sees_sequence]
        inside = tuple(name for name in memory if any(name.startswith(f"{block.name}.") for block in split))
        return SequencePlan(patterns, {block.name: block.outputs for block in join}, inside, is_absolute=True)


def written(plan: SequencePlan) -> dict[str, Any]:
    """A plan as a user would write it."""
    join = {name: outputs.get(ONLY_OUTPUT, dict(outputs)) for name, outputs in plan.join.items()}
    local = {"local": list(plan.local)} if plan.local else {}
    divided = {"divided": True} if plan.is_divided else {}
    return {"split": {name: dict(dims) for name, dims in plan.split.items()}, "join": join, **local, **divided}


def _dims(values: Mapping[str, Any], length: int) -> dict[str, int]:
    """For each value whose tensors have exactly one dimension as long as the sequence, that dimension."""
    found = {}
    for key, value in values.items():
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        dims = {tuple(dim for dim, size in enumerate(t.shape) if size == length) for t in tensors}
        if len(dims) == 1 and len(only := dims.pop()) == 1:
            found[key] = only[0]
    return found


def _outputs(output: Any) -> Mapping[str, Any]:
    if isinstance(output, Tensor):
        return {ONLY_OUTPUT: output}
    if isinstance(output, Mapping):
        return {str(key): value for key, value in output.items() if isinstance(value, Tensor)}
    if isinstance(output, (tuple, list)):
        return {str(index): value for index, value in enumerate(output) if isinstance(value, Tensor)}
    return {}
