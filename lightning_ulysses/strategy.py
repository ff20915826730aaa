"""The Lightning strategy: Ulysses sequence parallelism inside, DeepSpeed ZeRO around it."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.strategies import _StrategyRegistry
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies.ddp import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_ulysses.batch.clock import Clock, read_clock
from lightning_ulysses.batch.same_length import evaluates_in_step
from lightning_ulysses.checkpoints.hooks import CheckpointedStrategy
from lightning_ulysses.checks.hooks import HookWatch
from lightning_ulysses.checks.monitors import check_monitored
from lightning_ulysses.checks.notices import Notices
from lightning_ulysses.checks.optimizer import check_elementwise, clipping_error, only_one
from lightning_ulysses.checks.parameters import check_trained
from lightning_ulysses.checks.trainer import check_accelerator, check_arguments, check_loss, check_trainer
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
from lightning_ulysses.divided import joined
from lightning_ulysses.exchange.mesh import SequenceMesh, opened
from lightning_ulysses.geometry.split_plan import read_plan
from lightning_ulysses.loss.weights import StepWeights
from lightning_ulysses.memory import realized
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.planning.auto import gathered_units
from lightning_ulysses.planning.zero import Sharding
from lightning_ulysses.sequence_parallel import SequenceParallel
from lightning_ulysses.upstream import deepspeed as upstream_deepspeed
from lightning_ulysses.upstream import lightning as upstream_lightning
from lightning_ulysses.upstream.requirements import check_versions
from lightning_ulysses.upstream.together import EndsTogether
from lightning_ulysses.upstream.zero_buckets import agree_on_gradients
from lightning_ulysses.upstream.zero_masters import MasterCopy

if TYPE_CHECKING:
    import lightning.pytorch as pl


class UlyssesDeepSpeedStrategy(
    upstream_lightning.AcceptsCompiled,
    upstream_lightning.OwnsWindows,
    upstream_lightning.IndexedDevice,
    EndsTogether,
    CheckpointedStrategy,
):
    """Trains an unchanged LightningModule on sequences split over processes, exactly.

    Every batch is cut along the sequence; attention exchanges slices of it for heads; ZeRO shards parameters, gradients
    and optimizer state over all processes. One optimizer step gives the parameters of one process on the whole batch.

    Args:
        sp_size: P, processes that share one sequence; ``"auto"`` takes the processes of one node. Also factors, such
            as ``{"ulysses": 8, "gather": 4}``: 8 exchange heads, and 4 such groups gather keys and values.
        dp_shard_size: Groups that each train on sequences of their own; by default what is left of the world.
        dp_replicate_size: Only 1 is exact and accepted.
        stage: ZeRO stage 1, 2 or 3.
        sequence_dims: For batch keys (or tuple indices, as strings) that are not the usual ones, the dimension that
            carries the sequence; ``None`` as value for a tensor that every rank needs whole.
        loss_weighting: ``"tokens"`` for a loss that is a mean over tokens; ``"none"`` averages over ranks instead.
        targets: The key of the tensor that the loss is a mean over, where that cannot be seen from the loss computed.
        ignore_index: The label that counts as no target.
        pad_to_multiple_of: Pads every batch's S up to a multiple where P > 1; no multiple is required.
        check_model: Tries the first step of each kind on a few tokens, and refuses one that is not exact.
        plan: Where a model that cannot take slices is split and joined instead: ``"litgpt"``, ``"litgpt_unjoined"``,
            ``"diffusers"``, or a mapping of submodules to inputs or outputs with their dimension; see `SequencePlan`.
            ``"auto"`` is ``split="blocks"``.
        split: ``"batch"`` gives each rank its slice of the batch, ``"blocks"`` splits the model at its repeated blocks
            and leaves what comes before and after them whole. ``"auto"`` takes the first of the two that gives the step
            of one process, tried on a few tokens of the first batch of each kind of step.
        memory: Parts of a step that run a part at a time, such as ``{"tiled_loss": True, "head_chunks": 4}``; see
            `MemoryConfig`. ``"auto"`` chooses what the longest batch so far needs. By default none.
        config: A DeepSpeed config or the path of one; replaces all arguments of DeepSpeedStrategy.
        **kwargs: Every other argument of Lightning's ``DeepSpeedStrategy``.

    Raises:
        UlyssesError: For settings that cannot be made exact.

    Source:
        DeepSpeed-Ulysses, arXiv 2309.14509; ALST, arXiv 2506.13996.
    """

    strategy_name = "ulysses_deepspeed"
    _refuses = True  # `verify` compares what would be refused.

    def __init__(
        self,
        sp_size: int | Literal["auto"] | dict[str, int] = "auto",
        dp_shard_size: int | None = None,
        dp_replicate_size: int = 1,
        stage: int = 2,
        sequence_dims: dict[str, int | None] | None = None,
        loss_weighting: Literal["tokens", "none"] = "tokens",
        targets: str | None = None,
        ignore_index: int = -100,
        pad_to_multiple_of: int | None = None,
        check_model: bool = True,
        plan: str | dict[str, Any] | None = None,
        split: Literal["auto", "batch", "blocks"] = "auto",
        memory: MemoryConfig | dict[str, Any] | Literal["auto"] | None = None,
        config: str | Path | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(kwargs, type(self))
        check_replicas(dp_shard_size, dp_replicate_size)
        check_stage(stage if kwargs.get("zero_optimization", True) else 0)
        check_config(config)
        if plan == "auto":
            plan, split = None, "blocks"
        read = read_plan(plan)
        self.ulysses = UlyssesConfig(
            sp_size=sp_size,
            dp_shard_size=dp_shard_size,
            loss_weighting=loss_weighting,
            targets=targets,
            check_model=check_model,
            split=split,
            rules=batch_rules(sequence_dims, pad_to_multiple_of, ignore_index, read),
            plan=read,
            memory=read_parts(memory),
        )
        super().__init__(stage=stage, config=config, **kwargs)
        assert isinstance(self.config, dict)
        settle_config(self.config, is_given=config is not None or self.DEEPSPEED_ENV_VAR in os.environ)
        self._mesh: SequenceMesh | None = None
        self._core: SequenceParallel | None = None
        self._base_seed = 0
        self._clip_val = 0.0
        self._watch: HookWatch | None = None
        self._masters: MasterCopy | None = None
        self._notices: Notices | None = None
        self._patches = Handle()

    @property
    def mesh(self) -> SequenceMesh:
        """Sizes and groups; available once processes are connected."""
        if self._mesh is None:
            raise RuntimeError("The mesh exists only after the Trainer has set up its processes.")
        return self._mesh

    @property
    def core(self) -> SequenceParallel:
        """What the hooks below pass on to; available from setup on."""
        if self._core is None:
            raise RuntimeError("Sequence parallelism is set up only while a Trainer runs.")
        return self._core

    @property
    def weights(self) -> StepWeights:
        """The weights of losses, and the exact loss of the last step; available from setup on."""
        return self.core.weights

    @property
    def _module_and_trainer(self) -> tuple[pl.LightningModule, pl.Trainer]:
        assert self.lightning_module is not None
        return self.lightning_module, self.lightning_module.trainer

    def _now(self) -> Clock:
        module, trainer = self._module_and_trainer
        return replace(read_clock(module, trainer), **upstream_lightning.progress(trainer))

    @override
    def setup_environment(self) -> None:
        check_versions()
        check_accelerator(self.accelerator)
        if isinstance(self.accelerator, CPUAccelerator) and self.parallel_devices:
            # DeepSpeed and Lightning both tell processes apart by the device's index.
            self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices))]
        # Skips DeepSpeedStrategy's own method, which does nothing but refuse CPUs.
        DDPStrategy.setup_environment(self)
        # Before the user's setup() and configure_model(), which may ask for it.
        upstream_lightning.set_device_mesh(self._module_and_trainer[0], self.mesh.device_mesh)

    @override
    def setup_distributed(self) -> None:
        self.set_world_ranks()
        upstream_deepspeed.use_accelerator(self.root_device.type)
        with upstream_deepspeed.without_shared_memory_op() if self.root_device.type == "cpu" else nullcontext():
            super().setup_distributed()
        seed = os.environ.get("PL_GLOBAL_SEED")
        self._base_seed = int(self.broadcast(seed if seed is not None else torch.initial_seed()))
        # Ranks that are connected say once what is refused.
        wanted = (self.ulysses.sp_size, self.ulysses.dp_shard_size)
        self._mesh = opened(self._mesh, self.world_size, self.num_processes, *wanted, self.root_device.type)

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        return {"num_replicas": self.mesh.dp_size, "rank": self.mesh.dp_rank}

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        check_trainer(trainer, module := self._module_and_trainer[0])
        self._close()
        # Schedulers ask for the number of steps in there, and so for the length of a sampler that asks for the mesh.
        self._core = SequenceParallel(self.ulysses, self.mesh, self.root_device, self._base_seed, refuses=self._refuses)
        if self.zero_stage_3:
            self._patches.add(upstream_deepspeed.gather_as_one(gathered_units(module, self.ulysses.memory)).remove)
        super().setup(trainer)
        upstream_deepspeed.keep_optimizer(self.deepspeed_engine)
        stage = upstream_deepspeed.zero_stage(self.config)
        self._notices = Notices(self.mesh, stage, self.weights, self.root_device, rank_zero_info)
        self._clip_val = float(trainer.gradient_clip_val or 0.0)
        # Lightning's does nothing: DeepSpeed clips by its config alone.
        vars(self.precision_plugin)["clip_gradients"] = self._clip_gradients
        agree_on_gradients(self.deepspeed_engine.optimizer, module, self.mesh, self.core.batches, self.core.turns)
        forget = partial(upstream_deepspeed.forget_trace, self.deepspeed_engine)
        sharding = Sharding(stage, self.world_size, not upstream_deepspeed.steps_on_device(self.config))
        self.core.install(
            module, gathers_parameters=self.zero_stage_3, forget=forget, say=rank_zero_info, sharding=sharding
        )
        self._masters = MasterCopy(self.deepspeed_engine.optimizer)
        flat = partial(upstream_deepspeed.flat_parameters, self.deepspeed_engine.optimizer)
        self._watch = HookWatch(module, flat, self.root_device, self.zero_stage_3)
        if trainer.training:
            upstream_deepspeed.drop_unstepped(self.deepspeed_engine.optimizer)
            upstream_deepspeed.inside(self.deepspeed_engine, "backward", self._in_backward)
            upstream_deepspeed.inside(self.deepspeed_engine, "step", self._in_step)
            self._watch.start()
            check = partial(check_monitored, self.root_device)
            self._patches.add(upstream_lightning.before_monitoring(trainer, check).remove)

    @contextmanager
    def _in_backward(self) -> Generator[None, None, None]:
        assert self._watch is not None
        with self._watch.in_backward(), self.core.backward():
            yield

    @contextmanager
    def _in_step(self) -> Generator[None, None, None]:
        assert self._watch is not None and self._masters is not None
        with self._watch.in_optimizer_step():
            self._masters.carry_edits()
            yield

    @override
    def _init_optimizers(self) -> tuple[Any, Any]:
        check_trained(self._module_and_trainer[0])
        optimizer, scheduler = only_one(*upstream_lightning.optimizers_of(self._module_and_trainer[0]))
        if self.ulysses.check_model:
            stays = upstream_deepspeed.steps_on_device(self.config)
            check_elementwise(optimizer, self.root_device if stays else torch.device("cpu"))
        return optimizer, scheduler

    def _clip_gradients(
        self, optimizer: Any, clip_val: float | None = 0.0, gradient_clip_algorithm: Any = None
    ) -> None:
        """Has the following step of the engine clip, for overridden hooks and manual optimization."""
        if clip_val and str(getattr(gradient_clip_algorithm, "value", gradient_clip_algorithm or "norm")) != "norm":
            raise clipping_error(gradient_clip_algorithm)
        self.deepspeed_engine.optimizer.clip_grad = float(clip_val or 0.0)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        _, trainer = self._module_and_trainer
        limit = partial(upstream_lightning.used_batches, trainer)
        return self.core.loader(dataloader, self._now, limit, trainer.precision_plugin.convert_input)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        hooked = partial(super().batch_to_device, device=device, dataloader_idx=dataloader_idx)
        moves = upstream_lightning.transfers(self._module_and_trainer[1], hooked, device or self.root_device)
        return self.core.receive(batch, self._now(), *moves)

    def _step(self, name: str, batch: Any, *args: Any, is_boundary: bool = True, **kwargs: Any) -> Any:
        module, clock = self._module_and_trainer[0], replace(self._now(), is_boundary=is_boundary)
        if not clock.is_training:
            self.agree_in_evaluation()
        # By way of the module's own call, around which ZeRO-3 gathers parameters, and not of the engine's.
        tried = partial(self._forward_redirection, module, module, name)
        assert self._watch is not None
        with self._watch.in_user_step(name):
            batch = self.core.try_step(clock, lambda batch: tried(batch, *args, **kwargs), batch)
            if clock.is_training and self._notices is not None:
                self._notices.started(self.core.split_of(clock.kind))
            with self.core.step(clock, name):
                return joined(realized(getattr(super(), name)(batch, *args, **kwargs)))

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        module, trainer = self._module_and_trainer
        is_boundary = not upstream_lightning.should_accumulate(trainer)
        if module.automatic_optimization:
            # DeepSpeed counts micro-steps across epochs, Lightning's window ends with the epoch.
            self.deepspeed_engine.set_gradient_accumulation_boundary(is_boundary)
        output = self._step("training_step", *args, is_boundary=is_boundary, **kwargs)
        if module.automatic_optimization:
            check_loss(module, output)
        return output

    @override
    def evaluates_in_step(self) -> bool:
        counts = upstream_lightning.evaluation_batches(self._module_and_trainer[1])
        return evaluates_in_step(counts, self.mesh, self.zero_stage_3)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("validation_step", *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("test_step", *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self.core.join(self._step("predict_step", *args, **kwargs))

    @override
    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        module, trainer = self._module_and_trainer
        # Lightning has divided by it already; the window's own weights take its place.
        repeats = trainer.accumulate_grad_batches if module.automatic_optimization else 1
        loss = self.core.weigh(closure_loss * repeats)
        assert self._watch is not None
        with self._watch.explained():
            return super().backward(loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    @override
    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        assert self._watch is not None
        skipped = self.deepspeed_engine.skipped_steps
        with self._watch.explained():
            output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self.deepspeed_engine.optimizer.clip_grad = self._clip_val
        self.core.stepped()
        if self.deepspeed_engine.skipped_steps > skipped and self._notices is not None:
            self._notices.skipped(self._module_and_trainer[1].global_step + 1)
        return output

    @override
    def ranks_of_sequence(self) -> int:
        return self.mesh.sp_size

    @contextmanager
    @override
    def settled(self) -> Generator[None, None, None]:
        assert self._watch is not None and self._masters is not None
        with self._watch.closed():
            self._masters.carry_edits()
            yield

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        _, trainer = self._module_and_trainer
        if trainer.training:
            # DeepSpeed has loaded that of the run that saved.
            self.deepspeed_engine.optimizer.clip_grad = self._clip_val
        upstream_lightning.settle_progress(checkpoint, self.mesh.dp_size, trainer.max_steps != -1)
        upstream_lightning.forget_train_loader(trainer)
        return checkpoint

    def _close(self) -> None:
        if self._core is not None:
            self._core.close()

    @override
    def teardown(self) -> None:
        self._close()
        if self._watch is not None:
            self._watch.stop()
        self._patches.remove()
        vars(self.precision_plugin).pop("clip_gradients", None)
        upstream_deepspeed.restore_linear()
        upstream_deepspeed.let_go(self.model)
        if self._mesh is not None:
            self._mesh = self._mesh.without_host_groups()
        super().teardown()
        # On a GPU, a failed rank would wait for collectives that nobody completes.
        if self._mesh is not None and (self.root_device.type == "cpu" or not self._module_and_trainer[1].interrupted):
            self._mesh.close()

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        for suffix, settings in REGISTERED.items():
            description = f"Ulysses sequence parallelism with DeepSpeed ZeRO: {dict(settings)}"
            strategy_registry.register(cls.strategy_name + suffix, cls, description=description, **settings)
