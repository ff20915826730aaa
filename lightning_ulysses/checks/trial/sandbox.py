"""Runs a step so that nothing of it stays: parameters, buffers, metrics, random numbers and logs are as before."""

from __future__ import annotations

import builtins
import functools
import io
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from lightning_ulysses.batch.random_streams import named_stream
from lightning_ulysses.checks.trial.attributes import attributes_kept, generators_kept
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.regions.recompute import replace_checkpoints

# As models of transformers begin.
_STD = 0.02
# The methods that Lightning compiles if the whole module is compiled.
_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


class StepEnds(Exception):
    """Raised where a step that optimises by hand calls backward.

    Args:
        loss: What it back-propagates.
    """

    def __init__(self, loss: Tensor) -> None:
        super().__init__("the step's backward")
        self.loss = loss


def _ends(loss: Tensor, *args: Any, **kwargs: Any) -> None:
    raise StepEnds(loss)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _directly(function: Any, *args: Any, **kwargs: Any) -> Any:
    for name in ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "context_fn", "early_stop"):
        kwargs.pop(name, None)
    return function(*args, **kwargs)


@contextmanager
def _methods_replaced(root: nn.Module, **methods: Any) -> Iterator[None]:
    """Gives ``root`` other methods; instance attributes, so that its class stays as it is."""
    before = {name: vars(root)[name] for name in methods if name in vars(root)}
    vars(root).update(methods)
    try:
        yield
    finally:
        for name in methods:
            vars(root).pop(name, None)
        vars(root).update(before)


def _teachers(root: nn.Module) -> list[Tensor]:
    """Parameters that no gradient changes, but a step may: those of momentum encoders and averaged models."""
    frozen: list[Tensor] = [parameter for parameter in root.parameters() if not parameter.requires_grad]
    trained = sum(parameter.numel() for parameter in root.parameters() if parameter.requires_grad)
    # Such a copy is no larger than what is trained. The base of an adapter is, and copying it could take all memory.
    return frozen if sum(parameter.numel() for parameter in frozen) <= trained else []


@contextmanager
def _tensors_kept(root: nn.Module) -> Iterator[None]:
    """Puts back what is written into tensors: buffers, the state of a metric, averaged parameters."""
    held = [tensor for module in root.modules() for tensor in vars(module).values() if isinstance(tensor, Tensor)]
    saved = [(tensor, tensor.detach().clone()) for tensor in (*root.buffers(), *held, *_teachers(root))]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in saved:
                # Not by its version, which a write through `.data` leaves as it is.
                if tensor.shape == value.shape and not torch.equal(tensor, value):
                    tensor.data.copy_(value)


def _is_zero(parameter: Tensor) -> bool:
    # Its first numbers tell of most parameters that they are not.
    return not parameter.flatten()[:16].any() and not parameter.any()


@contextmanager
def _zeros_filled(root: nn.Module, device: torch.device) -> Iterator[None]:
    """Gives trained parameters that are zero other values, alike on all ranks.

    A gate, a projection or a head that begins at zero hides what the branch before or behind it does with tokens.
    """
    # Not under ZeRO-3, which may fetch a parameter ahead inside, and hand its values to the step.
    trained = (each for each in root.parameters() if each.requires_grad and not hasattr(each, "ds_id"))
    zeros = [parameter.data for parameter in trained if _is_zero(parameter)]
    try:
        with named_stream("parameters of zero", device=device):
            for numbers in zeros:
                numbers.normal_(std=_STD)
        yield
    finally:
        for numbers in zeros:
            numbers.zero_()


@contextmanager
def _flags_kept(root: nn.Module) -> Iterator[None]:
    """Puts back what is trained: a step that ends at its backward does not toggle it back."""
    trained = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    modes = [(module, module.training) for module in root.modules()]
    try:
        yield
    finally:
        for parameter, is_trained in trained:
            parameter.requires_grad_(is_trained)
        for module, mode in modes:
            module.training = mode


@contextmanager
def _metrics_kept(root: nn.Module) -> Iterator[None]:
    """Puts back states of torchmetrics, which may be lists."""
    metrics: Any = sys.modules.get("torchmetrics")
    found = [module for module in root.modules() if isinstance(module, metrics.Metric)] if metrics is not None else []
    states = [(metric, metric._copy_state_dict()) for metric in found]
    try:
        yield
    finally:
        for metric, state in states:
            for name, value in state.items():
                setattr(metric, name, value)


@contextmanager
def _without_backward_hooks(root: nn.Module) -> Iterator[None]:
    """ZeRO-3 fills and reduces gradients in those of experts, and users may do as much in theirs."""
    saved = [(module, module._backward_hooks, module._backward_pre_hooks) for module in root.modules()]
    for module, *_ in saved:
        module._backward_hooks, module._backward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, hooks, pre_hooks in saved:
            module._backward_hooks, module._backward_pre_hooks = hooks, pre_hooks


def _readonly_files(handle: Handle) -> None:
    """Has a step fail that writes files, such as its predictions: nothing could take them back."""

    def guarded(original: Any) -> Any:
        @functools.wraps(original)
        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if isinstance(mode, str) and set(mode) & set("wax+"):
                raise OSError(f"a step that writes {file!r}")
            return original(file, mode, *args, **kwargs)

        return opened

    def save(*args: Any, **kwargs: Any) -> None:
        raise OSError("a step that calls torch.save")

    for owner in (builtins, io):
        handle.patch(owner, "open", guarded(owner.open))
    handle.patch(torch, "save", save)


def uncompile_steps(root: nn.Module) -> Handle:
    """Makes ``root`` itself run uncompiled: its call, and the methods that Lightning compiles one by one.

    Returns:
        A handle that restores the compiled ones.
    """
    handle = Handle()
    if root._compiled_call_impl is not None:
        handle.patch(root, "_compiled_call_impl", None)
    for name in _STEPS:
        # Lightning stores a compiled method as an attribute of the instance. Dynamo keeps the original in it.
        original = getattr(vars(root).get(name), "_torchdynamo_orig_callable", None)
        if original is not None:
            handle.patch(root, name, original)
    return handle


def computes_precisely(module: nn.Module) -> bool:
    """Whether the module computes in float32 or float64."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return False
    return all(p.dtype in (torch.float32, torch.float64) for p in module.parameters() if p.is_floating_point())


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Multiplies in float32: the rounding of TF32 is as large as what a trial looks for."""
    places: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    name: str = "allow_tf32"
    off: Any = False
    try:
        before = [getattr(place, name) for place in places]
    except RuntimeError:
        # Set by its newer name, after which torch refuses to read the older one.
        name, off = "fp32_precision", "ieee"
        before = [getattr(place, name) for place in places]
    for place in places:
        setattr(place, name, off)
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)


@contextmanager
def state_kept(root: nn.Module) -> Iterator[None]:
    """Inside, ``root`` may run its hooks: attributes, buffers and metrics are as before afterwards."""
    with attributes_kept(root), _metrics_kept(root), _tensors_kept(root), _flags_kept(root), generators_kept(root):
        yield


@contextmanager
def sandbox(root: nn.Module, device: torch.device) -> Iterator[dict[str, Any]]:
    """Inside, ``root`` may run a step.

    Args:
        root: The user's LightningModule.
        device: Where it is.

    Yields:
        What the step logs, by name.
    """
    logged: dict[str, Any] = {}

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        logged[name] = value

    def log_dict(values: Any, *args: Any, **kwargs: Any) -> None:
        logged.update(values)

    with ExitStack() as stack:
        stack.enter_context(_methods_replaced(root, manual_backward=_ends, log=log, log_dict=log_dict))
        stack.enter_context(_without_backward_hooks(root))
        stack.enter_context(_zeros_filled(root, device))
        quiet = Handle()
        stack.callback(quiet.remove)
        # They would run a part of the step twice.
        replace_checkpoints(root, quiet, lambda original: _directly)
        _readonly_files(quiet)
        stack.callback(uncompile_steps(root).remove)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_without_tf32())
        yield logged


@contextmanager
def aside(root: nn.Module) -> Iterator[None]:
    """Inside, ``root`` may run a step as it was written, of which nothing remains and nothing is logged."""
    with ExitStack() as stack:
        stack.enter_context(state_kept(root))
        stack.enter_context(_methods_replaced(root, manual_backward=_ends, log=_nothing, log_dict=_nothing))
        stack.callback(uncompile_steps(root).remove)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def repeatable(device: torch.device) -> Any:
    """Random numbers that are the same in every run, and leave the process's own streams alone."""
    return named_stream("trial of the step", device=device)
