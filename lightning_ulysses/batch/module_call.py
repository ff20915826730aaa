"""The inputs of one call of a module, read as a batch: where a loop is the user's own, that is its step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class ModuleCall:
    """A call that can be repeated with other tensors of the same kind.

    Args:
        module: Its ``forward`` may be replaced for this call, as Fabric does for methods that are marked as forward.
        args: Of the call.
        kwargs: The same.
        by_name: Whether a single tensor goes by the name of its parameter as well.

    Attributes:
        batch: The inputs. One that is a mapping or a sequence is the batch by itself, as in
            ``training_step(batch, batch_idx)``. One or two tensors without names are a tensor and a pair. All others
            go by the names of their parameters.
    """

    def __init__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], by_name: bool = False
    ) -> None:
        self._module = module
        self._forward = vars(module).get("forward")
        is_batch = bool(args) and isinstance(args[0], (Mapping, list, tuple))
        are_tensors = 1 <= len(args) <= 2 and not kwargs and all(isinstance(arg, Tensor) for arg in args)
        self._put: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]
        self.batch: Any
        if is_batch:
            self.batch, self._put = args[0], lambda batch: ((batch, *args[1:]), dict(kwargs))
        elif are_tensors and not by_name:
            self.batch = args[0] if len(args) == 1 else args
            self._put = lambda batch: ((batch,) if isinstance(batch, Tensor) else tuple(batch), {})
        else:
            names = _names(module, len(args))
            self.batch, self._put = {**dict(zip(names, args, strict=True)), **kwargs}, _by_position(names)

    def run(self, function: Callable[..., Any], batch: Any) -> Any:
        """Calls ``function`` with the inputs in ``batch``."""
        if self._forward is not None:
            # Fabric's takes itself off in the call.
            vars(self._module)["forward"] = self._forward
        args, kwargs = self._put(batch)
        return function(*args, **kwargs)


def _names(module: nn.Module, count: int) -> list[str]:
    """The parameters that so many positions fill; their numbers where they have no names."""
    parameters = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [names[place] if place < len(names) else str(place) for place in range(count)]


def _by_position(names: list[str]) -> Callable[[Mapping[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    def put(batch: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(batch[name] for name in names), {key: value for key, value in batch.items() if key not in names}

    return put


def stand_in_loss(output: Any) -> Tensor | None:
    """A number that depends on all that a module returns, for a loop whose loss is not known yet.

    Args:
        output: Nested values.

    Returns:
        () float; None if no gradient reaches any of them.
    """
    # Its derivative differs from token to token, and is not zero where the output is.
    parts = [
        (leaf + leaf.square()).float().mean()
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad and leaf.numel()
    ]
    return torch.stack(parts).sum() if parts else None
