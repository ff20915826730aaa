"""What runs in the workers: the module in one process, and split over several."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_ulysses.batch.random_streams import named_stream
from lightning_ulysses.batch.whole import read_batch
from lightning_ulysses.config import batch_rules, whole_rules
from lightning_ulysses.context import current_context
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.batch_keys import EDGE_KEYS, BatchRules
from lightning_ulysses.geometry.documents import read_edges
from lightning_ulysses.geometry.split_plan import read_plan
from lightning_ulysses.regions.notes import RegionSizes
from lightning_ulysses.strategy import UlyssesDeepSpeedStrategy
from lightning_ulysses.testing import QUIET
from lightning_ulysses.verification.dropout import silence_attention
from lightning_ulysses.verification.record import Call, Recorder, Suspect, Watch
from lightning_ulysses.verification.shrink import fewer_layers

_SEED = 0


@dataclass(frozen=True)
class Job:
    """What every worker has to know.

    Attributes:
        folder: Where ``module.pt`` lies, and where the records go.
        batches: Whole batches.
        sizes: P, or its factors, as the strategy's ``sp_size``.
        strategy: Arguments of `UlyssesDeepSpeedStrategy`.
        layers: Layers that transformers models are built with; None for their own number.
        accelerator: Of the Trainer.
    """

    folder: str
    batches: list[Any]
    sizes: int | dict[str, int]
    strategy: dict[str, Any]
    layers: int | None
    accelerator: str

    @property
    def sp_size(self) -> int:
        """P."""
        return self.sizes if isinstance(self.sizes, int) else math.prod(self.sizes.values())

    @property
    def rules(self) -> BatchRules:
        """How the strategy reads a batch."""
        rules = batch_rules(
            self.strategy.get("sequence_dims"),
            None,
            self.strategy.get("ignore_index", -100),
            read_plan(self.strategy.get("plan")),
        )
        return whole_rules(rules) if self.strategy.get("split") == "blocks" else rules

    def path(self, rank: int | None, of: str = "") -> Path:
        """The record of a rank; None stands for the run in one process."""
        return Path(self.folder) / (f"single{of}.pt" if rank is None else f"rank{rank}{of}.pt")

    @property
    def weights(self) -> Path:
        """The weights that all runs begin with."""
        return Path(self.folder) / "weights.pt"


@dataclass
class Record:
    """What one process saw.

    Attributes:
        losses: The whole loss of each batch.
        gradients: For each batch, whole gradients by parameter, float32 on the CPU; on rank 0 only.
        calls: First calls of submodules with the first batch, in the order in which they returned.
        suspects: Calls that depend on where a slice begins or ends.
        notes: What was changed in the module.
        shares: S_r of each rank in what a plan split.
        error: What ended the run: a `UlyssesError`, or a traceback.
    """

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    calls: dict[str, Call] = field(default_factory=dict)
    suspects: list[Suspect] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shares: tuple[int, ...] = ()
    error: UlyssesError | str | None = None


class Compared(UlyssesDeepSpeedStrategy):
    """Runs a step that is not exact, so that it can be told with numbers and a line."""

    _refuses = False


def _same(value: Any) -> Any:
    return value


def prepare(job: Job, save: bool, notes: list[str], *, steps: bool = False) -> pl.LightningModule:
    """The user's module without what would change what is compared; with ``steps`` it keeps its optimizer."""
    module: Any = torch.load(Path(job.folder) / "module.pt", map_location="cpu", weights_only=False)
    configure_model = module.configure_model

    def configure(self: Any) -> None:
        torch.manual_seed(_SEED)
        with fewer_layers(job.layers):
            configure_model()
        if any(p.is_floating_point() and p.dtype != torch.float32 for p in self.parameters()):
            notes.append("computed in float32, whatever the dtype of the weights")
            self.float()
        notes.extend(silence_attention(self))
        for each in self.modules():
            config: Any = getattr(each, "config", None)
            if hasattr(config, "use_cache"):
                # With a cache, transformers attends across packed documents.
                config.use_cache = False
        if save:
            torch.save(self.state_dict(), job.weights)
        else:
            self.load_state_dict(torch.load(job.weights, map_location="cpu", weights_only=True))

    def configure_optimizers(self: Any) -> Any:
        # Weights stay, so that every batch is compared on the same ones.
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)

    module.configure_model = MethodType(configure, module)
    module.configure_callbacks = lambda: []
    if not steps:
        module.configure_optimizers = MethodType(configure_optimizers, module)
        module.optimizer_step = MethodType(pl.LightningModule.optimizer_step, module)
    return module


def whole_gradients(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Tensor]:
    """Gradients before an optimizer step, float32 on the CPU; empty on all ranks but the first."""
    gradients = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(trainer.strategy, UlyssesDeepSpeedStrategy):
            from deepspeed.utils import safe_get_full_grad

            gradient = safe_get_full_grad(parameter)
        else:
            gradient = parameter.grad
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        if trainer.global_rank == 0:
            gradients[name] = gradient.detach().float().cpu().clone().view(parameter.shape)
    return gradients


class _Keeper(pl.Callback):
    """Watches the first step and keeps losses and gradients of all."""

    def __init__(self, record: Record, share: int | None) -> None:
        self.record = record
        self.share = share
        self.recorder: Recorder | None = None
        self._steps = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Behind the strategy's own hooks, and so with what they supply.
        self.recorder = Recorder(pl_module)
        module: Any = pl_module
        module.training_step = self._watched(module.training_step, self.recorder, pl_module.device)

    def _watched(self, step: Callable[..., Any], recorder: Recorder, device: torch.device) -> Callable[..., Any]:
        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            context = current_context()
            # A trial of the step is no step.
            if context is not None and context.place.takes_calls:
                return step(*args, **kwargs)
            self._steps += 1
            with named_stream("verify", self._steps, device=device):
                return watched(*args, **kwargs)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.record.calls:
                return step(*args, **kwargs)
            self.record.calls = recorder.calls
            watch = Watch(self.share, recorder.current) if self.share is not None else None
            recorder.active = True
            try:
                with watch or contextlib.nullcontext():
                    return step(*args, **kwargs)
            finally:
                recorder.active = False
                recorder.remove()
                if watch is not None:
                    self.record.suspects = watch.suspects

        return training_step

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.record.gradients.append(whole_gradients(trainer, pl_module))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, UlyssesDeepSpeedStrategy):
            region = strategy.core.local.notes.of(RegionSizes).layout
            if region is not None and not self.record.shares:
                self.record.shares = region.shares
            self.record.losses.append(float(strategy.weights.global_loss()))
        else:
            self.record.losses.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps libraries from talking, and user code from writing where the report goes."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def fit(
    job: Job, module: pl.LightningModule, strategy: Any, devices: int, batches: list[Any], keeper: pl.Callback
) -> None:
    """Trains on each of some batches once."""
    trainer = pl.Trainer(
        accelerator=job.accelerator,
        devices=devices,
        strategy=strategy,
        callbacks=[keeper],
        max_epochs=1,
        limit_val_batches=0,
        use_distributed_sampler=False,
        **QUIET,
    )
    torch.manual_seed(_SEED)
    trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=_same))  # type: ignore[arg-type]


def finish(record: Any, path: Path, run: Callable[[], None]) -> None:
    """Saves the record in any case; what was raised goes on, so that the pool ends ranks that wait for this one."""
    with _quiet():
        try:
            run()
        except BaseException as error:
            record.error = error if isinstance(error, UlyssesError) else traceback.format_exc()
            raise
        finally:
            torch.save(record, path)


def _hides_documents(batch: Any) -> bool:
    """Whether documents are marked in a way that transformers by itself does not see."""
    keys = batch if isinstance(batch, Mapping) else {}
    positions = keys.get("position_ids")
    edges = next((read_edges(key, keys[key]) for key in EDGE_KEYS if keys.get(key) is not None), [])
    # (documents + 1,); a cut may have left a single one.
    several = len(set(edges)) > 2
    return several and (positions is None or bool((positions.diff(dim=-1) > 0).all()))


def single_inputs(job: Job) -> tuple[list[Any], Any]:
    """Batches and strategy of one process."""
    # With the same derived keys, such as shift_labels, as a module gets under the strategy.
    batches = [read_batch(batch, job.rules, 1).shard(0)[0] for batch in job.batches]
    if any(_hides_documents(batch) for batch in batches):
        return batches, UlyssesDeepSpeedStrategy(sp_size=1, check_model=False, **job.strategy)
    return batches, "auto"


def run_single(rank: int, job: Job) -> None:
    """One process, no split; saves weights and record for the others."""
    record = Record()

    def run() -> None:
        batches, strategy = single_inputs(job)
        if strategy != "auto":
            record.notes.append("in one process, the strategy (sp_size=1) keeps the documents of cu_seqlens apart")
        fit(job, prepare(job, True, record.notes), strategy, 1, batches, _Keeper(record, None))

    finish(record, job.path(None), run)


def run_split(rank: int, job: Job) -> None:
    """One of P processes."""
    record = Record()

    def run() -> None:
        strategy = Compared(sp_size=job.sizes, check_model=False, **job.strategy)
        share = read_batch(job.batches[0], job.rules, job.sp_size).layout.shares[rank]
        # The last rank alone: rank 0 begins where the sequence does, and so looks right where others do not.
        keeper = _Keeper(record, share if rank == job.sp_size - 1 else None)
        fit(job, prepare(job, False, record.notes), strategy, job.sp_size, job.batches, keeper)

    finish(record, job.path(rank), run)


def has_parameters(module: nn.Module) -> bool:
    """Whether the model is there, and not only once ``configure_model`` has run."""
    return next(module.parameters(), None) is not None
