"""Keeps what attention calls return in one run, and answers with slices of it in others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_ulysses.attention.call import AttentionCall
from lightning_ulysses.checks.trial.blocks import BlockFinder
from lightning_ulysses.checks.trial.outputs import ModuleOutputs
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.interceptors.draw_table import Drawn

# Outputs of submodules whose gradients are compared where attention is not taken over.
_EARLY = 8


@dataclass
class Recording:
    """What one run of a step did with attention.

    Attributes:
        inputs: For each call q, k and v as they reached it, detached.
        outputs: For each call the tensor that it returned, a leaf of the graph.
        gradients: Of the loss with respect to ``outputs``; see `differentiate`.
        loss: The loss.
        logged: Numbers that the step logged.
        returned: What the step returned.
        modules: What modules returned.
    """

    inputs: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    loss: Tensor | None = None
    logged: dict[str, float] = field(default_factory=dict)
    returned: Any = None
    modules: ModuleOutputs = field(default_factory=ModuleOutputs)

    def note(self, call: AttentionCall, answer: Any, value: Tensor | None = None) -> Any:
        """Keeps the first tensor in ``answer``, or ``value`` in its place, as a leaf."""
        self.inputs.append((call.q.detach(), call.k.detach(), call.v.detach()))
        # Dropout inside of attention draws differently in each kind of run, and what follows must not.
        _reseed(len(self.inputs), call.q)
        leaves, spec = tree_flatten(answer)
        index = _first_tensor(leaves)
        # Outside of any graph that the caller may have switched off, so that its own grad mode decides what follows.
        leaves[index] = (leaves[index] if value is None else value).detach().requires_grad_()
        self.outputs.append(leaves[index])
        return tree_unflatten(leaves, spec)

    def differentiate(self, loss: Tensor) -> None:
        """Fills `gradients`; those that the loss does not depend on are zero."""
        self.loss = loss.detach()
        if loss.requires_grad and self.outputs:
            found = torch.autograd.grad(loss, self.outputs, allow_unused=True)
            pairs = zip(found, self.outputs, strict=True)
            self.gradients = [torch.zeros_like(out) if grad is None else grad for grad, out in pairs]


@contextmanager
def early_outputs(root: nn.Module, found: list[Tensor]) -> Iterator[None]:
    """Adds to ``found`` the first tensors that submodules return and a loss may depend on."""

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad and output.dim() > 1 and len(found) < _EARLY:
            found.append(output)

    handles = [module.register_forward_hook(keep) for module in root.modules() if module is not root]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Recorder:
    """A trial in which attention is real.

    Args:
        context: Tells what is split at this moment.
        blocks: Is told of each attention call.
        draws: For each call whether it drew random numbers, so that it would return something else again.
        drawn: What the step drew by itself; see `interceptors.draw_table`.
        sees_memory: Whether some call had more or fewer keys than queries.
    """

    context: SequenceContext
    blocks: BlockFinder | None = None
    recording: Recording = field(default_factory=Recording)
    draws: list[bool] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    sees_memory: bool = False

    @property
    def callers(self) -> list[str]:
        """For each call of attention the name of the module that made it, where blocks are told."""
        return self.blocks.callers if self.blocks is not None else []

    def answer(self, call: AttentionCall, plain: Callable[[], Any]) -> Any:
        """See `context.Trial`."""
        if self.blocks is not None:
            self.blocks.attends(call.q.shape[-2], call.k.shape[-2])
        self.sees_memory |= call.q.shape[-2] != call.k.shape[-2]
        before = _random_state(call.q)
        # What is called may itself call a function that is taken over.
        with self.context.plain():
            answer = plain()
        self.draws.append(not torch.equal(before, _random_state(call.q)))
        return self.recording.note(call, answer)


@dataclass
class Replay:
    """A trial on a slice, in which each attention call answers with its slice of what it answered on the whole.

    Args:
        context: Tells what is split at this moment.
        whole: What `Recorder` kept.
        span: The slice.
        narrowed: For each call the dimension of its output that was cut; None for one that is whole here as well.
    """

    context: SequenceContext
    whole: Recording
    span: slice
    narrowed: list[int | None] = field(default_factory=list)
    recording: Recording = field(default_factory=Recording)

    def answer(self, call: AttentionCall, plain: Callable[[], Any]) -> Any:
        """See `context.Trial`.

        Raises:
            IndexError: If the slice makes more attention calls than the whole.
            UlyssesError: If the call cannot be exchanged.
        """
        kept = self.whole.outputs[len(self.recording.outputs)].detach()
        region = self.context.split
        if region is not None and call.k.shape[-2] == self.context.share:
            # A mask that makes no sense on a slice is refused here, as it would be in the step.
            call.meaning(region, None)
        # (B, H, S_r, D_v) in the caller's own form, to see where the sequence is in it.
        form = call.write(call.q.new_empty(*call.q.shape[:-1], call.v.shape[-1]))
        leaves, _ = tree_flatten(form)
        dim = cut_dim(kept, leaves[_first_tensor(leaves)])
        self.narrowed.append(dim)
        return self.recording.note(call, form, narrowed(kept, dim, self.span))


@dataclass
class Rehearsal:
    """A watch on a step that is really split: attention is exchanged, and parts of the model are joined.

    The step goes on with slices of what `Recorder` kept, so that each call is compared by itself.

    Args:
        context: Tells what is split at this moment.
        whole: What `Recorder` kept.
        returned: What the calls themselves returned.
        regions: For each call the batch that is split there; None where nothing is.
    """

    context: SequenceContext
    whole: Recording
    recording: Recording = field(default_factory=Recording)
    returned: list[Tensor] = field(default_factory=list)
    regions: list[LocalBatch | None] = field(default_factory=list)

    @property
    def spans(self) -> list[slice | None]:
        """For each call this rank's slice of the sequence; None where nothing is split."""
        rank = self.context.mesh.sp_rank
        return [None if region is None else region.layout.spans[rank] for region in self.regions]

    def note(self, call: AttentionCall, answer: Any) -> Any:
        """See `context.Watch`.

        Raises:
            IndexError: If the step makes more attention calls than the whole.
        """
        kept = self.whole.outputs[len(self.returned)].detach()
        leaves, _ = tree_flatten(answer)
        own = leaves[_first_tensor(leaves)]
        region = self.context.place.region or self.context.place.hidden
        span = None if region is None else region.layout.spans[self.context.mesh.sp_rank]
        self.returned.append(own.detach())
        self.regions.append(region)
        return self.recording.note(call, answer, kept if span is None else narrowed(kept, cut_dim(kept, own), span))


def _first_tensor(leaves: list[Any]) -> int:
    return next(place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor))


def _random_state(like: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(like.device) if like.is_cuda else torch.get_rng_state()


def _reseed(number: int, like: Tensor) -> None:
    torch.default_generator.manual_seed(number)
    if like.is_cuda:
        with torch.cuda.device(like.device):
            torch.cuda.manual_seed(number)


def cut_dim(whole: Tensor, part: Tensor) -> int | None:
    """The dimension along which ``part`` is a slice of ``whole``; None if it is all of it."""
    dims = (dim for dim in range(min(whole.dim(), part.dim())) if whole.shape[dim] != part.shape[dim])
    return next(dims, None)


def narrowed(tensor: Tensor, dim: int | None, span: slice) -> Tensor:
    """The slice ``span`` along ``dim``."""
    return tensor if dim is None else tensor.narrow(dim, span.start, span.stop - span.start)
