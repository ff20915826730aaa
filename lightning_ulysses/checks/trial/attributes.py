"""Restores the attributes of modules that a forward changes: losses collected in a list, counters, cached sizes."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# Attributes of every nn.Module, such as its hooks and submodules.
_INTERNAL = frozenset(vars(nn.Module()))


# transformers registers hooks in the first forward, and an attribute that says so.
_HELD = (
    *("_modules", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs"),
    *("_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"),
)
# A step does not rewrite more than that, but a module may hold a whole dataset.
_LARGEST, _DEEPEST = 10_000, 4
# Not other subclasses: those of DeepSpeed gather parameters when they are read.
_KINDS = (list, deque, dict, set, OrderedDict, defaultdict, Counter)
# Objects of these belong to all steps: the trainer, its loggers, configurations, tokenizers.
_SHARED = frozenset({"torch", "torchmetrics", "lightning", "pytorch_lightning", "deepspeed", "transformers"})


def _is_own(value: Any) -> bool:
    """Whether ``value`` is an object of the user's, such as a running mean."""
    if not hasattr(value, "__dict__") or isinstance(value, (type, ModuleType, FunctionType, nn.Module, Tensor)):
        return False
    return type(value).__module__.partition(".")[0] not in _SHARED


def _contents(values: Iterable[Any], seen: dict[int, Any], depth: int = 0) -> None:
    """Collects containers among ``values`` and inside of them, attributes of objects too, by their id."""
    for value in values:
        if type(value) not in _KINDS and _is_own(value):
            value = vars(value)
        if type(value) in _KINDS and id(value) not in seen and len(value) <= _LARGEST:
            seen[id(value)] = value
            if depth < _DEEPEST:
                _contents(value.values() if isinstance(value, dict) else value, seen, depth + 1)


def _items(value: Any) -> list[Any]:
    return [each for pair in value.items() for each in pair] if isinstance(value, dict) else list(value)


def _is_changed(value: Any, content: Any) -> bool:
    now, before = _items(value), _items(content)
    # By identity: tensors have no single answer to ==.
    return len(now) != len(before) or any(one is not other for one, other in zip(now, before, strict=True))


def _refill(value: Any, content: Any) -> None:
    # In place, since other objects may hold the same list or dict.
    value.clear()
    if isinstance(value, (list, deque)):
        value.extend(content)
    elif isinstance(value, OrderedDict):
        OrderedDict.update(value, content)
    else:
        dict.update(value, content) if isinstance(value, dict) else value.update(content)


@contextmanager
def attributes_kept(root: nn.Module) -> Iterator[None]:
    """Restores the attributes of ``root`` and its submodules, and what their containers and the user's objects hold."""
    before = [
        (
            module,
            {name: value for name, value in vars(module).items() if name not in _INTERNAL},
            [(held, dict(held)) for held in (getattr(module, name) for name in _HELD)],
        )
        for module in root.modules()
    ]
    found: dict[int, Any] = {}
    _contents((value for _, saved, _ in before for value in saved.values()), found)
    contents = [(value, value.copy()) for value in found.values()]
    try:
        yield
    finally:
        for module, saved, held in before:
            # Not setattr: it would register parameters and submodules again.
            now = vars(module)
            for name in [name for name in now if name not in saved and name not in _INTERNAL]:
                del now[name]
            now.update(saved)
            # Submodules and buffers that the forward replaced, and hooks that it registered.
            for now_held, content in held:
                if _is_changed(now_held, content):
                    _refill(now_held, content)
        for value, content in contents:
            if _is_changed(value, content):
                _refill(value, content)


@contextmanager
def generators_kept(root: nn.Module) -> Iterator[None]:
    """Puts back the states of generators that modules hold."""
    values = (value for module in root.modules() for value in vars(module).values())
    states = [(value, value.get_state()) for value in values if isinstance(value, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
