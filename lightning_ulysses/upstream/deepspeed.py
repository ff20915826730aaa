"""The private parts of DeepSpeed that this package leans on, pinned by a test."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_ulysses.patching.handle import Handle

# What DeepSpeed's activation checkpointing calls with its inputs, to empty them.
_EMPTYING = (
    "get_cpu_activations_for_backward",
    "get_offloaded_activations_for_backward",
    "get_partitioned_activations_for_backward",
)


@contextmanager
def without_shared_memory_op() -> Iterator[None]:
    """Keeps DeepSpeed from compiling its shared-memory collectives for CPU when it sets up communication.

    They need a C++ compiler on every machine and half a minute, and nothing in training uses them
    (DeepSpeed ``comm/torch.py``, ``build_shm_op``).
    """
    from deepspeed.ops import __compatible_ops__ as compatible

    before = compatible.get("deepspeed_shm_comm")
    compatible["deepspeed_shm_comm"] = False
    try:
        yield
    finally:
        if before is None:
            compatible.pop("deepspeed_shm_comm", None)
        else:
            compatible["deepspeed_shm_comm"] = before


def use_accelerator(device_type: str) -> None:
    """Points DeepSpeed at the CPU when Lightning trains on it although the machine has GPUs."""
    from deepspeed.accelerator import get_accelerator, set_accelerator

    if device_type == "cpu" and get_accelerator().device_name() != "cpu":
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())


def allow_weights_only_load(engine: Any) -> None:
    """Lets a ZeRO-3 engine without an optimizer load a checkpoint (DeepSpeed issue 7272)."""
    if engine.optimizer is not None and not hasattr(engine.optimizer, "_restore_from_bit16_weights"):
        engine.optimizer._restore_from_bit16_weights = lambda: None


def forget_trace(engine: Any) -> None:
    """Has ZeRO-3 record anew in which order modules run, after a forward that no training step has.

    Else it goes by an order that mixes both (DeepSpeed ``zero/partitioned_param_coordinator.py``).
    """
    # Without an optimizer, the offload object itself takes its place.
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    coordinator = offload.get_param_coordinator() if hasattr(offload, "get_param_coordinator") else None
    if coordinator is None:
        return
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    coordinator._clear_trace_structures()


def keep_checkpoint_inputs() -> Handle:
    """Has DeepSpeed's activation checkpointing move copies of its inputs away, and leave the caller's as they are.

    With ``cpu_checkpointing`` or ``partition_activations`` it empties the tensors that it was given: a residual
    connection around the call, or a second layer that gets the same tensor, computes on what is left of them
    (``activation_checkpointing/checkpointing.py``, ``get_cpu_activations_for_backward`` and others).
    """
    from deepspeed.runtime.activation_checkpointing import checkpointing

    def own(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def save(args: Any, *rest: Any) -> Any:
            # The same storage, so that it is freed where nobody else holds it; one for each, as DeepSpeed counts them.
            aliases = {id(arg): arg.detach().requires_grad_(arg.requires_grad) for arg in args if _is_float(arg)}
            return original(tuple(aliases.get(id(arg), arg) for arg in args), *rest)

        return save

    handle = Handle()
    for name in _EMPTYING:
        handle.patch(checkpointing, name, own(getattr(checkpointing, name)))
    return handle


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def restore_linear() -> None:
    """Takes back the ``torch.nn.functional.linear`` that ZeRO-3 sets and leaves behind.

    DeepSpeed says that it persists unless reset (``zero/partition_parameters.py``). Processes of which only some have
    it reduce gradients in different orders.
    """
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patcher

    original = getattr(Patcher, "linear_bk", None)
    if original is not None:
        torch.nn.functional.linear = original


def release_engines() -> None:
    """Lets go of the engines of this process, which hold their process groups and with them threads that poll.

    Their hooks on autograd's nodes form cycles that Python's collector does not see; without them it does.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    found = [thing for thing in gc.get_objects() if type(thing) is DeepSpeedEngine]
    # Some are still held elsewhere, and met again.
    for engine in (engine for engine in found if not hasattr(engine, "_released")):
        engine._released = True
        engine.destroy()


def forget_world() -> None:
    """Lets a process that leaves one world join another.

    DeepSpeed caches the groups of the first and numbers modules and parameters on from the last engine's, which ZeRO-3
    compares over ranks.
    """
    import deepspeed.comm.comm as comm
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    comm.cdb = None
    for name, value in vars(groups).items():
        if name.startswith("_") and name.isupper() and not isinstance(value, str):
            setattr(groups, name, {} if isinstance(value, dict) else None)
    Init.param_id = 0
    counter: Any = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    counter[0][0] = 0
