"""Keeps what attention calls return in one run, and answers with slices of it in another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_ulysses.attention.call import AttentionCall
from lightning_ulysses.checks.trial.blocks import BlockFinder
from lightning_ulysses.context import SequenceContext


@dataclass
class Recording:
    """What one run of a step did with attention.

    Attributes:
        inputs: For each call q, k and v as they reached it, detached.
        outputs: For each call the tensor that it returned, a leaf of the graph.
        gradients: Of the loss with respect to ``outputs``; see `differentiate`.
    """

    inputs: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    def note(self, call: AttentionCall, answer: Any) -> Any:
        """Makes the first tensor in ``answer`` a leaf and keeps it."""
        self.inputs.append((call.q.detach(), call.k.detach(), call.v.detach()))
        leaves, spec = tree_flatten(answer)
        index = next(place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        # Outside of any graph that the caller may have switched off, so that its own grad mode decides what follows.
        leaves[index] = leaves[index].detach().requires_grad_()
        self.outputs.append(leaves[index])
        return tree_unflatten(leaves, spec)

    def differentiate(self, loss: Tensor) -> None:
        """Fills `gradients`; those that the loss does not depend on are zero."""
        if loss.requires_grad and self.outputs:
            found = torch.autograd.grad(loss, self.outputs, allow_unused=True)
            pairs = zip(found, self.outputs, strict=True)
            self.gradients = [torch.zeros_like(out) if grad is None else grad for grad, out in pairs]


@dataclass
class Recorder:
    """A trial in which attention is real.

    Args:
        context: Tells what is split at this moment.
        blocks: Is told of each attention call.
    """

    context: SequenceContext
    blocks: BlockFinder | None = None
    recording: Recording = field(default_factory=Recording)

    def answer(self, call: AttentionCall, plain: Callable[[], Any]) -> Any:
        """See `context.Trial`."""
        if self.blocks is not None:
            self.blocks.attends()
        # What is called may itself call a function that is taken over.
        with self.context.plain():
            answer = plain()
        return self.recording.note(call, answer)


@dataclass
class Replay:
    """A trial on a slice, in which each attention call answers with its slice of what it answered on the whole.

    Args:
        whole: What `Recorder` kept.
        span: The slice.
        narrowed: For each call the dimension of its output that was cut; None for one that is whole here as well.
    """

    whole: Recording
    span: slice
    narrowed: list[int | None] = field(default_factory=list)
    recording: Recording = field(default_factory=Recording)

    def answer(self, call: AttentionCall, plain: Callable[[], Any]) -> Any:
        """See `context.Trial`.

        Raises:
            IndexError: If the slice makes more attention calls than the whole.
        """
        kept = self.whole.outputs[len(self.recording.outputs)].detach()
        # (B, H, S_r, D_v) in the caller's own form, to see where the sequence is in it.
        form = call.write(call.q.new_empty(*call.q.shape[:-1], call.v.shape[-1]))
        leaves, spec = tree_flatten(form)
        index = next(place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        dims = [dim for dim in range(kept.dim()) if kept.shape[dim] != leaves[index].shape[dim]]
        dim = dims[0] if dims else None
        self.narrowed.append(dim)
        leaves[index] = narrowed(kept, dim, self.span)
        return self.recording.note(call, tree_unflatten(leaves, spec))


def narrowed(tensor: Tensor, dim: int | None, span: slice) -> Tensor:
    """The slice ``span`` along ``dim``."""
    return tensor if dim is None else tensor.narrow(dim, span.start, span.stop - span.start)
