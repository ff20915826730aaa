"""Tries a module on a few tokens: whether each of them is computed by itself, and how many bytes it keeps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.memory.tiles import aliased, as_call
from lightning_ulysses.upstream.torch_graph import leaves_of

# Unequal tiles, one of them a single token. Experts with a capacity drop tokens of some of them.
_TILES = (1, 4, 7)
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


# Hooks that take what they see on tiles for what it is: those of ZeRO-3, and our own of the first step.
_OWN_HOOKS = ("deepspeed", "lightning_ulysses")


def is_watched(module: nn.Module) -> bool:
    """Whether the module has hooks of somebody who expects all of its tokens."""
    hooks: list[Any] = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(str(getattr(hook, "__module__", "")).partition(".")[0] not in _OWN_HOOKS for hook in hooks)


def check_ready(part: str, name: str, module: nn.Module) -> None:
    """Refuses a module whose submodules are watched, or whose parameters are not there.

    Raises:
        UlyssesError: With the name of the module.
    """
    for inner_name, inner in module.named_modules():
        if inner is not module and is_watched(inner):
            raise _refused(part, name, module, f"whose submodule {inner_name!r} has hooks, which would see tiles")
    if any(parameter.numel() == 0 for parameter in module.parameters()):
        raise UlyssesError(
            f"{part} for {name!r} ({type(module).__name__}), whose parameters are not all there while it runs",
            "a module that ZeRO-3 gathers as one",
            f"set memory in the strategy before the run, or call deepspeed.utils.set_z3_leaf_module for {name!r} "
            "before deepspeed.initialize",
        )


def try_rows(part: str, name: str, module: nn.Module, call: Callable[[Tensor], Any], x: Tensor) -> int:
    """Compares a few tokens that run together with the same tokens tile by tile.

    The tokens are the same on every rank, so that all ranks come to the same verdict.

    Args:
        part: The setting, for messages.
        name: Of the module.
        module: The module, whose parameters are there.
        call: Runs it on (1, ..., n, D).
        x: What it is called with; its shape, type and device matter.

    Returns:
        The bytes that one row keeps for the backward, parameters left out.

    Raises:
        UlyssesError: With the reason, if a row is not computed by itself.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(_TILES), x.shape[-1], generator=generator).to(x.device, x.dtype)
    parameters = [each for each in module.parameters() if each.requires_grad]
    own: list[Tensor] = []
    with _unchanged(module) as changes:
        try:
            # Parameters that are reached by another way than their module get no gradient of a tile.
            with aliased(module, parameters) as own:
                whole, kept = run_rows(module, call, as_call(rows, x.dim()))
            with torch.no_grad():
                parts = [call(as_call(tile, x.dim())) for tile in rows.split(_TILES)] if _fits(whole, x) else []
        except UlyssesError:
            raise
        except Exception as failure:
            raise _refused(part, name, module, f"which does not run on a few tokens by themselves: {failure}") from None
    reason = _reason(own, whole, parts, changes, x)
    if reason is not None:
        raise _refused(part, name, module, reason)
    return max(kept // len(rows), 1)


def run_rows(module: nn.Module, call: Callable[[Tensor], Any], rows: Tensor) -> tuple[Any, int]:
    """What ``call`` gives for a copy of rows, and the bytes that it keeps for the backward, parameters left out."""
    kept = _Kept(module)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(kept.pack, _same):
        return call(rows.clone().requires_grad_()), kept.bytes


def _same(value: Any) -> Any:
    return value


def _fits(whole: Any, x: Tensor) -> bool:
    return isinstance(whole, Tensor) and whole.shape[:-1] == (*[1] * (x.dim() - 2), sum(_TILES))


def _reason(own: list[Tensor], whole: Any, parts: list[Any], changes: list[str], x: Tensor) -> str | None:
    """Why the module cannot run on tiles, or None."""
    if not isinstance(whole, Tensor):
        return f"which returns a {type(whole).__name__} and not one tensor"
    if not _fits(whole, x):
        return f"which turns {sum(_TILES)} tokens of {x.dim()} dimensions into the shape {tuple(whole.shape)}"
    if changes:
        return f"which {changes[0]}"
    foreign = _foreign(own, whole)
    if foreign is not None:
        return f"which uses a parameter {tuple(foreign.shape)} that is not its own"
    together = torch.cat([tile.flatten(0, -2) for tile in parts]).double()
    wanted = whole.detach().flatten(0, -2).double()
    difference = float((together - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
    # NaN is no small difference either.
    if not difference <= _TOLERANCE.get(whole.dtype, 5e-2):
        return f"whose tokens depend on those that run with them: single tiles differ by {difference:.0e}"
    return None


def _foreign(parameters: list[Tensor], output: Tensor) -> Tensor | None:
    """A tensor that gets a gradient and is none of the parameters of the module."""
    own = {id(parameter) for parameter in parameters}
    strangers = [leaf for leaf in leaves_of(output) if id(leaf) not in own]
    # One stranger is the input.
    return next((each for each in strangers if isinstance(each, nn.Parameter) or len(strangers) > 1), None)


class _Kept:
    """Counts the bytes that a graph keeps, each storage once."""

    def __init__(self, module: nn.Module) -> None:
        self.bytes = 0
        self._seen = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
        self._held: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        # Another object: an output that its own graph holds is never freed, and the parameters with it.
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._held.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[list[str]]:
    """Restores random numbers, buffers and attributes, and lists which of them had changed."""
    changes: list[str] = []
    buffers = [(name, buffer, buffer.detach().clone()) for name, buffer in module.named_buffers()]
    attributes = [(name, each, dict(vars(each))) for name, each in module.named_modules()]
    states = _random_states()
    try:
        yield changes
    finally:
        for (device, before), (_, after) in zip(states, _random_states(), strict=True):
            if not torch.equal(before, after):
                changes.append("draws random numbers (dropout?)")
                torch.set_rng_state(before) if device is None else torch.cuda.set_rng_state(before, device)
        for name, buffer, value in buffers:
            if not torch.equal(buffer, value):
                changes.append(f"writes to its buffer {name!r}")
                with torch.no_grad():
                    buffer.copy_(value)
        for name, each, before_call in attributes:
            for key, value in list(vars(each).items()):
                if before_call.get(key, inspect.Parameter.empty) is not value and _is_of_tokens(value):
                    changes.append(f"keeps {f'{name}.{key}'.strip('.')!r} of the tokens it has seen")
                    if key in before_call:
                        vars(each)[key] = before_call[key]
                    else:
                        del vars(each)[key]


def _is_of_tokens(value: Any) -> bool:
    return isinstance(value, (Tensor, list, tuple, float))


def _random_states() -> list[tuple[int | None, Tensor]]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return [(None, torch.get_rng_state()), *((index, torch.cuda.get_rng_state(index)) for index in devices)]


def _refused(part: str, name: str, module: nn.Module, reason: str) -> UlyssesError:
    return UlyssesError(
        f"{part} for {name!r} ({type(module).__name__}), {reason}",
        "a submodule that computes each token by itself, without random numbers and side effects",
        f"give {part} the names of other submodules, or False",
    )
