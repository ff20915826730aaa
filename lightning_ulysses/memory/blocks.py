"""Finds the repeated blocks of a model, which are what activation checkpointing keeps the inputs of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.memory.finding import WRAPPERS, Found, find_named, plain, plain_names

_ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)
_LISTS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class _Stack:
    """The elements of a list that are alike."""

    name: str
    elements: Found


def find_blocks(root: nn.Module, names: Sequence[str] | None) -> Found:
    """The blocks of ``root``, none of them inside of another one.

    Without names these are the elements of lists and sequences of modules of which at least two are of one class and
    have submodules. Lists whose elements attend are preferred. Of lists in such elements, the inner one is taken if its
    elements attend, as those of stages do and experts do not.

    Args:
        root: The user's LightningModule.
        names: Patterns of names.

    Raises:
        UlyssesError: If there are none.
    """
    if names is not None:
        return find_named(root, "checkpoint_blocks", names)
    stacks = [stack for stack in _stacks(root) if _attends(stack)] or [*_stacks(root)]
    inner = [stack for stack in stacks if not any(_is_below(other, stack) and _attends(other) for other in stacks)]
    outer = [stack for stack in inner if not any(_is_below(stack, other) for other in inner)]
    found = {name: module for stack in outer for name, module in stack.elements.items()}
    if not found:
        raise UlyssesError(
            f"checkpoint='block', and no repeated blocks in {type(root).__name__}",
            "a torch.nn.ModuleList or torch.nn.Sequential with at least two modules of one class, or of one base, "
            "that have submodules",
            "name the modules to checkpoint, as checkpoint_blocks=['encoder.layer.*']; * stands for one part between "
            "dots",
        )
    return found


def _stacks(root: nn.Module) -> Iterator[_Stack]:
    names = plain_names(root)
    for name, module in names.items():
        if isinstance(module, (*_LISTS, nn.Sequential)) and not isinstance(names.get(name.rpartition(".")[0]), _LISTS):
            elements = dict(_elements(name, module))
            counts = Counter(map(_kind, elements.values()))
            alike = {key: each for key, each in elements.items() if counts[_kind(each)] > 1 and _is_composed(each)}
            if alike:
                yield _Stack(name, alike)


def _elements(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for key, each in module.named_children():
        # Nobody calls a list in a list; its elements are called.
        if isinstance(each, _LISTS):
            yield from _elements(f"{name}.{key}", each)
        else:
            yield f"{name}.{key}", each


def _inside(module: nn.Module) -> nn.Module:
    """The module that was wrapped for compiling or checkpointing."""
    inner = next((getattr(module, name) for name in sorted(WRAPPERS) if hasattr(module, name)), module)
    return inner if isinstance(inner, nn.Module) else module


def _kind(module: nn.Module) -> type:
    # Layers of a hybrid are of several classes that share a base.
    lineage = type(_inside(module)).__mro__
    return lineage[lineage.index(nn.Module) - 1]


def _is_composed(module: nn.Module) -> bool:
    return any(True for _ in _inside(module).children()) and any(True for _ in module.parameters())


def _is_below(stack: _Stack, other: _Stack) -> bool:
    return any(stack.name.startswith(f"{name}.") or stack.name == name for name in other.elements)


def _attends(stack: _Stack) -> bool:
    """Whether each element has a submodule that is called attention."""
    return all(
        any(
            _ATTENTION.search(name.rpartition(".")[2]) or _ATTENTION.search(type(inner).__name__)
            for name, inner in element.named_modules()
            if name
        )
        for element in stack.elements.values()
    )


def refuse_checkpointed(root: nn.Module, blocks: Found) -> None:
    """Refuses blocks that the user checkpoints already.

    Raises:
        UlyssesError: With the name of the module that says so.
    """
    for name, module in root.named_modules():
        related = [each for each in blocks if _is_related(plain(name), each)]
        is_on = getattr(module, "gradient_checkpointing", False) is True
        if related and (is_on or type(module).__name__ == "CheckpointWrapper"):
            how = "gradient_checkpointing is on" if is_on else "which is a CheckpointWrapper"
            raise already(related[0], f"by {name!r} ({type(module).__name__}), {how}")


def _is_related(name: str, block: str) -> bool:
    return name == block or not name or block.startswith(f"{name}.") or name.startswith(f"{block}.")


def already(block: str, by: str) -> UlyssesError:
    """The error for a block that is checkpointed twice."""
    return UlyssesError(
        f"checkpoint in memory for the block {block!r}, which is checkpointed already {by}",
        "one of them: with both, the block would run three times in a step",
        "remove the checkpointing of the model (model.gradient_checkpointing_disable() in transformers), or "
        "checkpoint=... from memory",
    )
