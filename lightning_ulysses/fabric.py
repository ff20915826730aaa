"""The strategy for Lightning's Fabric: sequences are split inside the module, and the loop is the user's own."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.accelerators import CPUAccelerator
from lightning.fabric.strategies import _StrategyRegistry
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_ulysses.batch.clock import Clock
from lightning_ulysses.batch.loop_loader import LoopLoader
from lightning_ulysses.batch.module_call import ModuleCall, stand_in_loss
from lightning_ulysses.checkpoints.load import find, load_to_evaluate, load_to_train
from lightning_ulysses.checkpoints.manifest import Division
from lightning_ulysses.checkpoints.naming import RunName, division
from lightning_ulysses.checkpoints.save import saved_whole
from lightning_ulysses.checks import own_loop
from lightning_ulysses.checks.notices import Notices
from lightning_ulysses.checks.optimizer import check_elementwise
from lightning_ulysses.checks.parameters import check_trained
from lightning_ulysses.checks.trainer import check_accelerator, check_arguments, check_precision
from lightning_ulysses.config import (
    REGISTERED,
    MemoryConfig,
    UlyssesConfig,
    batch_rules,
    check_config,
    check_replicas,
    check_stage,
    read_parts,
    settle_config,
)
from lightning_ulysses.exchange.mesh import SequenceMesh, opened
from lightning_ulysses.geometry.split_plan import read_plan
from lightning_ulysses.memory import realized
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.planning.auto import gathered_units
from lightning_ulysses.planning.zero import Sharding
from lightning_ulysses.sequence_parallel import SequenceParallel
from lightning_ulysses.upstream import deepspeed as upstream_deepspeed
from lightning_ulysses.upstream import fabric as upstream_fabric
from lightning_ulysses.upstream import lightning as upstream_lightning
from lightning_ulysses.upstream.requirements import check_versions
from lightning_ulysses.upstream.zero_buckets import agree_on_gradients
from lightning_ulysses.upstream.zero_masters import MasterCopy

# Under which a checkpoint holds what this strategy counts.
_OWN_STATE = "lightning_ulysses"


class UlyssesFabricStrategy(upstream_lightning.IndexedDevice, DeepSpeedStrategy):
    """Trains a module on sequences split over processes, exactly, in a loop that was written for one process.

    Every rank of a group gets the whole batch. Calls of the module split the sequence at its repeated blocks. What they
    return has the shape of the whole sequence, so the loss and everything that the loop does with it is that of one
    process. Groups and micro-batches are averaged, as in Fabric's other strategies.

    Args:
        sp_size: P, processes that share one sequence; ``"auto"`` takes the processes of one node. Also factors, as
            for the other strategy.
        dp_shard_size: Groups that each train on sequences of their own; by default what is left of the world.
        dp_replicate_size: Only 1 is exact and accepted.
        stage: ZeRO stage 1, 2 or 3.
        sequence_dims: For inputs of the module, by the names of their parameters, the dimension that carries the
            sequence; needed only to try the module on a few tokens where its inputs do not have the usual names.
        check_model: Tries the module with a plan of yours on a few tokens; without a plan it is always tried.
        plan: Where the module is split and joined, see `SequencePlan`; by default at its repeated blocks.
        memory: Parts of a step that run a part at a time; see `MemoryConfig`. ``"auto"`` chooses what the longest
            batch so far needs. By default none.
        config: A DeepSpeed config or the path of one; replaces all arguments of DeepSpeedStrategy.
        **kwargs: Every other argument of Fabric's ``DeepSpeedStrategy``.

    Raises:
        UlyssesError: For settings that cannot be made exact.

    Example:
        >>> fabric = Fabric(devices=8, strategy=UlyssesFabricStrategy(sp_size=4))
        >>> fabric.launch()
        >>> model, optimizer = fabric.setup(model, optimizer)
    """

    strategy_name = "ulysses_deepspeed"

    def __init__(
        self,
        sp_size: int | Literal["auto"] | dict[str, int] = "auto",
        dp_shard_size: int | None = None,
        dp_replicate_size: int = 1,
        stage: int = 2,
        sequence_dims: dict[str, int | None] | None = None,
        check_model: bool = True,
        plan: str | dict[str, Any] | None = None,
        memory: MemoryConfig | dict[str, Any] | Literal["auto"] | None = None,
        config: str | Path | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(kwargs, type(self))
        check_replicas(dp_shard_size, dp_replicate_size)
        check_stage(stage if kwargs.get("zero_optimization", True) else 0)
        check_config(config)
        read = read_plan(None if plan == "auto" else plan)
        own_loop.check_plan(read, plan)
        self.ulysses = UlyssesConfig(
            sp_size=sp_size,
            dp_shard_size=dp_shard_size,
            # The loop has the loss of whole sequences, and says itself how it weighs them.
            loss_weighting="none",
            check_model=check_model,
            split="blocks" if read is None else "auto",
            rules=batch_rules(sequence_dims, None, -100, read),
            plan=read,
            memory=read_parts(memory),
        )
        super().__init__(stage=stage, config=config, **kwargs)
        assert isinstance(self.config, dict)
        settle_config(self.config, is_given=config is not None or self.DEEPSPEED_ENV_VAR in os.environ)
        # Without it, DeepSpeed clips to a norm of 1, which no loop asked for.
        self._clip_val = float(self.config.setdefault("gradient_clipping", 0.0))
        self._backward_sync_control = upstream_fabric.SyncControl(self._set_boundary)
        self._window = own_loop.Window()
        self._run = RunName()
        self._mesh: SequenceMesh | None = None
        self._core: SequenceParallel | None = None
        self._module: nn.Module | None = None
        self._masters: MasterCopy | None = None
        self._notices: Notices | None = None
        self._patches = Handle()
        self._seed = 0
        self._loaders = 0
        # Calls of the module in training and in evaluation mode, whose random numbers they name.
        self._calls = {"forward": 0, "evaluation": 0}

    @property
    def mesh(self) -> SequenceMesh:
        """Sizes and groups; available once processes are connected."""
        if self._mesh is None:
            raise RuntimeError("The mesh exists only after fabric.launch().")
        return self._mesh

    @property
    def core(self) -> SequenceParallel:
        """What the hooks below pass on to; available from ``fabric.setup`` on."""
        if self._core is None:
            raise RuntimeError("Sequence parallelism is set up by fabric.setup(model, optimizer).")
        return self._core

    @override
    def setup_environment(self) -> None:
        check_versions()
        check_accelerator(self.accelerator)
        if isinstance(self.accelerator, CPUAccelerator) and self.parallel_devices:
            # DeepSpeed and Lightning both tell processes apart by the device's index.
            self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices))]
        # Skips DeepSpeedStrategy's own method, which does nothing but refuse CPUs.
        DDPStrategy.setup_environment(self)

    @override
    def _setup_distributed(self) -> None:
        upstream_deepspeed.use_accelerator(self.root_device.type)
        check_precision(self.precision.precision, "Fabric")
        with upstream_deepspeed.without_shared_memory_op() if self.root_device.type == "cpu" else nullcontext():
            super()._setup_distributed()
        seed = os.environ.get("PL_GLOBAL_SEED")
        self._seed = int(self.broadcast(seed if seed is not None else torch.initial_seed()))
        wanted = (self.ulysses.sp_size, self.ulysses.dp_shard_size)
        self._mesh = opened(self._mesh, self.world_size, self.num_processes, *wanted, self.root_device.type)

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        return {"num_replicas": self.mesh.dp_size, "rank": self.mesh.dp_rank}

    @override
    def process_dataloader(self, dataloader: Any) -> Any:
        upstream_fabric.seed_workers(dataloader, self.mesh.dp_rank)
        self._loaders += 1
        key = (self._seed, self.mesh.dp_rank, f"dataloader {self._loaders}")
        return LoopLoader(dataloader, key, self.mesh, self.root_device)

    @override
    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Any], scheduler: Any = None
    ) -> tuple[Any, list[Any], Any]:
        own_loop.check_setup(self._module, optimizers)
        check_trained(module)
        if self.ulysses.check_model:
            stays = upstream_deepspeed.steps_on_device(self.config)
            check_elementwise(optimizers[0], self.root_device if stays else torch.device("cpu"))
        with self._setting_up(module):
            engine, made, scheduler = super().setup_module_and_optimizers(module, optimizers, scheduler)
        upstream_deepspeed.keep_optimizer(engine)
        agree_on_gradients(engine.optimizer, module, self.mesh, self.core.batches, self.core.turns)
        self._masters = MasterCopy(engine.optimizer)
        upstream_deepspeed.drop_unstepped(engine.optimizer)
        upstream_fabric.forward_zero_grad(engine.optimizer, self._window.clear)
        upstream_deepspeed.inside(engine, "backward", self.core.backward)
        upstream_deepspeed.inside(engine, "step", self._in_step)
        self._set_boundary(True)
        return engine, made, scheduler

    @override
    def setup_module(self, module: nn.Module) -> Any:
        own_loop.check_setup(self._module, None)
        with self._setting_up(module):
            return super().setup_module(module)

    @contextmanager
    def _setting_up(self, module: nn.Module) -> Generator[None, None, None]:
        """Around the making of the engine: the core is there before, and takes calls of the module afterwards."""
        self._module = module
        self._core = core = SequenceParallel(self.ulysses, self.mesh, self.root_device, self._seed)
        if self.zero_stage_3:
            self._patches.add(upstream_deepspeed.gather_as_one(gathered_units(module, self.ulysses.memory)).remove)
        yield
        engine = self.model
        self._notices = Notices(
            self.mesh, upstream_deepspeed.zero_stage(self.config), core.weights, self.root_device, rank_zero_info
        )
        forget = partial(upstream_deepspeed.forget_trace, engine)
        stage, stays = upstream_deepspeed.zero_stage(self.config), upstream_deepspeed.steps_on_device(self.config)
        sharding = Sharding(stage, self.world_size, not stays)
        core.install(module, gathers_parameters=self.zero_stage_3, forget=forget, say=rank_zero_info, sharding=sharding)
        engine.forward = partial(self._forward, engine.forward)

    def _forward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Stands for the engine's forward: a call of the module is a step of the core."""
        module, core = self._module, self.core
        assert module is not None and self._notices is not None
        own_loop.check_uncompiled(type(module).__name__)
        call = ModuleCall(module, args, kwargs, by_name=bool(self.ulysses.rules.sequence_dims))
        kind = "forward" if module.training else "evaluation"
        clock = Clock(kind, is_training=False, batch=self._calls[kind], is_counted=True)
        self._calls[kind] += 1
        batch = core.receive(call.batch, clock)
        # By way of the module's own call, around which ZeRO-3 gathers parameters, and not of the engine's.
        batch = core.try_step(clock, lambda tokens: stand_in_loss(call.run(module, tokens)), batch)
        self._notices.started(core.split_of(kind))
        with core.step(clock, "forward"):
            return realized(call.run(original, batch))

    def _set_boundary(self, is_boundary: bool) -> None:
        self._window.is_boundary = is_boundary
        if self.model is not None:
            self.model.set_gradient_accumulation_boundary(is_boundary)

    @override
    def backward(self, tensor: Tensor, module: Any, *args: Any, **kwargs: Any) -> None:
        self._window.backward()
        super().backward(tensor, module, *args, **kwargs)

    @override
    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        self._window.step(has_closure="closure" in kwargs)
        output = super().optimizer_step(optimizer, **kwargs)
        # Fabric's loops clip before each step, or not.
        self.model.optimizer.clip_grad = self._clip_val
        return output

    @contextmanager
    def _in_step(self) -> Generator[None, None, None]:
        assert self._masters is not None
        self._masters.carry_edits()
        yield

    @override
    def clip_gradients_norm(
        self,
        module: Any,
        optimizer: Any,
        max_norm: float | int,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Has the following step clip, and returns the norm over all gradients, () float32; a collective."""
        own_loop.check_clipping(norm_type, self._window)
        norm = upstream_deepspeed.gradient_norm(module.optimizer).to(torch.float32)
        if error_if_nonfinite:
            own_loop.check_norm(norm)
        module.optimizer.clip_grad = float(max_norm)
        return norm

    @override
    def clip_gradients_value(self, module: Any, optimizer: Any, clip_val: float | int) -> None:
        raise own_loop.clips_values(clip_val)

    def target_weight(self, count: float, total: float | None = None) -> float:
        """What to multiply a loss with so that all groups' losses add up to the mean over all of their targets.

        Without it, groups are averaged, however many targets each has. A collective over groups.

        Args:
            count: Targets that the loss is a mean over, the same on all ranks of a group.
            total: The same for all micro-batches of the optimizer step together, whose losses the loop then adds up
                and does not divide; by default ``count``.

        Returns:
            1 where all groups have equally many targets and there is one micro-batch.
        """
        numbers = torch.tensor([count if total is None else total], dtype=torch.float64)
        if self.mesh.dp_size > 1:
            dist.all_reduce(numbers, group=self.mesh.replicas)
        return count * self.mesh.dp_size / float(numbers) if numbers else 0.0

    @property
    def _division(self) -> Division:
        assert isinstance(self.config, dict)
        return division(self.world_size, self.config)

    @override
    def save_checkpoint(
        self, path: str | Path, state: dict[str, Any], storage_options: Any = None, filter: Any = None
    ) -> None:
        engine = upstream_fabric.engine_in(state)
        save = partial(super().save_checkpoint, storage_options=storage_options, filter=filter)
        if engine is None or storage_options is not None or filter is not None:
            # Refused there.
            save(path, state)
            return
        whole, beside_it = Path(self.broadcast(path)), {_OWN_STATE: {"calls": dict(self._calls)}}
        manifest = self._run.manifest(engine.global_steps, self.mesh.sp_size, engine.optimizer, self._division)
        if self._masters is not None:
            self._masters.carry_edits()
        frozen = upstream_deepspeed.held_frozen(upstream_deepspeed.unstepped(engine))
        with saved_whole(whole, manifest, self.local_rank == 0) as beside, frozen:
            save(beside, {**state, **beside_it})

    @override
    def load_checkpoint(
        self, path: str | Path, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        natively = partial(super().load_checkpoint, state=state, strict=strict, weights_only=weights_only)
        engine = upstream_fabric.engine_in(state) if isinstance(state, dict) else None
        if engine is None or (self.load_full_weights and self.zero_stage_3):
            return natively(path)
        upstream_deepspeed.allow_weights_only_load(engine)
        found, wanted = find(path), self._division
        self._run.goes_on(found)
        if any(value is engine.optimizer for value in state.values()):
            remainder = load_to_train(found, wanted, engine, natively, rank_zero_info)
        else:
            remainder = load_to_evaluate(found, wanted, engine.module, natively)
        # Nothing is left to move where Fabric has loaded it.
        upstream_fabric.move_state(remainder, state)
        self._calls.update(remainder.pop(_OWN_STATE, {}).get("calls", {}))
        return remainder

    def close(self) -> None:
        """Puts everything back that was patched, for a program that goes on with other models; twice does nothing."""
        if self._core is not None:
            self._core.close()
        self._patches.remove()
        upstream_deepspeed.restore_linear()
        upstream_deepspeed.let_go(self.model)
        if self._mesh is not None:
            self._mesh = self._mesh.without_host_groups()
            self._mesh.close()

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        for suffix, settings in REGISTERED.items():
            description = f"Ulysses sequence parallelism with DeepSpeed ZeRO: {dict(settings)}"
            strategy_registry.register(cls.strategy_name + suffix, cls, description=description, **settings)
