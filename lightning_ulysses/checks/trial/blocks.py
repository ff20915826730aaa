"""Finds a model's repeated blocks: the elements of a list through which attention calls pass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_ulysses.geometry.split_plan import ONLY_OUTPUT
from lightning_ulysses.patching.handle import Handle


@dataclass
class Block:
    """One element of a list.

    Attributes:
        name: Its name below the LightningModule.
        inputs: Parameters that carried the sequence, with the dimension.
        outputs: The same for outputs, by index or key.
        attends: Whether an attention call was made inside.
    """

    name: str
    inputs: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    attends: bool = False


class BlockFinder:
    """Watches the elements of all lists below ``root`` in one run.

    Args:
        root: The user's LightningModule.
        seq_len: S of the run.
    """

    def __init__(self, root: nn.Module, seq_len: int) -> None:
        self._seq_len = seq_len
        self._open: list[Block] = []
        self._found: dict[str, Block] = {}
        self._handle = Handle()
        lists = {name for name, module in root.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))}
        for name, module in root.named_modules():
            if name.rpartition(".")[0] in lists and not isinstance(module, (nn.ModuleList, nn.Sequential)):
                self._watch(name, module)

    def _watch(self, name: str, module: nn.Module) -> None:
        parameters = list(inspect.signature(module.forward).parameters)

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            block = Block(name)
            given = {**dict(zip(parameters, args, strict=False)), **kwargs}
            block.inputs = self._dims(given)
            self._open.append(block)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            block = self._open.pop()
            block.outputs = self._dims(_outputs(output))
            self._found.setdefault(name, block)

        self._handle.add(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        self._handle.add(module.register_forward_hook(leave).remove)

    def _dims(self, values: Mapping[str, Any]) -> dict[str, int]:
        """For each value whose tensors have exactly one dimension as long as the sequence, that dimension."""
        found = {}
        for key, value in values.items():
            tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
            dims = {tuple(dim for dim, size in enumerate(t.shape) if size == self._seq_len) for t in tensors}
            if len(dims) == 1 and len(only := dims.pop()) == 1:
                found[key] = only[0]
        return found

    def attends(self) -> None:
        """Notes an attention call, in the innermost element that runs."""
        if self._open:
            self._open[-1].attends = True

    def close(self) -> None:
        """Takes all hooks off."""
        self._handle.remove()

    def plan(self) -> dict[str, dict[str, Any]] | None:
        """A plan that splits at each list of blocks and joins after it; None without one."""
        split: dict[str, dict[str, int]] = {}
        join: dict[str, Any] = {}
        for block in self._found.values():
            parent = block.name.rpartition(".")[0]
            if not block.attends or not block.inputs or not block.outputs:
                continue
            split[f"{parent}.*"] = block.inputs
            # The last of them to be called.
            for former in [name for name in join if name.rpartition(".")[0] == parent]:
                del join[former]
            join[block.name] = block.outputs.get(ONLY_OUTPUT, block.outputs)
        return {"split": split, "join": join} if split else None


def _outputs(output: Any) -> Mapping[str, Any]:
    if isinstance(output, Tensor):
        return {ONLY_OUTPUT: output}
    if isinstance(output, Mapping):
        return {str(key): value for key, value in output.items() if isinstance(value, Tensor)}
    if isinstance(output, (tuple, list)):
        return {str(index): value for index, value in enumerate(output) if isinstance(value, Tensor)}
    return {}
