"""One rank of a training step on tensors without memory, by the package's own code."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lightning_ulysses import memory, regions
from lightning_ulysses.config import MemoryConfig
from lightning_ulysses.context import LocalBatch, SequenceContext, activate, current_context
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.geometry.split_plan import SequencePlan
from lightning_ulysses.interceptors.install_all import install_interceptors
from lightning_ulysses.memory.blocks import find_blocks
from lightning_ulysses.memory.host import footprint
from lightning_ulysses.planning.meter import Held, Meter, Workspace, labelled
from lightning_ulysses.planning.stand_ins import CUDA, AbsentGroup, HostBytes, on_fake_tensors
from lightning_ulysses.planning.workspaces import flash_attention
from lightning_ulysses.upstream.torch_fake import Answers

Step = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]

#: The cause of what waits for the backward.
KEPT = "kept for the backward"
_LABELS = (("attention", re.compile(r"attention$", re.I)), ("mlp", re.compile(r"(mlp|ffn|feedforward|moe\w*)$", re.I)))


@dataclass(frozen=True)
class Scene:
    """The step that is rehearsed.

    Attributes:
        seq_len: S.
        sp_size: P.
        memory: Parts that are on.
        rows: B.
        ulysses: U, the ranks that exchange heads; the others hold the same ones and gather keys. None for P.
    """

    seq_len: int
    sp_size: int = 1
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    rows: int = 1
    ulysses: int | None = None

    @property
    def rank(self) -> int:
        """The rank that takes the most memory: one whose own tokens travel as well; see `all_to_all.on_wire`."""
        exchanging = self.ulysses or self.sp_size
        # Of ranks that gather keys, the last one attends with queries of others; chunks of heads hold few of them.
        last = 0 if self.memory.cuts_heads else self.sp_size - exchanging
        return last + int(exchanging > 2)

    @property
    def layout(self) -> SequenceLayout:
        """The geometry."""
        return SequenceLayout(self.seq_len, self.sp_size)


@dataclass(frozen=True)
class Rehearsal:
    """What one rank took for the activations and gradients of one step.

    Attributes:
        peak: Bytes on the device at the peak, without parameters, gradients that ZeRO keeps, and optimizer states.
        per_block: Bytes at the peak for each further block of the model.
        blocks: Repeated blocks of the model that ran; 0 if it has none.
        causes: Bytes at the peak, by what they were made for.
        buffers: Sizes of buffers on the host, and how many there are of each.
        held: What lived at the peak, the largest first.
        fixed: Bytes at the peak that do not grow with S; None where sizes of the model are like lengths of slices.
    """

    peak: int
    per_block: int
    blocks: int
    causes: dict[str, int]
    buffers: list[tuple[int, int]]
    held: list[Held] = field(default_factory=list)
    fixed: int | None = None

    def on_device(self, blocks: int) -> int:
        """The peak of a model with so many blocks."""
        return self.peak + self.per_block * (blocks - self.blocks) if self.blocks else self.peak

    def on_host(self, blocks: int, factor: float = 1.0) -> int:
        """Bytes on the host of a model with so many blocks, on a sequence ``factor`` times as long."""
        number = sum(count * footprint(max(round(size * factor), 1), CUDA) for size, count in self.buffers)
        # The last block's stays on the device.
        return number * (blocks - 1) // (self.blocks - 1) if self.blocks > 1 else number

    def by_cause(self, blocks: int) -> dict[str, int]:
        """Bytes at the peak of a model with so many blocks, by what they were made for."""
        further = self.on_device(blocks) - self.peak
        return {**self.causes, KEPT: self.causes.get(KEPT, 0) + further}


def call_with_labels(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of a transformers model."""
    loss: Tensor = module(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    return loss


class Lab:
    """A model without memory, on which steps are rehearsed.

    Args:
        make: Makes the model.
        step: Computes a loss of the model and a batch with ``input_ids`` and ``labels``.
        dtype: Of parameters.
        workspace: What kernels take besides what they return.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        step: Step = call_with_labels,
        dtype: torch.dtype = torch.bfloat16,
        workspace: Workspace | None = flash_attention,
    ) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._step, self._workspace, self._answers = step, workspace, Answers()
        with self._mode, _default_dtype(dtype):
            self.model = make().train()
        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(drop)

    def rehearse(self, scene: Scene, *, all_tiles: bool = False) -> Rehearsal:
        """Runs one step.

        Args:
            scene: The step.
            all_tiles: Whether every tile runs, and not the first two and the last alone, which take the same.
        """
        host = HostBytes()
        with self._mode, on_fake_tensors(host, all_tiles=all_tiles):
            meter = Meter(rounding=512, workspace=self._workspace, answers=self._answers)
            measure_step(self.model, self._step, scene, meter)
        starts = meter.marks
        per_block = starts[-1] - starts[-2] if len(starts) > 1 else 0
        held = meter.at_peak()
        causes: dict[str, int] = {}
        for each in held:
            cause = KEPT if each.is_kept else each.made.label
            causes[cause] = causes.get(cause, 0) + each.bytes
        fixed = _fixed(self.model, scene, held)
        return Rehearsal(meter.peak, per_block, len(starts), causes, sorted(host.sizes.items()), held, fixed)


def _fixed(model: nn.Module, scene: Scene, held: list[Held]) -> int | None:
    """Bytes of the tensors of which no size is a multiple of S_r; a shift of labels may take one token."""
    share = scene.layout.shares[scene.rank]

    def grows(shape: Iterable[int]) -> bool:
        return any(size >= share - 1 and min(size % share, -size % share) <= 1 for size in shape)

    if scene.seq_len % scene.sp_size or any(grows(parameter.shape) for parameter in model.parameters()):
        return None
    return sum(each.bytes for each in held if not grows(each.made.shape))


def drop(parameter: Tensor) -> None:
    """Lets a gradient go: what ZeRO keeps of it is counted by its formula."""
    parameter.grad = None


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def measure_step(model: nn.Module, step: Step, scene: Scene, meter: Meter) -> None:
    """Runs forward and backward of one rank's slice under a meter, on real tensors or on fake ones.

    Other ranks are absent: what they would send is not defined. A mark of the meter is set where each block begins.
    """
    layout = scene.layout
    tokens = torch.zeros(scene.rows, layout.shares[scene.rank], dtype=torch.long)
    batch = LocalBatch(layout, {"input_ids": tokens, "labels": tokens, "shift_labels": tokens}, rows=scene.rows)
    blocks = blocks_of(model, scene.memory)
    run = (lambda: step(model, batch.shards), batch, scene.rank, scene.memory, meter, blocks)
    measure(model, *run, ulysses=scene.ulysses)


def measure(
    model: nn.Module,
    step: Callable[[], Tensor],
    batch: LocalBatch,
    rank: int,
    config: MemoryConfig,
    meter: Meter,
    blocks: Sequence[nn.Module] = (),
    plan: SequencePlan | None = None,
    ulysses: int | None = None,
) -> None:
    """`measure_step` for a step and a batch of any kind.

    Args:
        model: The user's.
        step: Computes the loss.
        batch: Cut for ``rank``.
        rank: Of the group.
        config: Parts that are on.
        meter: Counts.
        blocks: Where marks are set.
        plan: Where the model is split, if the batch is not.
        ulysses: See `Scene`.
    """
    sp_size = batch.layout.sp_size
    group: Any = AbsentGroup(sp_size) if sp_size > 1 else None
    context = SequenceContext(SequenceMesh(rank, sp_size, sp_size, rank, 1, 0, sp_group=group, ulysses=ulysses))
    before = current_context()
    with ExitStack() as stack:
        activate(context)
        stack.callback(activate, before)
        stack.callback(install_interceptors(context, model, False).remove)
        if config.is_on:
            stack.callback(memory.install(context, model, config).remove)
        if plan is not None:
            stack.callback(regions.install(context, model, plan).remove)
            context.use(plan)
        meter.ignore([*model.parameters(), *model.buffers(), *batch.shards.values()])
        stack.enter_context(meter)
        stack.enter_context(labelled(meter, _label))
        stack.enter_context(_marked(meter, blocks))
        with context.step(batch):
            loss = step()
        meter.end_phase()
        meter.label = "backward"
        with context.backward(batch):
            loss.backward()


def blocks_of(model: nn.Module, config: MemoryConfig) -> list[nn.Module]:
    """The repeated blocks of a model, in order; none if there are none."""
    try:
        return [*find_blocks(model, config.checkpoint_blocks).values()]
    except UlyssesError:
        return []


@contextmanager
def _marked(meter: Meter, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Takes note of what lives when each block begins for the first time."""
    seen: set[nn.Module] = set()

    def mark(module: nn.Module, args: Any) -> None:
        if module not in seen:
            seen.add(module)
            meter.marks.append(meter.live)

    handles = [block.register_forward_pre_hook(mark) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _label(module: nn.Module) -> str | None:
    name = type(module).__name__
    if any(True for _ in module.children()):
        return next((label for label, pattern in _LABELS if pattern.search(name)), None)
    return "norm" if re.search("norm", name, re.I) else None
