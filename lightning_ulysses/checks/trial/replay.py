"""Keeps what attention calls return in one run, and answers with slices of it in others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lightning_ulysses.attention.call import TokenCall
from lightning_ulysses.checks.trial.blocks import BlockFinder
from lightning_ulysses.checks.trial.outputs import Call, ModuleOutputs, Slice
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.exchange.cut_and_join import cut
from lightning_ulysses.interceptors.draw_table import Drawn
from lightning_ulysses.regions.notes import RegionSizes, split_layout

# Outputs of submodules whose gradients are compared where attention is not taken over.
_EARLY = 8


@dataclass
class Recording:
    """What one run of a step did with attention.

    Attributes:
        inputs: For each call the tensors with tokens that reached it, detached, by what messages call them.
        whats: What messages call each call.
        outputs: For each call the tensor that it returned, a leaf of the graph.
        gradients: Of the loss with respect to ``outputs``; see `differentiate`.
        loss: The loss.
        logged: Numbers that the step logged.
        returned: What the step returned.
        modules: What modules got and returned.
        around: For each call of attention the modules that ran around it.
        edges: What submodules returned that run on more than a slice, leaves of the graph.
        edge_gradients: The same for ``edges``.
        compares_modules: Whether ``modules`` are taken note of.
    """

    inputs: list[dict[str, Tensor]] = field(default_factory=list)
    whats: list[str] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    loss: Tensor | None = None
    logged: dict[str, float] = field(default_factory=dict)
    returned: Any = None
    modules: ModuleOutputs = field(default_factory=ModuleOutputs)
    around: list[tuple[Call, ...]] = field(default_factory=list)
    edges: list[Tensor] = field(default_factory=list)
    edge_gradients: list[Tensor] = field(default_factory=list)
    compares_modules: bool = True

    def note(self, call: TokenCall, answer: Any, value: Tensor | None = None) -> Any:
        """Keeps the first tensor in ``answer``, or ``value`` in its place, as a leaf."""
        self.inputs.append({name: tensor.detach() for name, tensor in call.operands.items()})
        self.whats.append(call.what)
        self.around.append(self.modules.around)
        # Dropout inside of attention draws differently in each kind of run, and what follows must not.
        _reseed(len(self.inputs), _some(call))
        leaves, spec = tree_flatten(answer)
        index = _first_tensor(leaves)
        # Outside of any graph that the caller may have switched off, so that its own grad mode decides what follows.
        leaves[index] = (leaves[index] if value is None else value).detach().requires_grad_()
        self.outputs.append(leaves[index])
        return tree_unflatten(leaves, spec)

    def differentiate(self, loss: Tensor) -> None:
        """Fills `gradients` and `edge_gradients`; those that the loss does not depend on are zero."""
        self.loss = loss.detach()
        leaves = [*self.outputs, *self.edges]
        if loss.requires_grad and leaves:
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
            found = [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, leaves, strict=True)]
            self.gradients, self.edge_gradients = found[: len(self.outputs)], found[len(self.outputs) :]

    @contextmanager
    def ending_at(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Cuts the graph behind these modules: through them, a loss of one slice depends on tokens of all."""

        def keep(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.requires_grad:
                return leaf
            self.edges.append(leaf.detach().requires_grad_())
            # A copy, since the caller may write to it.
            return self.edges[-1].clone()

        def end(module: nn.Module, args: Any, output: Any) -> Any:
            return tree_map(keep, output)

        hooks = [module.register_forward_hook(end) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


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

    def answer(self, call: TokenCall, plain: Callable[[], Any]) -> Any:
        """See `context.Trial`."""
        queries, keys = call.lengths
        if self.blocks is not None:
            operands = call.operands
            self.blocks.attends(queries, keys, operands.get("queries"), operands.get("keys"))
        self.sees_memory |= queries != keys
        before = _random_state(_some(call))
        # What is called may itself call a function that is taken over.
        with self.context.plain():
            answer = plain()
        self.draws.append(not torch.equal(before, _random_state(_some(call))))
        return self.recording.note(call, answer)


@dataclass
class Replay:
    """A trial on a slice, in which each attention call answers with its slice of what it answered on the whole.

    Args:
        context: Tells what is split at this moment.
        whole: What `Recorder` kept.
        span: The slice.
        narrowed: For each call the dimension of its output that was cut; None for one that is whole here as well.
        inside: For each call whether it is made in a submodule that runs on the whole sequence.
    """

    context: SequenceContext
    whole: Recording
    span: slice
    narrowed: list[int | None] = field(default_factory=list)
    inside: list[bool] = field(default_factory=list)
    recording: Recording = field(default_factory=Recording)

    def answer(self, call: TokenCall, plain: Callable[[], Any]) -> Any:
        """See `context.Trial`.

        Raises:
            IndexError: If the slice makes more attention calls than the whole.
            UlyssesError: If the call cannot be exchanged.
        """
        kept = self.whole.outputs[len(self.recording.outputs)].detach()
        region = self.context.split
        if region is not None and call.lengths[1] == self.context.share:
            # A mask that makes no sense on a slice is refused here, as it would be in the step.
            call.check(region)
        # To see where the sequence is in it.
        form = call.form()
        leaves, _ = tree_flatten(form)
        dim = cut_dim(kept, leaves[_first_tensor(leaves)])
        self.narrowed.append(dim)
        self.inside.append(self.context.place.is_joined)
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
        inside: For each call whether it is made in a submodule that runs on the whole sequence.
    """

    context: SequenceContext
    whole: Recording
    recording: Recording = field(default_factory=Recording)
    returned: list[Tensor] = field(default_factory=list)
    regions: list[LocalBatch | None] = field(default_factory=list)
    inside: list[bool] = field(default_factory=list)

    def cuts(self, local: LocalBatch) -> list[Slice]:
        """This rank's slices of the sequences that are split in the step of ``local``."""
        places = [region for region in self.regions if region is not None]
        layouts = [layout for region in places for layout in (region.layout, *region.others)]
        # Of regions without a call of attention as well.
        layouts = [*layouts, *local.notes.of(RegionSizes).layouts] or [split_layout(local)]
        cuts = [Slice.of(layout, local.rows, self.context.mesh.sp_rank) for layout in layouts]
        return [cut for number, cut in enumerate(cuts) if cut not in cuts[:number]]

    def slice_of(self, number: int, whole: Tensor, part: Tensor) -> Tensor:
        """This rank's slice of what a call had or returned in one process; all of it where nothing is split.

        Args:
            number: Of the call.
            whole: The tensor.
            part: The same on this rank, of the shape of a slice.
        """
        return self._slice_in(self.regions[number], whole, part)

    def _slice_in(self, region: LocalBatch | None, whole: Tensor, part: Tensor) -> Tensor:
        dim = cut_dim(whole, part)
        if region is None or dim is None:
            return whole
        return cut(whole, dim, region.layout_of(whole.shape[dim]), self.context.mesh.sp_rank)

    def note(self, call: TokenCall, answer: Any) -> Any:
        """See `context.Watch`.

        Raises:
            IndexError: If the step makes more attention calls than the whole.
        """
        kept = self.whole.outputs[len(self.returned)].detach()
        leaves, _ = tree_flatten(answer)
        own = leaves[_first_tensor(leaves)]
        region = self.context.place.region or self.context.place.hidden
        self.returned.append(own.detach())
        self.regions.append(region)
        self.inside.append(self.context.place.is_joined)
        return self.recording.note(call, answer, self._slice_in(region, kept, own))


def _some(call: TokenCall) -> Tensor:
    return next(iter(call.operands.values()))


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
