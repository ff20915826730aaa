"""A call of a module, cut down to a few tokens for the trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ulysses.notes import StorageTable

# Inputs that are not the content of a token. The trial does not change them.
_NOT_CONTENT = {
    "labels",
    "shift_labels",
    "attention_mask",
    "loss_mask",
    "shift_loss_mask",
    "token_type_ids",
    "cu_seqlens",
}
# Candidates for the number of tokens in a trial: primes, which are rarely sizes of a model.
_LENGTHS = (13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 11, 7, 5)


def rebuild(value: Any, change: Callable[[str, Tensor], Tensor], name: str = "") -> Any:
    """``value`` with every tensor in its nested tuples, lists and dicts replaced by ``change(name, tensor)``."""
    if isinstance(value, Tensor):
        return change(name, value)
    if isinstance(value, Mapping):
        items = {key: rebuild(part, change, str(key)) for key, part in value.items()}
        return items if type(value) is dict else type(value)(items)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(rebuild(part, change, name) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(rebuild(part, change, name) for part in value)
    return value


def has_dim(value: Any, sizes: set[int]) -> bool:
    """Whether some tensor in nested tuples, lists and dicts has a dimension whose size is in ``sizes``."""
    found: list[bool] = []

    def look(name: str, tensor: Tensor) -> Tensor:
        found.append(not sizes.isdisjoint(tensor.shape))
        return tensor

    rebuild(value, look)
    return any(found)


def choose_length(module: nn.Module, share: int, sp_size: int, rows: int, others: set[int]) -> int | None:
    """The number of tokens for a trial: a small number that differs from all sizes of the model and the batch.

    The sequence dimension is recognized by this length. None if no candidate fits.
    """
    # Under ZeRO-3 a parameter is empty between its uses; `ds_shape` is its full shape.
    sizes = {size for parameter in module.parameters() for size in getattr(parameter, "ds_shape", parameter.shape)}
    sizes |= {rows, *others, *(getattr(sub, "num_heads", 0) for sub in module.modules() if isinstance(sub, nn.Module))}
    # n * rows as well: tokens and rows may share one dimension, (B * S_r, ...).
    fitting = (n for n in _LENGTHS if sp_size <= n <= share and n not in sizes and n * rows not in sizes)
    return next(fitting, None)


@dataclass(frozen=True)
class Call:
    """A call of ``module`` with tensors of ``share`` tokens.

    Args:
        module: The module that is called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        share: S_r.
        outside: Tensors that carry no sequence, although a dimension may be ``share`` long.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    share: int
    outside: StorageTable[Any] = field(default_factory=StorageTable)

    def _dim(self, tensor: Tensor) -> int | None:
        if tensor in self.outside:
            return None
        dims = [dim for dim, size in enumerate(tensor.shape) if size == self.share]
        # Several dimensions have this length: the usual one is 1, as in (B, S_r, ...).
        return (1 if 1 in dims else dims[0]) if dims else None

    @property
    def rows(self) -> int:
        """B, from arguments (B, S_r, ...); 1 if there is none."""
        found: list[int] = []

        def look(name: str, tensor: Tensor) -> Tensor:
            if self._dim(tensor) == 1:
                found.append(tensor.shape[0])
            return tensor

        rebuild((self.args, self.kwargs), look)
        return max(found, default=1)

    @property
    def other_sizes(self) -> set[int]:
        """The sizes of all dimensions that do not carry the sequence."""
        found: set[int] = set()

        def look(name: str, tensor: Tensor) -> Tensor:
            found.update(size for dim, size in enumerate(tensor.shape) if dim != self._dim(tensor))
            return tensor

        rebuild((self.args, self.kwargs), look)
        return found

    @property
    def has_tokens(self) -> bool:
        """Whether an argument carries the sequence."""
        return has_dim((self.args, self.kwargs), {self.share})

    def counts_from_zero(self, of_batch: StorageTable[Any]) -> bool:
        """Whether some argument is 0, 1, 2, ... S_r - 1 and not from the batch: positions that restart on each rank."""
        found: list[bool] = []

        def look(name: str, tensor: Tensor) -> Tensor:
            dim = self._dim(tensor)
            if dim is not None and not tensor.is_floating_point() and tensor.dtype != torch.bool:
                # The batch's own tensors may count like this, such as position_ids that restart with each document.
                counted = torch.arange(self.share, device=tensor.device)
                # (..., S_r, ...) -> (..., S_r)
                found.append(tensor not in of_batch and bool((tensor.movedim(dim, -1) == counted).all()))
            return tensor

        rebuild((self.args, self.kwargs), look)
        return any(found)

    def cut(self, span: slice) -> Call:
        """The same call with only the tokens ``span``."""

        def narrow(name: str, tensor: Tensor) -> Tensor:
            dim = self._dim(tensor)
            return tensor if dim is None else tensor.narrow(dim, span.start, span.stop - span.start).clone()

        args, kwargs = rebuild((self.args, self.kwargs), narrow)
        return Call(self.module, args, kwargs, span.stop - span.start, self.outside)

    def with_token(self, changed: int) -> Call | None:
        """The same call with token ``changed`` replaced by a different one; None if all tokens are equal."""
        moved: list[bool] = []

        def replace(name: str, tensor: Tensor) -> Tensor:
            dim = self._dim(tensor)
            if dim is None or name in _NOT_CONTENT or tensor.dtype == torch.bool:
                return tensor
            # Another token of the call, and not a random value: it is valid for every embedding.
            # (..., S_r, ...) -> (S_r, ...)
            by_token = tensor.clone().movedim(dim, 0)
            old = by_token[changed].clone()
            other = next((t for t in range(self.share) if not torch.equal(by_token[t], old)), None)
            if other is None:
                return tensor
            by_token[changed] = by_token[other].clone()
            moved.append(True)
            # (S_r, ...) -> (..., S_r, ...)
            return by_token.movedim(0, dim)

        args, kwargs = rebuild((self.args, self.kwargs), replace)
        return Call(self.module, args, kwargs, self.share, self.outside) if moved else None

    def run(self) -> Any:
        """Runs the call."""
        return self.module(*self.args, **self.kwargs)
