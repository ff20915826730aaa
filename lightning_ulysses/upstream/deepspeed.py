"""The private parts of DeepSpeed that this package uses, pinned by a test."""

from __future__ import annotations

import functools
import gc
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.patching.handle import Handle

# What the first engine of a process imports: Muon is compiled when it is imported, which loads torch's compiler.
LATE_IMPORTS = ("deepspeed.runtime.zero.muon.muon_optimizer",)

# Functions of DeepSpeed's activation checkpointing that empty the tensors they are given.
_EMPTYING = (
    "get_cpu_activations_for_backward",
    "get_offloaded_activations_for_backward",
    "get_partitioned_activations_for_backward",
)


@contextmanager
def without_shared_memory_op() -> Iterator[None]:
    """Keeps DeepSpeed from compiling its shared-memory collectives for CPU when it sets up communication.

    Compiling takes half a minute and needs a C++ compiler on every machine. Nothing in training uses these collectives
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
    """Makes DeepSpeed use the CPU if Lightning trains on it although the machine has GPUs."""
    from deepspeed.accelerator import get_accelerator, set_accelerator

    if device_type == "cpu" and get_accelerator().device_name() != "cpu":
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())


def check_engine(model: Any, path: object) -> None:
    """Refuses to load a checkpoint before the strategy has set up its engine.

    Raises:
        UlyssesError: If ``model`` is no engine yet.
    """
    if not hasattr(model, "load_checkpoint"):
        raise UlyssesError(
            f"load_checkpoint({str(path)!r}) before the strategy was set up",
            "an engine of DeepSpeed to load into, which exists once a Trainer runs",
            "pass ckpt_path to fit, validate, test or predict; lightning_ulysses.export.load_weights(path) gives the "
            "weights without a Trainer",
        )


def zero_stage(config: Any) -> int:
    """The stage of a DeepSpeed config; 0 without ZeRO."""
    return int((config.get("zero_optimization") or {}).get("stage", 0))


def steps_on_device(config: Any) -> bool:
    """Whether the optimizer of a DeepSpeed config steps where the model is."""
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    return bool(offload.get("device", "none") == "none")


def allow_weights_only_load(engine: Any) -> None:
    """Lets a ZeRO-3 engine without an optimizer load a checkpoint (DeepSpeed issue 7272)."""
    # Without an optimizer, the offload object takes its place, and lacks this method.
    if engine.optimizer is not None and not hasattr(engine.optimizer, "_restore_from_bit16_weights"):
        engine.optimizer._restore_from_bit16_weights = lambda: None


def forget_trace(engine: Any) -> None:
    """Makes ZeRO-3 record the order of modules anew, after a forward that is not part of a training step.

    Otherwise it follows an order that mixes both forwards (DeepSpeed ``zero/partitioned_param_coordinator.py``).
    """
    # Without an optimizer, the offload object takes its place.
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    coordinator = offload.get_param_coordinator() if hasattr(offload, "get_param_coordinator") else None
    if coordinator is None:
        return
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    coordinator._clear_trace_structures()


def flat_parameters(optimizer: Any) -> list[torch.Tensor]:
    """What the optimizer inside steps: flat pieces of all weights."""
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def keep_optimizer(engine: Any) -> None:
    """Has an engine step the user's own Adagrad, whose groups schedulers change.

    ZeRO makes another one in its place, with a single group of the defaults (``zero/stage_1_and_2.py`` and
    ``zero/stage3.py``, ``initialize_optimizer_states``).
    """
    given, zero = engine.client_optimizer, engine.optimizer
    if isinstance(given, torch.optim.Adagrad) and getattr(zero, "optimizer", given) is not given:
        given.state = zero.optimizer.state
        zero.optimizer = given
        if hasattr(zero, "_create_param_mapping"):
            # It has linked the parameters of the first group alone.
            zero._link_all_hp_params()
            zero._param_slice_mappings = zero._create_param_mapping()


def drop_unstepped(optimizer: Any) -> None:
    """Has ``zero_grad`` drop the gradients of micro-batches that no step followed, as that of torch does.

    ZeRO 1 and 2 keep them for the next step (``zero/stage_1_and_2.py``, ``averaged_gradients`` and ``micro_step_id``).
    """
    # Neither ZeRO-3, which begins anew, nor a run without an optimizer.
    if not hasattr(optimizer, "all_grad_tensors"):
        return
    from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

    original = optimizer.zero_grad

    @functools.wraps(original)
    def zero_grad(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            kept.update(dict.fromkeys(kept))
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        if optimizer.cpu_offload:
            optimizer._offload_accumulated_param_ids = set()

    optimizer.zero_grad = zero_grad


def inside(engine: Any, name: str, context: Callable[[], AbstractContextManager[None]]) -> None:
    """Runs a method of an engine inside a context, for as long as the engine lives."""
    original = getattr(engine, name)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        with context():
            return original(*args, **kwargs)

    setattr(engine, name, method)


def checkpointing() -> Any:
    """DeepSpeed's module of activation checkpointing; None in a program that has not imported DeepSpeed."""
    return sys.modules.get("deepspeed.runtime.activation_checkpointing.checkpointing")


def keep_checkpoint_inputs() -> Handle:
    """Makes DeepSpeed's activation checkpointing empty aliases of its inputs, not the caller's tensors.

    With ``cpu_checkpointing`` or ``partition_activations``, DeepSpeed empties the tensors that it is given. A residual
    connection around the call, or a second layer with the same input, would then compute on empty tensors
    (``activation_checkpointing/checkpointing.py``, ``get_cpu_activations_for_backward`` and others).
    """
    handle, module = Handle(), checkpointing()
    if module is None:
        return handle

    def own(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def save(args: Any, *rest: Any) -> Any:
            # An alias shares the storage, which is freed once nobody else holds it. A tensor that is passed twice gets
            # one alias, since DeepSpeed recognizes it by its id.
            aliases = {id(arg): arg.detach().requires_grad_(arg.requires_grad) for arg in args if _is_float(arg)}
            return original(tuple(aliases.get(id(arg), arg) for arg in args), *rest)

        return save

    for name in _EMPTYING:
        handle.patch(module, name, own(getattr(module, name)))
    return handle


def touch_through(touch: Callable[[Callable[[Any], Any], Any], Any]) -> Handle:
    """Has ZeRO-3 hook its backward to inputs and outputs of submodules by way of ``touch(function, tensor)``.

    It applies a `torch.autograd.Function` that changes nothing to each of them (``runtime/zero/parameter_offload.py``,
    ``apply_to_tensors_only``), and such a function asks no tensor that stands for another one.
    """
    handle, module = Handle(), sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    if module is None:
        return handle
    original = module.apply_to_tensors_only

    @functools.wraps(original)
    def apply(function: Callable[[Any], Any], value: Any, **kwargs: Any) -> Any:
        return original(functools.partial(touch, function), value, **kwargs)

    handle.patch(module, "apply_to_tensors_only", apply)
    return handle


def gather_as_one(modules: Iterable[Any]) -> Handle:
    """Has ZeRO-3 gather all parameters below each module for its call, in place of one submodule after the other.

    Takes effect where an engine is made afterwards (``utils/z3_leaf_module.py``). The engine reduces the gradients of
    such a module when that of its input is there, and before there are any if the input needs none
    (``zero/stage3.py``, ``reduce_leaf_module_grads``). So the input always needs one.
    """

    def needs_gradient(module: Any, args: tuple[Any, ...]) -> Any:
        if not torch.is_grad_enabled() or not args or not _is_float(args[0]) or args[0].requires_grad:
            return None
        return args[0].detach().requires_grad_(), *args[1:]

    handle = Handle()
    for module in modules:
        if not getattr(module, "_z3_leaf", False):
            module._z3_leaf = True
            handle.add(functools.partial(delattr, module, "_z3_leaf"))
            handle.add(module.register_forward_pre_hook(needs_gradient, prepend=True).remove)
    return handle


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def restore_linear() -> None:
    """Restores ``torch.nn.functional.linear``, which ZeRO-3 replaces and does not put back.

    DeepSpeed says that it persists unless reset (``zero/partition_parameters.py``). If only some processes have the
    replacement, they reduce gradients in different orders.
    """
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patcher

    original = getattr(Patcher, "linear_bk", None)
    if original is not None:
        torch.nn.functional.linear = original


def release_engines() -> None:
    """Destroys the engines of this process. They hold process groups, whose threads keep polling.

    Their hooks on nodes of autograd form cycles that Python's collector does not see. Without the hooks, it can collect
    them.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    found = [thing for thing in gc.get_objects() if type(thing) is DeepSpeedEngine]
    # An engine that is still held elsewhere is found again by the next call.
    for engine in (engine for engine in found if not hasattr(engine, "_released")):
        engine._released = True
        engine.destroy()


def let_go(model: Any) -> None:
    """Removes what keeps an engine alive after its run; it can still save and gather.

    Its hooks on gradients sit on nodes of autograd, where Python's collector does not see that they hold the engine,
    its buffers and its process groups. They would also take the gradients of the next engine of the same module
    (``_grad_acc_hooks`` in ``zero/stage_1_and_2.py`` and ``zero/stage3.py``). And ZeRO-3 keeps each module for good on
    a list (``zero/parameter_offload.py``, ``FWD_MODULE_STACK``) and in the cache of a method
    (``zero/partitioned_param_coordinator.py``, ``__params_to_release``).

    Args:
        model: A strategy's; a run that was refused early has no engine.
    """
    for hook in getattr(getattr(model, "optimizer", None), "_grad_acc_hooks", ()):
        hook.remove()
    offload: Any = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    if offload is not None:
        module = getattr(model, "module", None)
        offload.FWD_MODULE_STACK[:] = [each for each in offload.FWD_MODULE_STACK if each is not module]
        # The function with the cache is inside a decorated method.
        method = vars(offload.PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
        inspect.getclosurevars(method).nonlocals["func"].cache_clear()


def forget_world() -> None:
    """Lets a process that leaves one world join another.

    DeepSpeed caches the process groups of the first world. It also numbers modules and parameters on from those of the
    last engine, and ZeRO-3 compares these numbers over ranks.
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


@contextmanager
def held_frozen(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Around saving and loading: parameters without gradients.

    At stage 3, DeepSpeed saves and loads what its optimizer steps and what is frozen (``engine.py``,
    ``_get_zero_frozen_param_attributes``); what has a gradient and no optimizer is neither, and was lost.
    """
    held = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_()


def unstepped(engine: Any) -> list[torch.nn.Parameter]:
    """The parameters that ZeRO-3 divides and its optimizer does not step; none at other stages."""
    groups = getattr(engine.optimizer, "fp16_groups", None) if engine.zero_optimization_partition_weights() else None
    stepped = {id(parameter) for group in groups or () for parameter in group}
    return [parameter for parameter in engine.module.parameters() if groups and id(parameter) not in stepped]


def gradient_norm(optimizer: Any) -> torch.Tensor:
    """The 2-norm of the gradients that the next step will use, before clipping, () float; a collective.

    It is that of ``zero/stage_1_and_2.py``, ``zero/stage3.py`` and ``bf16_optimizer.py``, each in its ``step``; -1 or
    infinite for gradients that are not finite.
    """
    if hasattr(optimizer, "get_grads_for_norm"):
        from deepspeed.runtime.utils import get_global_norm_of_tensors

        norm = get_global_norm_of_tensors(
            input_tensors=optimizer.get_grads_for_norm()[0], mpu=optimizer.mpu, norm_type=optimizer.norm_type
        )
        return torch.as_tensor(norm, dtype=torch.float32)
    if hasattr(optimizer, "scaled_global_norm"):
        norms = [optimizer.scaled_global_norm()]
    else:
        norms = optimizer._get_norm_groups()
    stacked = torch.stack([torch.as_tensor(norm, dtype=torch.float32) for norm in norms])
    # One group that is not finite must not look like one of norm 1.
    whole = torch.linalg.vector_norm(stacked) if bool((stacked >= 0).all()) else stacked.min()
    return whole / float(optimizer.loss_scale)
