"""A head: the module that turns hidden states into logits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ulysses.config import MemoryConfig
from lightning_ulysses.context import SequenceContext
from lightning_ulysses.memory.replaced import Replaced
from lightning_ulysses.memory.trying import check_ready, is_watched, try_rows
from lightning_ulysses.notes import is_plain
from lightning_ulysses.patching.handle import Handle

Step = Callable[[Tensor], Tensor]
#: Width and type of logits, by whether the module trains, the type of hidden states, and mixed precision.
KnownLogits = dict[Any, tuple[int, torch.dtype]]


def _has_rows(hidden: Any) -> bool:
    return hidden.dim() > 1 and hidden.numel() > 0 and hidden.is_floating_point()


class Head:
    """Defers the logits of one module.

    Args:
        context: Tells whether the step is being tried; then logits are computed at once.
        name: Of the module.
        module: The module.
        config: Sizes of tiles.
        defer: Makes the logits that stand for those of hidden states (..., D), of a width and a type.
        forget: Called after the module was tried, for whoever keeps count of the module calls of a step.
        known: Of the logits, where it was tried before.
    """

    def __init__(
        self,
        context: SequenceContext,
        name: str,
        module: nn.Module,
        config: MemoryConfig,
        defer: Callable[[Head, Tensor, int, torch.dtype], Any],
        forget: Callable[[], None] | None = None,
        known: KnownLogits | None = None,
    ) -> None:
        self.name = name
        self.config = config
        #: Functions that needed all logits, in the order in which they came.
        self.needed_by: list[str] = []
        self._context = context
        self._module = module
        self._defer = defer
        self._forget = forget
        self._call: Callable[..., Any] = module._call_impl
        self._plain: Callable[..., Any] = module.forward
        self._work: Callable[[Tensor], Any] | None = None
        self._logits: KnownLogits = {} if known is None else known

    def install(self) -> Handle:
        """Has calls of the module return deferred logits, before any hook of the module runs."""
        handle = Handle()
        forward = Replaced(self._module, "forward", self._forward)
        call = Replaced(self._module, "_call_impl", torch.compiler.disable(self._called))
        self._plain, self._call = forward.original, call.original
        forward.put(handle)
        call.put(handle)
        return handle

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self._module

    def parameters(self) -> list[Tensor]:
        """Those that get gradients, also of adapters."""
        return [parameter for parameter in self._module.parameters() if parameter.requires_grad]

    def run(self, work: Callable[[Tensor], Any], rows: Tensor) -> Any:
        """What ``work(rows)`` returns inside the module's call, around which ZeRO-3 gathers its parameters."""
        self._work = work
        try:
            return self._call(rows)
        finally:
            self._work = None

    def logits(self, rows: Tensor) -> Tensor:
        """The logits of a tile, inside of `run`."""
        logits: Tensor = self._plain(rows)
        return logits

    def whole(self, hidden: Tensor) -> Tensor:
        """All logits."""
        logits: Tensor = self._call(hidden)
        return logits

    def note(self, function: str) -> None:
        """Takes note of a function that needs all logits, and says so once."""
        if function in self.needed_by:
            return
        self.needed_by.append(function)
        if self._context.mesh.rank == 0:
            warnings.warn(
                f"tiled_loss: {function} needs all logits of {self.name!r}, which are computed at once for it; the "
                "result is the same, and the memory is not saved",
                stacklevel=2,
            )

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._context.place.takes_calls:
            # A hook tries the module itself before the work begins.
            return self._plain(*args, **kwargs)
        work, self._work = self._work, None
        return self._plain(*args, **kwargs) if work is None else work(*args)

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if len(args) == 1 and not kwargs else None
        place = self._context.place
        has_rows = is_plain(hidden) and not isinstance(hidden, nn.Parameter) and _has_rows(hidden)
        # Without gradients in training, a reentrant checkpoint runs the forward, whose outputs must be real.
        is_graph = torch.is_grad_enabled() or not self._module.training
        if not has_rows or not is_graph or place.takes_calls or place.batch is None:
            return self._call(*args, **kwargs)
        assert isinstance(hidden, Tensor)
        if is_watched(self._module):
            self.note("a hook of the module")
            return self._call(hidden)
        return self.deferred(hidden)

    def deferred(self, hidden: Tensor) -> Any:
        """Stands for the logits of hidden states (..., D)."""
        return self._defer(self, hidden, *self._known(hidden))

    def _known(self, hidden: Tensor) -> tuple[int, torch.dtype]:
        """Width and type of the logits of ``hidden``; tried on a few tokens at first, unless it is a linear layer."""
        weight: Any = getattr(self._module, "weight", None)
        if getattr(self._plain, "__func__", None) is nn.Linear.forward and type(self._module) is nn.Linear:
            with torch.no_grad():
                # ZeRO-3 may have the weight elsewhere.
                logits = F.linear(hidden.new_empty(1, 1), weight.new_empty(1, 1))
            return self._module.out_features, logits.dtype
        kind = hidden.device.type
        cast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        key = (self._module.training, hidden.dtype, *cast)
        if key not in self._logits:
            found: list[tuple[int, torch.dtype]] = []

            def attempt(x: Tensor) -> Tensor:
                check_ready("tiled_loss", self.name, self._module)
                with self._context.plain():
                    try_rows("tiled_loss", self.name, self._module, self._plain, x)
                with torch.no_grad():
                    logits = self._plain(x.detach()[..., :1, :])
                found.append((logits.shape[-1], logits.dtype))
                # ZeRO-3 expects a tensor.
                return x.new_zeros(1)

            self.run(attempt, hidden)
            if self._forget is not None:
                self._forget()
            self._logits[key] = found[0]
        return self._logits[key]
