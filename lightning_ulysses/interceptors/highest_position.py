"""Rotary embeddings whose frequencies depend on the highest position: that of the whole sequence, and not of a slice.

Such a module gets one position more, the highest of the group, and loses what it returns for it. Which modules are of
this kind is tried: a position that lies far ahead changes what they return for others.

Source: transformers ``modeling_rope_utils.dynamic_rope_update`` (``rope_type`` longrope and dynamic).
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_ulysses.context import SequenceContext
from lightning_ulysses.patching.handle import Handle

_NAMES = ("position_ids", "positions")
# Tokens of a try, and a position beyond every length that a model was made for.
_TOKENS, _FAR = 5, 2**24


def _name_of_positions(module: nn.Module) -> str | None:
    """The parameter of ``forward`` that takes positions, of a module without weights."""
    if next(module.parameters(), None) is not None:
        return None
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in _NAMES if name in parameters), None)


def _arguments(module: nn.Module, name: str) -> list[dict[str, Any]]:
    """Arguments to try a module with, apart from positions: one mapping for each kind of layer that it serves."""
    parameters = inspect.signature(module.forward).parameters.values()
    device = next((buffer.device for buffer in module.buffers()), torch.device("cpu"))
    states = torch.zeros(1, _TOKENS, 8, device=device)
    fixed = {p.name: states for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    fixed[name] = torch.arange(_TOKENS, device=device).unsqueeze(0)
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, Mapping) and "layer_type" in {p.name for p in parameters}:
        return [{**fixed, "layer_type": kind} for kind in kinds]
    return [fixed]


def _dims(module: nn.Module, name: str, given: dict[str, Any]) -> list[int | None] | None:
    """For each tensor that ``module`` returns the dimension of positions, if the highest of them counts; else None."""
    far = torch.nn.functional.pad(given[name], (0, 1), value=_FAR)
    with torch.no_grad():
        # Copies, since such modules keep what they have computed.
        near, ahead = (
            tree_flatten(copy.deepcopy(module)(**{**given, name: positions}))[0] for positions in (given[name], far)
        )
    dims = [
        next((dim for dim in range(a.dim()) if (a.shape[dim], b.shape[dim]) == (_TOKENS, _TOKENS + 1)), None)
        for a, b in zip(near, ahead, strict=True)
    ]
    pairs = zip(near, ahead, dims, strict=True)
    same = all(torch.equal(a, b if dim is None else b.narrow(dim, 0, _TOKENS)) for a, b, dim in pairs)
    return None if same else dims


def _tried(module: nn.Module, name: str) -> list[int | None] | None:
    try:
        found = [_dims(module, name, given) for given in _arguments(module, name)]
    except Exception:
        # A module that needs other arguments. If it fails on slices, the trial of the step shows it.
        return None
    return next((dims for dims in found if dims is not None), None)


def _highest(context: SequenceContext, positions: Tensor) -> Tensor:
    """() the highest position of the group, apart from those of padding that this package added; a collective."""
    assert context.split is not None
    layout, rank = context.split.layout, context.mesh.sp_rank
    real = min(layout.shares[rank], max(0, layout.real_len - layout.starts[rank]))
    top = positions[..., :real].max() if real else positions.new_zeros(())
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=context.mesh.sp_group)
    return top


def _replace(context: SequenceContext, module: nn.Module, name: str, dims: list[int | None]) -> Callable[..., Any]:
    original = module.forward
    signature = inspect.signature(original)
    # Of the last run of a trial on all of its tokens, which comes before the one on a slice of them.
    tried: list[Tensor] = []

    @context.takes_over(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        positions, is_trial = bound.arguments.get(name), context.place.trial is not None
        if not isinstance(positions, Tensor) or context.split is None or positions.shape[-1] != context.share:
            if is_trial and isinstance(positions, Tensor):
                tried[:] = [positions.max()]
            return original(*args, **kwargs)
        # Ranks may fail apart in a trial, so nothing is exchanged there.
        top = (tried or [positions.max()])[0] if is_trial else _highest(context, positions)
        # (..., S_r) -> (..., S_r + 1)
        last = top.to(positions.dtype).expand(*positions.shape[:-1], 1)
        bound.arguments[name] = torch.cat([positions.minimum(top), last], dim=-1)
        leaves, spec = tree_flatten(original(*bound.args, **bound.kwargs))
        pairs = zip(leaves, dims, strict=True)
        # (..., S_r + 1, ...) -> (..., S_r, ...)
        return tree_unflatten([t if dim is None else t.narrow(dim, 0, context.share) for t, dim in pairs], spec)

    return forward


def install(context: SequenceContext, root: nn.Module) -> Handle:
    """Replaces ``forward`` of every module below ``root`` that depends on the highest position, if P > 1.

    Args:
        context: Tells what is split at this moment.
        root: The user's LightningModule.
    """
    handle = Handle()
    for module in root.modules() if context.mesh.sp_size > 1 else ():
        name = _name_of_positions(module)
        dims = _tried(module, name) if name is not None else None
        if name is not None and dims is not None:
            own = vars(module).get("forward")
            vars(module)["forward"] = _replace(context, module, name, dims)
            handle.add(functools.partial(_put_back, module, own))
    return handle


def _put_back(module: nn.Module, own: Any) -> None:
    del vars(module)["forward"]
    if own is not None:
        vars(module)["forward"] = own
