"""The trial: runs a model on a few tokens and refuses it if tokens mix outside of intercepted attention.

In the first step, the model runs on a few tokens. Every intercepted attention call is replaced by a stand-in that keeps
tokens apart. Two tests follow. If one token is changed, the outputs of all other tokens must stay the same. If only
some of the tokens run, with their true positions, their outputs must be the same as among all tokens. Outputs without a
sequence dimension need another check, see `pooling`.
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
from lightning_ulysses.attention.stand_in import KeepApart
from lightning_ulysses.batch.random_streams import kept_streams
from lightning_ulysses.checks.probing.attributes import attributes_kept, generators_kept
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

# Module calls of a step that are tried; a step may call its model many times.
_MOST_CALLS = 64


class ModelProbe:
    """Tries the outermost module calls of the first training step and of the first evaluation step.

    Args:
        context: Tells what is split at this moment.
        root: The user's LightningModule.
        device: The device of the model.
        forget: Called after each trial. ZeRO-3 records the order of module calls, and must forget those of the trial.
        enabled: Whether anything is tried.
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
        self._stand_in = KeepApart(context.notes.of(AttentionTally))
        self._forget = forget
        self._context = context
        self._root = root
        self._names = {id(module): name for name, module in root.named_modules()}
        #: Modes (`Module.training`) that need no trial any more.
        self.done: set[bool] = set() if enabled and context.mesh.sp_size > 1 else {False, True}
        # The stack of running module calls: for each, whether something was split when it began.
        self._open: list[bool] = []
        self._calls = 0
        self._suspects: Suspects = {}
        self.pooling = PoolingWatch(context.mesh, root)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Tries the calls of the step that runs inside; once for each mode, training or evaluation."""
        training = self._root.training
        self.done.add(training)
        self._open, self._calls, self._root_calls = [], 0, 0
        if training:
            self.pooling.begin()
        with ExitStack() as stack:
            # A step compiled as a whole runs uncompiled this once: its inner calls could not be observed otherwise.
            stack.callback(uncompile_steps(self._root).remove)
            # The strategy calls a step through the forward of the root, so the root's first call is the step itself.
            hook = self._root.register_forward_pre_hook(self._enter_root, with_kwargs=True)
            stack.callback(hook.remove)
            if self._context.plan is not None:
                # With a plan, a region may begin inside a compiled part.
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
            # With a plan, after the hook that splits the inputs. Otherwise before all hooks of the user.
            hook = module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=not planned)
            stack.callback(hook.remove)
            stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)

    def _enter_root(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._root_calls += 1
        # A later call is one of `self(x)` inside the step.
        if self._root_calls > 1:
            self._enter(module, args, kwargs)

    def _leave_root(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._open:
            self._open.pop()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # A module may be held both compiled and plain. Then its hooks run in the graph as well.
        if torch.compiler.is_compiling():
            return
        batch = self._context.split
        is_inside = any(self._open)
        self._open.append(batch is not None)
        if is_inside or batch is None:
            return
        # A trial is a collective. On parts of a slice, ranks may call a module unequally often (experts): a deadlock.
        if self._calls < _MOST_CALLS and has_dim((args, kwargs), {*batch.layout.shares}):
            self._calls += 1
            # Calls inside the trial are not outermost (`is_inside`), so they are not tried again.
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
            # Errors are collected from all ranks below, so that all of them raise together.
            error = self._verdict(call, batch)
        except UlyssesError as refusal:
            error = refusal
        except Exception as failure:
            # A trial that failed has not shown that keys of another length are a memory.
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
        """The error for the module of ``call``, or None if it can be split."""
        mesh, name = self._context.mesh, self._names.get(id(call.module), "")
        if not call.has_tokens:
            return None
        # On rank 0 positions that begin at 0 are right.
        if mesh.sp_rank and call.counts_from_zero(known(batch.shards.values())):
            return _restarts(name, ("", type(call.module).__name__))
        rows = call.rows
        # Bounded by the smallest share, so that all ranks choose the same length.
        tokens = choose_length(call.module, min(batch.layout.shares), mesh.sp_size, rows, call.other_sizes)
        if tokens is None:
            return None
        small = call.cut(slice(0, tokens))
        changed = small.with_token(tokens // 2)
        if changed is None:
            return None
        # Runs of different lengths round differently, so the comparisons of `whole` and `part` allow ten times as much.
        tolerance = 1e-4 if computes_precisely(call.module) else 2e-2
        with _unchanged(call.module), attributes_kept(self._root), torch.no_grad():
            before, after = self._record(small, None), self._record(changed, None)
            found = first_to_move(before, after, tokens // 2, tokens, rows, tolerance)
            if found is not None:
                return _mixes(name, found)
            layout = SequenceLayout(tokens, mesh.sp_size)
            span = layout.spans[mesh.sp_rank]
            training = {module: module.training for module in call.module.modules()}
            try:
                # Without dropout, whose masks would differ between the two runs.
                call.module.eval()
                whole, part = self._record(small, None), self._record(small.cut(span), layout)
            finally:
                for module, mode in training.items():
                    module.training = mode
            found = first_to_depend_on_place(whole, part, span, tokens, rows, 10 * tolerance)
            self._suspects = shapes_that_stay(whole, part, tokens, rows, 10 * tolerance)
        return _restarts(name, found) if found is not None else None

    def _record(self, call: Call, layout: SequenceLayout | None) -> Recording:
        """One run of the trial. With ``layout``, ``call`` is this rank's slice of it, else it is whole."""
        batch = LocalBatch(layout) if layout is not None else None
        uncompiled = torch.compiler.set_stance("force_eager")
        with (
            uncompiled,
            kept_streams(self._device),
            generators_kept(self._root),
            self._context.tried(self._stand_in, batch, is_probed=True),
            record(call.module) as recording,
        ):
            # The same random numbers in every run, so that only the changed tokens differ.
            torch.manual_seed(0)
            call.run()
        return recording


def computes_precisely(module: nn.Module) -> bool:
    """Whether the module computes in float32 or float64."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return False
    return all(p.dtype in (torch.float32, torch.float64) for p in module.parameters() if p.is_floating_point())


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Restores buffers, such as the statistics of a batch norm, and keeps autocast from caching weights."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    # Weights that autocast casts under no_grad and keeps would have no gradient in the real step.
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
