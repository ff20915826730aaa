"""Refuses a model by what it does: a token may reach another one only through an attention call that is intercepted.

In the first step, the model runs on a few tokens with every intercepted attention replaced by a stand-in that keeps
tokens apart. One token is changed, and nothing may move in another one. Then tokens with their true positions alone
must come out as they do among the others. What has no tokens any more is followed to the loss, see `pooling`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_ulysses.attention.route import AttentionTally
from lightning_ulysses.batch.random_streams import kept_streams
from lightning_ulysses.checks.probing.attributes import attributes_kept
from lightning_ulysses.checks.probing.calls import Call, choose_length, has_dim
from lightning_ulysses.checks.probing.compiled import (
    call_around,
    is_compiled_in_place,
    outermost_compiled,
    uncompile_steps,
)
from lightning_ulysses.checks.probing.pooling import PoolingWatch, Suspects, shapes_that_stay
from lightning_ulysses.checks.probing.recording import Recording, first_to_depend_on_place, first_to_move, record
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.notes import known
from lightning_ulysses.regions.notes import Beside

_MOST_CALLS = 64


class ModelProbe:
    """Looks at the outermost module calls of the first step of each kind.

    Args:
        context: Where the step stands.
        root: The user's LightningModule.
        device: Where the model is.
        forget: Called after each try, for whoever keeps count of the module calls of a step.
        enabled: False looks at nothing.
    """

    def __init__(
        self,
        context: SequenceContext,
        root: nn.Module,
        device: torch.device,
        forget: Callable[[], None] | None = None,
        enabled: bool = True,
    ) -> None:
        self._device = device
        self._forget = forget
        self._context = context
        self._root = root
        self._names = {id(module): name for name, module in root.named_modules()}
        #: Modes, training or not, whose steps need no look any more.
        self.done: set[bool] = set() if enabled and context.mesh.sp_size > 1 else {False, True}
        # For each module that runs, whether it was called with something split.
        self._open: list[bool] = []
        self._calls = 0
        self._suspects: Suspects = {}
        self.pooling = PoolingWatch(context.mesh, root)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Probes the calls made in a step; once for each mode, training or evaluation."""
        training = self._root.training
        self.done.add(training)
        self._open, self._calls, self._root_calls = [], 0, 0
        if training:
            self.pooling.begin()
        with ExitStack() as stack:
            # A step that is compiled as a whole runs as it was written, once: no call inside could be looked at.
            stack.callback(uncompile_steps(self._root).remove)
            # The strategy calls a step by way of the root's own forward.
            hook = self._root.register_forward_pre_hook(self._enter_root, with_kwargs=True)
            stack.callback(hook.remove)
            if self._context.plan is not None:
                # What is split may begin inside of what is compiled.
                stack.enter_context(self._context.uncompiled())
            self._hook_submodules(stack)
            stack.callback(self._root.register_forward_hook(self._leave_root, always_call=True).remove)
            yield

    def _hook_submodules(self, stack: ExitStack) -> None:
        planned = self._context.plan is not None
        for module in self._root.modules() if planned else outermost_compiled(self._root):
            if module is self._root:
                continue
            if is_compiled_in_place(module) and not planned:
                stack.callback(call_around(module, self._enter, self._leave).remove)
                continue
            # With a plan, behind the hook that splits.
            hook = module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=not planned)
            stack.callback(hook.remove)
            stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)

    def _enter_root(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._root_calls += 1
        if self._root_calls > 1:
            self._enter(module, args, kwargs)

    def _leave_root(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._open:
            self._open.pop()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # A module that is held twice, compiled and not, has its hooks in the graph as well.
        if torch.compiler.is_compiling():
            return
        batch = self._context.split
        is_inside = any(self._open)
        self._open.append(batch is not None)
        if is_inside or batch is None:
            return
        # Ranks may call a part of the model unequally often on less than their slices, and none must wait for another.
        if self._calls < _MOST_CALLS and has_dim((args, kwargs), {*batch.layout.shares}):
            self._calls += 1
            # Calls made by the probe itself go deeper and are not looked at.
            self._probe(module, args, kwargs)
        self.pooling.follow_inputs(module, (args, kwargs), self._sizes())

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._open or torch.compiler.is_compiling():
            return
        self._open.pop()
        if not any(self._open) and self._context.split is not None:
            self.pooling.note_outputs(output, self._sizes())

    def _sizes(self) -> tuple[int, int]:
        """B and S_r."""
        batch = self._context.split
        assert batch is not None
        return batch.rows, self._context.share

    def _probe(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        batch, mesh = self._context.split, self._context.mesh
        assert batch is not None
        call = Call(module, args, kwargs, self._context.share, batch.notes.of(Beside).tensors)
        error: UlyssesError | None = None
        opened = list(self._open)
        self._suspects = {}
        try:
            error = self._verdict(call, batch)
        except UlyssesError as refusal:
            error = refusal
        except Exception as failure:
            self._context.notes.of(AttentionTally).attends_memory = False
            if mesh.rank == 0:
                warnings.warn(
                    f"{type(module).__name__} could not be checked for layers that mix tokens outside of attention: "
                    f"{failure!r}",
                    stacklevel=2,
                )
        self._open = opened
        if self._forget is not None:
            self._forget()
        answers: list[Any] = [None] * mesh.world_size
        dist.all_gather_object(answers, (error, self._suspects))
        for found, _ in answers:
            if found is not None:
                raise found
        self.pooling.follow_outputs(module, [suspects for _, suspects in answers], (batch.rows, call.share))

    def _verdict(self, call: Call, batch: LocalBatch) -> UlyssesError | None:
        """What is wrong with the call's module, if anything."""
        mesh, name = self._context.mesh, self._names.get(id(call.module), "")
        if not call.has_tokens:
            return None
        if mesh.sp_rank and call.counts_from_zero(known(batch.shards.values())):
            return _restarts(name, ("", type(call.module).__name__))
        rows = call.rows
        tokens = choose_length(call.module, min(batch.layout.shares), mesh.sp_size, rows, call.other_sizes)
        if tokens is None:
            return None
        small = call.cut(slice(0, tokens))
        changed = small.with_token(tokens // 2)
        if changed is None:
            return None
        tolerance = 1e-4 if _precise(call.module) else 2e-2
        with _unchanged(call.module), attributes_kept(self._root), torch.no_grad():
            before, after = self._record(small, None), self._record(changed, None)
            found = first_to_move(before, after, tokens // 2, tokens, rows, tolerance)
            if found is not None:
                return _mixes(name, found)
            layout = SequenceLayout(tokens, mesh.sp_size)
            span = layout.spans[mesh.sp_rank]
            training = {module: module.training for module in call.module.modules()}
            try:
                call.module.eval()
                whole, part = self._record(small, None), self._record(small.cut(span), layout)
            finally:
                for module, mode in training.items():
                    module.training = mode
            found = first_to_depend_on_place(whole, part, span, tokens, rows, 10 * tolerance)
            self._suspects = shapes_that_stay(whole, part, tokens, rows, 10 * tolerance)
        return _restarts(name, found) if found is not None else None

    def _record(self, call: Call, layout: SequenceLayout | None) -> Recording:
        """One run; with ``layout`` as this rank's share of it, else whole."""
        batch = LocalBatch(layout) if layout is not None else None
        uncompiled = torch.compiler.set_stance("force_eager")
        with uncompiled, kept_streams(self._device), self._context.tried(batch), record(call.module) as recording:
            torch.manual_seed(0)
            call.run()
        return recording


def _precise(module: nn.Module) -> bool:
    """Whether it computes in float32 or better."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return False
    return all(p.dtype in (torch.float32, torch.float64) for p in module.parameters() if p.is_floating_point())


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Puts buffers back, such as the statistics of a batch norm, and lets no cast weight be kept for the real step."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        with torch.no_grad():
            for buffer, value in buffers:
                if buffer.shape == value.shape:
                    buffer.copy_(value)


def _name(outer: str, found: tuple[str, str]) -> str:
    parts = f"{outer}.{found[0]}".split(".")
    name = ".".join(part for part in parts if part not in ("", "_orig_mod"))
    return f"{name!r} ({found[1]})" if name else found[1]


def _restarts(outer: str, found: tuple[str, str]) -> UlyssesError:
    return UlyssesError(
        f"positions that start at 0 again on every rank, first seen in {_name(outer, found)}",
        "a token's position in the whole sequence",
        "use lightning_ulysses.sequence_positions(x) in place of torch.arange(x.shape[1]); for a transformers model "
        "that numbers tokens in its own way, put position_ids into the batch; to leave the model as it is, have it "
        "split behind its positions by plan=... in the strategy",
    )


def _mixes(outer: str, found: tuple[str, str]) -> UlyssesError:
    return UlyssesError(
        "a token that changes what comes out for others outside of the attention calls that are intercepted, first in "
        f"{_name(outer, found)} or in what is computed right before it",
        "a model whose tokens meet in attention only, since every rank holds one slice of the sequence",
        "call torch.nn.functional.scaled_dot_product_attention where attention is written out by hand; else train "
        "without sequence parallelism (sp_size=1). check_model=False in the strategy switches this check off",
    )
