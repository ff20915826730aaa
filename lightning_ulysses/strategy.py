"""The Lightning strategy: Ulysses sequence parallelism inside, DeepSpeed ZeRO around it."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.strategies import _StrategyRegistry
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.strategies.ddp import DDPStrategy
from lightning.pytorch.strategies.deepspeed import DeepSpeedStrategy
from torch import Tensor
from typing_extensions import override

from lightning_ulysses.batch.pipeline import BatchPipeline
from lightning_ulysses.batch.predictions import join_outputs
from lightning_ulysses.checks.probing import ModelProbe
from lightning_ulysses.checks.step import check_intercepted, check_output
from lightning_ulysses.checks.trainer import check_trainer
from lightning_ulysses.config import UlyssesConfig, batch_rules, check_deepspeed_config, check_stage
from lightning_ulysses.context import SequenceState, activate
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import SequenceMesh, resolve_sizes
from lightning_ulysses.geometry.split_plan import read_plan
from lightning_ulysses.interceptors.install_all import install_interceptors
from lightning_ulysses.loss.weights import StepWeights
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.upstream import deepspeed as upstream_deepspeed
from lightning_ulysses.upstream import lightning as upstream_lightning
from lightning_ulysses.upstream.zero_buckets import agree_on_gradients

if TYPE_CHECKING:
    import lightning.pytorch as pl


class UlyssesDeepSpeedStrategy(upstream_lightning.AcceptsCompiled, DeepSpeedStrategy):
    """Trains an unchanged LightningModule on sequences split over processes, exactly.

    Every batch is cut along the sequence; attention exchanges slices of the sequence for heads; ZeRO shards parameters,
    gradients and optimizer state over all processes. One optimizer step gives the parameters that one process would
    reach on the whole batch.

    Args:
        sp_size: P, processes that share one sequence; ``"auto"`` takes the processes of one node.
        dp_shard_size: Groups that each train on sequences of their own; by default what is left of the world.
        dp_replicate_size: Only 1 is exact and accepted.
        stage: ZeRO stage 1, 2 or 3.
        sequence_dims: For batch keys (or tuple indices, as strings) that are not the usual ones, the dimension that
            carries the sequence; ``None`` as value for a tensor that every rank needs whole.
        loss_weighting: ``"tokens"`` for a loss that is a mean over tokens; ``"none"`` averages over ranks instead.
        targets: The key of the tensor that the loss is a mean over, where that cannot be seen from the loss computed.
        ignore_index: The label that counts as no target.
        pad_to_multiple_of: Pads every batch's S up to a multiple where P > 1; no multiple is required.
        check_model: Runs the model on a few tokens in the first step, and refuses it if they mix outside of attention
            or restart their positions; see `checks.probing`.
        plan: Where a model that cannot take slices is split and joined instead: ``"litgpt"``, ``"litgpt_unjoined"``,
            ``"diffusers"``, or a mapping of submodules to inputs or outputs with their dimension; see `SequencePlan`.
        config: A DeepSpeed config or the path of one; replaces all arguments of DeepSpeedStrategy.
        **kwargs: Every other argument of Lightning's ``DeepSpeedStrategy``.

    Raises:
        UlyssesError: For settings that cannot be made exact.

    Source:
        DeepSpeed-Ulysses, arXiv 2309.14509; ALST, arXiv 2506.13996.
    """

    strategy_name = "ulysses_deepspeed"

    def __init__(
        self,
        sp_size: int | Literal["auto"] = "auto",
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
        config: str | Path | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_stage(stage if kwargs.get("zero_optimization", True) else 0)
        read = read_plan(plan)
        self.ulysses = UlyssesConfig(
            sp_size=sp_size,
            dp_shard_size=dp_shard_size,
            dp_replicate_size=dp_replicate_size,
            loss_weighting=loss_weighting,
            targets=targets,
            check_model=check_model,
            rules=batch_rules(sequence_dims, pad_to_multiple_of, ignore_index, read),
            plan=read,
        )
        super().__init__(stage=stage, config=config, **kwargs)
        assert isinstance(self.config, dict)
        if config is not None or self.DEEPSPEED_ENV_VAR in os.environ:
            check_deepspeed_config(self.config)
        else:
            # The user's own optimizer must work with offload; DeepSpeed's needs a compiler.
            self.config["zero_force_ds_cpu_optimizer"] = False
        # Only DeepSpeed's timers read it; Lightning would build a second train dataloader to guess it.
        self.config.setdefault("train_micro_batch_size_per_gpu", 1)
        self._mesh: SequenceMesh | None = None
        self._state: SequenceState | None = None
        self._handle: Handle | None = None
        self._pipeline: BatchPipeline | None = None
        self._probe: ModelProbe | None = None
        self._base_seed = 0
        self.weights: StepWeights | None = None

    @property
    def mesh(self) -> SequenceMesh:
        """Sizes and groups; available once processes are connected."""
        if self._mesh is None:
            raise RuntimeError("The mesh exists only after the Trainer has set up its processes.")
        return self._mesh

    @property
    def state(self) -> SequenceState:
        """The live batch, for interceptors and callbacks; available between setup and teardown."""
        if self._state is None:
            raise RuntimeError("The sequence state exists only while a Trainer runs.")
        return self._state

    @override
    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, (CUDAAccelerator, CPUAccelerator)):
            raise UlyssesError(
                f"accelerator {type(self.accelerator).__name__}", "CUDA or CPU", "set Trainer(accelerator='cpu')"
            )
        if isinstance(self.accelerator, CPUAccelerator) and self.parallel_devices:
            # DeepSpeed and Lightning both tell processes apart by the device's index.
            self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices))]
        # Skips DeepSpeedStrategy's own method, which does nothing but refuse CPUs.
        DDPStrategy.setup_environment(self)

    @override
    def setup_distributed(self) -> None:
        self.set_world_ranks()
        wanted = (self.ulysses.sp_size, self.ulysses.dp_shard_size, self.ulysses.dp_replicate_size)
        sizes = resolve_sizes(self.world_size, self.num_processes, *wanted)
        upstream_deepspeed.use_accelerator(self.root_device.type)
        with upstream_deepspeed.without_shared_memory_op() if self.root_device.type == "cpu" else nullcontext():
            super().setup_distributed()
        if self._mesh is None:
            self._mesh = SequenceMesh.create(sizes, self.root_device.type)
        seed = os.environ.get("PL_GLOBAL_SEED")
        self._base_seed = int(self.broadcast(seed if seed is not None else torch.initial_seed()))

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        return {"num_replicas": self.mesh.dp_size, "rank": self.mesh.dp_rank}

    @property
    @override
    def handles_gradient_accumulation(self) -> bool:
        """False: Lightning decides where a window ends, so that an epoch's last, shorter one is stepped as well."""
        return False

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Nothing to block: the engine reduces or accumulates by the boundary it has been told."""
        yield

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.lightning_module is not None
        check_trainer(trainer, self.lightning_module)
        self._remove_interceptors()
        # Schedulers ask for the number of steps in there, and so for the length of a sampler that asks for the mesh.
        self._state = SequenceState(self.mesh)
        activate(self._state)
        super().setup(trainer)
        agree_on_gradients(self.deepspeed_engine.optimizer, self.lightning_module, self.root_device)
        upstream_lightning.set_device_mesh(self.lightning_module, self.mesh.device_mesh)
        self.weights = StepWeights(self.ulysses, self.mesh, self.root_device)
        self._handle = install_interceptors(self._state, self.lightning_module, self.zero_stage_3, self.ulysses.plan)
        forget = partial(upstream_deepspeed.forget_trace, self.deepspeed_engine)
        self._probe = ModelProbe(self._state, self.lightning_module, forget, self.ulysses.check_model)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        assert self.lightning_module is not None
        if self._pipeline is None:
            self._pipeline = BatchPipeline(self.ulysses.rules, self.mesh, self.root_device, self._base_seed)
        return self._pipeline.wrap(dataloader, self.lightning_module.trainer, self.ulysses.loss_weighting == "tokens")

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        assert self.lightning_module is not None and self.weights is not None and self._pipeline is not None
        trainer = self.lightning_module.trainer
        whole = self._pipeline.read(batch, training=trainer.training)
        move = super().batch_to_device
        with self._pipeline.drawing("batch_to_device", trainer):
            result, self.state.pending = self._pipeline.cut(
                whole, trainer.training, lambda sharded: move(sharded, device, dataloader_idx)
            )
        self.state.collect_evidence = self.weights.needs_evidence
        if trainer.training:
            self.weights.begin(whole.counts_of_group(), self._pipeline.use())
        return result

    def _step(self, name: str, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None and self._pipeline is not None and self._probe is not None
        suspensions, drawing = self.state.suspensions, self._pipeline.drawing(name, self.lightning_module.trainer)
        with drawing, self.state.live(), self._probe.watch():
            output = getattr(super(), name)(*args, **kwargs)
            check_intercepted(self.state, name, type(self.lightning_module).__name__, suspensions)
        return output

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None and self.weights is not None
        last = not upstream_lightning.should_accumulate(self.lightning_module.trainer)
        if self.lightning_module.automatic_optimization:
            self.weights.check_boundary(last)
            # DeepSpeed counts micro-steps across epochs, Lightning's window ends with the epoch.
            self.deepspeed_engine.set_gradient_accumulation_boundary(last)
        output = self._step("training_step", *args, **kwargs)
        check_output(output, self.lightning_module)
        return output

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("validation_step", *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("test_step", *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        output = self._step("predict_step", *args, **kwargs)
        assert self.state.pending is not None
        # A plan that joins has done it already.
        return output if self.state.is_joined else join_outputs(output, self.state.pending, self.mesh)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        assert self.lightning_module is not None and self.weights is not None
        assert self.state.pending is not None and self._probe is not None
        module = self.lightning_module
        # Lightning has divided by it already; the window's own weights take its place.
        repeats = module.trainer.accumulate_grad_batches if module.automatic_optimization else 1
        loss = self.weights.apply(closure_loss * repeats, self.state.pending, repeats, module.automatic_optimization)
        # Activation checkpointing calls attention again from here.
        with self.state.live(backward=True), self._probe.settled():
            return super().backward(loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    @override
    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        assert self.weights is not None
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self.weights.stepped()
        return output

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        if not self.load_full_weights:
            upstream_deepspeed.allow_weights_only_load(self.deepspeed_engine)
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        upstream_lightning.rescale_progress(checkpoint, self.mesh.dp_size)
        assert self.lightning_module is not None
        upstream_lightning.forget_train_loader(self.lightning_module.trainer)
        return checkpoint

    def _remove_interceptors(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        activate(None)

    @override
    def teardown(self) -> None:
        self._remove_interceptors()
        self._state = self._probe = None
        upstream_deepspeed.restore_linear()
        super().teardown()

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        offload: Mapping[str, Any] = {"stage": 3, "offload_optimizer": True, "offload_parameters": True}
        entries: dict[str, Mapping[str, Any]] = {
            "": {"stage": 2},
            **{f"_stage_{stage}": {"stage": stage} for stage in (1, 2, 3)},
            "_stage_3_offload": offload,
        }
        for suffix, settings in entries.items():
            description = f"Ulysses sequence parallelism with DeepSpeed ZeRO: {dict(settings)}"
            strategy_registry.register(cls.strategy_name + suffix, cls, description=description, **settings)
