"""The public function for losses that are written by hand."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ulysses.config import MemoryConfig
from lightning_ulysses.context import SequenceContext, current_context
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import ALONE
from lightning_ulysses.memory.head import Head, KnownLogits
from lightning_ulysses.memory.replaced import Replaced
from lightning_ulysses.memory.tiled_loss import defer
from lightning_ulysses.memory.trying import is_watched
from lightning_ulysses.patching.outside_graphs import eager

Reduction = Literal["mean", "sum", "none"]


def _layer(weight: Tensor) -> nn.Module:
    """A linear layer of somebody else's weight (V, D), which need not be a parameter."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer._parameters["weight"] = weight  # type: ignore[assignment]
    return layer


@eager
def tiled_cross_entropy(
    hidden: Tensor,
    head: nn.Module | Tensor,
    labels: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    tile_tokens: int | None = None,
    tile_bytes: int | None = None,
    kernel: Literal["torch", "liger"] = "torch",
) -> Tensor:
    """The cross entropy of ``head(hidden)``, of which a tile exists at a time.

    It is ``F.cross_entropy(softcap * tanh(scale * head(hidden) / softcap), labels)``, logits in float32. Rows without a
    target are not computed. The gradients of the head are summed in float32. In a step that is split, the strategy
    weighs the loss as any other.

    Args:
        hidden: (..., D), this rank's slice.
        head: Turns (..., D) into logits (..., V), each token by itself; or the weight (V, D) of a linear layer.
        labels: (...) int64, shifted already: the target of each hidden state.
        scale: Logits are multiplied by it.
        softcap: The bound of logits; none by default.
        weight: (V,), of classes.
        ignore_index: The label of rows without a target.
        label_smoothing: In [0, 1].
        reduction: "none" gives losses of the shape of ``labels``, whose backward computes the logits again.
        tile_tokens: Rows of a tile.
        tile_bytes: Bytes of a tile's logits in float32; 256 MiB by default.
        kernel: "liger" runs ``liger_fused_linear_cross_entropy`` of liger-kernel on a GPU, for linear heads.

    Returns:
        (), or (...) for ``reduction="none"``.

    Raises:
        UlyssesError: If shapes or settings do not fit, the head is not per token, or its weight is not there.

    Example:
        >>> loss = lightning_ulysses.tiled_cross_entropy(hidden, self.lm_head, batch["shift_labels"])
    """
    context = current_context() or SequenceContext(ALONE)
    _check(hidden, head, labels, scale, softcap)
    module = head if isinstance(head, nn.Module) else _layer(head)
    if kernel == "liger":
        _check_liger(hidden, module, scale, reduction)
    options: dict[str, Any] = {
        "weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction,
    }  # fmt: skip
    config = MemoryConfig(tile_tokens=tile_tokens, tile_bytes=tile_bytes)

    def loss(logits: Tensor) -> Tensor:
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        logits = logits * scale if scale != 1.0 else logits
        logits = softcap * torch.tanh(logits / softcap) if softcap is not None else logits
        # (..., V) -> (N, V) and (...) -> (N,)
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), **options)

    # A trial of the step sees all logits of its few tokens, as do hooks of the head and a sequence that is divided over
    # ranks. A head under `tiled_loss` defers its logits by itself.
    is_plain = type(hidden) in (Tensor, nn.Parameter) and hidden.numel() > 0 and not is_watched(module)
    if context.place.takes_calls or not is_plain or isinstance(vars(module).get("_call_impl"), Replaced):
        found = loss(module(hidden))
    else:
        own = Head(context, "head", module, config, defer, known=context.notes.of(_Known).of(module))
        with _installed(own):
            if kernel == "liger":
                found = own.run(_liger(module, labels, scale, softcap, options), hidden.reshape(-1, hidden.shape[-1]))
            else:
                found = loss(own.deferred(hidden))
    return found.view(labels.shape) if reduction == "none" else found


class _Known:
    """A note on a run: width and type of the logits of heads that were tried."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[nn.Module, KnownLogits] = WeakKeyDictionary()

    def of(self, module: nn.Module) -> KnownLogits:
        return self._of.setdefault(module, {})


@contextmanager
def _installed(head: Head) -> Iterator[None]:
    """Takes calls of the head over inside."""
    handle = head.install()
    try:
        yield
    finally:
        handle.remove()


def _liger(
    module: nn.Module, labels: Tensor, scale: float, softcap: float | None, options: dict[str, Any]
) -> Callable[[Tensor], Tensor]:
    """The loss of rows (N, D) by liger-kernel, inside of the head's call."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    weight: Any = module.weight
    bias: Any = getattr(module, "bias", None)
    others = {name: value for name, value in options.items() if name != "weight"}

    def loss(rows: Tensor) -> Tensor:
        rows = rows * scale if scale != 1.0 else rows
        found: Tensor = liger_fused_linear_cross_entropy(
            rows, weight, labels.reshape(-1), bias, ce_weight=options["weight"], softcap=softcap,
            accum_dtype=torch.float32, **others,
        )  # fmt: skip
        return found

    return loss


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _check(hidden: Tensor, head: nn.Module | Tensor, labels: Tensor, scale: float, softcap: float | None) -> None:
    if labels.shape != hidden.shape[:-1] or labels.is_floating_point():
        raise UlyssesError(
            f"hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)} of {labels.dtype} in tiled_cross_entropy",
            "one integer label for each hidden state",
            "shift both before, as hidden[:, :-1] and labels[:, 1:], or use the batch's shift_labels",
        )
    if isinstance(head, Tensor) and (head.dim() != 2 or head.shape[1] != hidden.shape[-1]):
        raise UlyssesError(
            f"a weight {tuple(head.shape)} as the head of hidden states {tuple(hidden.shape)}",
            f"(V, {hidden.shape[-1]})" + ("; ZeRO-3 has it on other ranks now" if head.numel() == 0 else ""),
            "give the module that owns it, such as self.lm_head, whose call gathers it"
            if head.numel() == 0
            else "give the weight of the linear layer that turns hidden states into logits, or the layer",
        )
    if not math.isfinite(scale) or (softcap is not None and not (math.isfinite(softcap) and softcap > 0)):
        raise UlyssesError(
            f"scale={scale}, softcap={softcap} in tiled_cross_entropy",
            "a finite scale, and a positive softcap or None",
            "drop softcap where logits have no bound",
        )


def _check_liger(hidden: Tensor, module: nn.Module, scale: float, reduction: str) -> None:
    if not _is_on_gpu(hidden) or importlib.util.find_spec("liger_kernel") is None:
        raise UlyssesError(
            f"kernel='liger' on {hidden.device}, liger-kernel "
            + ("not installed" if importlib.util.find_spec("liger_kernel") is None else "installed"),
            "liger-kernel on a GPU",
            "leave kernel out, which has the same result",
        )
    is_scaled = scale != 1.0 and getattr(module, "bias", None) is not None
    if type(module) is not nn.Linear or reduction == "none" or is_scaled:
        raise UlyssesError(
            f"kernel='liger' for a {type(module).__name__} with reduction={reduction!r}, scale={scale}",
            "a torch.nn.Linear or its weight, and reduction='mean' or 'sum'; no scale where it has a bias",
            "leave kernel out, which has the same result",
        )
