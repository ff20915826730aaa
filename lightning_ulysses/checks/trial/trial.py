"""The trial of a step: an excerpt of the first batch, whole in one process against slices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_ulysses.batch.excerpt import excerpt
from lightning_ulysses.batch.pipeline import fill_mask, local_batch
from lightning_ulysses.batch.whole import WholeBatch, read_batch
from lightning_ulysses.checks.probing.probe import computes_precisely
from lightning_ulysses.checks.trial.blocks import BlockFinder
from lightning_ulysses.checks.trial.replay import Recorder, Recording, Replay
from lightning_ulysses.checks.trial.sandbox import StepEnds, repeatable, sandbox, state_kept
from lightning_ulysses.checks.trial.verdict import SliceReport, Verdict, compare, judge
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.batch_keys import KEPT, MASK_KEYS, BatchRules
from lightning_ulysses.loss.evidence import LossEvidence

Step = Callable[[Any], Any]

# Tokens of the excerpt: enough to tell candidates apart, and few enough to cost nothing.
_TOKENS, _TOKENS_PER_RANK = 48, 12
_PLACES = 9


class StepTrial:
    """Tries the user's step once.

    Args:
        context: Where the step stands; P > 1.
        module: The user's LightningModule.
        device: Where it is.
        rules: How batches are read.
    """

    def __init__(self, context: SequenceContext, module: nn.Module, device: torch.device, rules: BatchRules) -> None:
        self._context = context
        self._module = module
        self._device = device
        self._rules = rules
        self._whole: tuple[Any, LocalBatch] | None = None
        self._part: tuple[Any, LocalBatch] | None = None
        self._span = slice(0, 0)
        #: A plan that would split the model inside and join it before the loss.
        self.plan: dict[str, dict[str, Any]] | None = None

    def prepare(self, batch: WholeBatch, move: Callable[[Any], Any]) -> None:
        """Takes an excerpt of a batch, and moves it to the device whole and as this rank's slice."""
        mesh = self._context.mesh
        short = _best_excerpt(batch, self._rules, mesh.sp_size)
        # A step may write to its batch: each run has tensors of its own, as has the real step.
        whole, part = (read_batch(_copied(short), self._rules, size) for size in (1, mesh.sp_size))
        with state_kept(self._module):
            self._whole = local_batch(whole, 0, move, self._device, stand_in=False)
            self._part = local_batch(part, mesh.sp_rank, move, self._device, stand_in=True)
        for name in part.counts:
            fill_mask(self._part[1], name)
        self._span = part.layout.spans[mesh.sp_rank]

    def run(self, step: Step) -> Verdict:
        """Runs the step on the excerpt, whole and on this rank's slice; a collective.

        Args:
            step: Calls the user's step on inputs.
        """
        assert self._part is not None
        report = SliceReport(self._part[1].counts, reason="")
        try:
            with sandbox(self._module, self._device):
                report = self._compare(step)
        except UlyssesError:
            report = SliceReport(self._part[1].counts, reason="")
        except Exception as failure:
            report = SliceReport(self._part[1].counts, reason=repr(failure))
        mesh = self._context.mesh
        everyone: list[Any] = [None] * mesh.world_size
        dist.all_gather_object(everyone, report)
        return judge(everyone, mesh.sp_size)

    def _compare(self, step: Step) -> SliceReport:
        assert self._whole is not None and self._part is not None
        blocks = BlockFinder(self._module, self._part[1].layout.seq_len)
        recorder = Recorder(self._context, blocks)
        try:
            with self._context.alone():
                self._differentiate(step, *self._whole, recorder, recorder.recording)
        finally:
            blocks.close()
            self.plan = blocks.plan()
        replay = Replay(recorder.recording, self._span)
        self._differentiate(step, *self._part, replay, replay.recording)
        local = self._part[1]
        if local.notes.of(LossEvidence).has_whole_part:
            return SliceReport(local.counts, reason="a part of the loss is that of the whole batch")
        half = not computes_precisely(self._module)
        return compare(recorder.recording, replay, local.counts, half)

    def _differentiate(self, step: Step, inputs: Any, local: LocalBatch, trial: Any, recording: Recording) -> None:
        kept, streams = state_kept(self._module), repeatable(self._device)
        with kept, streams, self._context.tried(trial, local), torch.enable_grad():
            try:
                output = step(inputs)
            except StepEnds as end:
                output = end.loss
            loss = output.get("loss") if isinstance(output, dict) else output
        if isinstance(loss, Tensor):
            recording.differentiate(loss)


def _best_excerpt(batch: WholeBatch, rules: BatchRules, sp_size: int) -> Any:
    """Of excerpts of several lengths and places, the first in which every row has a target in every slice.

    Else the one with most such pairs. Rows and slices without a target would hide which of them a loss depends on.
    """
    seq_len = batch.layout.real_len
    best, most = batch.template, -1.0
    longest = min(seq_len, max(_TOKENS, _TOKENS_PER_RANK * sp_size))
    for count in (longest, longest // 2, longest // 3, 4 * sp_size):
        for place in range(_PLACES if 2 * sp_size <= count < seq_len else 1):
            short = excerpt(batch.template, rules, (seq_len - count) * place // (_PLACES - 1), count)
            filled = _filled(read_batch(short, rules, sp_size), rules.ignore_index)
            if filled == 1.0:
                return short
            if filled > most:
                best, most = short, filled
    return best


def _copied(batch: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)


def _filled(short: WholeBatch, ignore_index: int) -> float:
    """The part of pairs of a row and a slice that have a target, over all tensors that may hold them."""
    parts = []
    for name in short.counts:
        key = name.removesuffix(KEPT)
        if key not in short.tensors or short.dims[key] != 1 or short.tensors[key].dim() != 2:
            continue
        is_mask = key != name or key in MASK_KEYS
        kept = short.tensors[key] > 0 if is_mask else short.tensors[key] != ignore_index
        # (B, S) -> for each slice (B,)
        parts += [part.any(dim=1) for part in kept.split(short.layout.shares, dim=1)]
    return float(torch.stack(parts).double().mean()) if parts else 1.0
