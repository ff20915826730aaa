"""Refuses a model that pools tokens on the way to the loss: the pooling would see one rank's slice only.

A pooled tensor (a mean over tokens, or the first or last token) has no sequence dimension in which tokens could be
compared. But it is recognized from two runs, on all tokens and on a part of them: its shape is the same and its values
differ. Tokens that a router or a mask selects are no pooling, since there are fewer of them in a part. Only tensors
that get a gradient are refused, because encoders often have a pooled output that nothing uses.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_ulysses.checks.probing.compiled import is_compiled_in_place, outermost_compiled
from lightning_ulysses.checks.probing.recording import Recording, differs, tensors_in, token_dim
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.patching.handle import Handle

# (name of the submodule, number of its call, number of the tensor in its output) -> whether the values differ.
Suspects = dict[tuple[str, int, int], bool]

# Names of autograd nodes that cut tokens into chunks (as a chunked loss does), and of views.
_CUTS = ("Slice", "Split", "UnsafeSplit")
_VIEWS = (*_CUTS, "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Clone", "Transpose", "Permute", "T")


def shapes_that_stay(whole: Recording, part: Recording, tokens: int, rows: int, tolerance: float) -> Suspects:
    """Outputs without a sequence dimension that have the same shape in both runs, and whether their values differ.

    Args:
        whole: A run on all tokens.
        part: A run on some of these tokens, with their true positions.
        tokens: Number of tokens in the first run.
        rows: B.
        tolerance: The largest difference that counts as equal, relative to the largest entry.
    """
    by_name: defaultdict[str, list[list[Tensor]]] = defaultdict(list)
    for name, _, tensors in part.outputs:
        by_name[name].append(tensors)
    calls = Counter(name for name, _, _ in whole.outputs)
    seen: Counter[str] = Counter()
    suspects: Suspects = {}
    for name, _, tensors in whole.outputs:
        number, seen[name] = seen[name], seen[name] + 1
        # A submodule that runs a different number of times cannot be compared call by call, such as an expert.
        if calls[name] != len(by_name[name]):
            continue
        for index, (one, other) in enumerate(zip(tensors, by_name[name][number], strict=False)):
            if not _is_number(one) and one.shape == other.shape and token_dim(one, tokens, rows) is None:
                suspects[name, number, index] = differs(one, other, tolerance)
    return suspects


@dataclass
class Candidate:
    """A pooled tensor, and whether a gradient has reached it.

    Args:
        name: Name of the submodule that returned the tensor or got it as input.
        kind: Class of that submodule.
        shape: Shape of the tensor.
        given: Whether the tensor is an input of the submodule.
        reached: Whether the tensor contributes to the loss.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    given: bool
    reached: bool = False

    @property
    def key(self) -> tuple[str, str, tuple[int, ...], bool]:
        """The part that must be equal on all ranks of a group."""
        return self.name, self.kind, self.shape, self.given


class PoolingWatch:
    """Watches pooled tensors of the first training step, until its backward shows which of them reach the loss.

    Args:
        mesh: Sizes and groups.
        root: The user's LightningModule.
    """

    def __init__(self, mesh: SequenceMesh, root: nn.Module) -> None:
        self._mesh = mesh
        self._names = {id(module): name for name, module in root.named_modules()}
        # A hook on any other submodule would break a compiled graph.
        self._reachable = {module for module in outermost_compiled(root) if not is_compiled_in_place(module)}
        self._handle = Handle()
        self._candidates: list[Candidate] = []
        # Autograd nodes of tensors (B, S_r, ...) that submodules returned.
        self._of_tokens: set[Node] = set()
        # The module whose output `note_outputs` has to look at, if that module itself pools.
        self._outer: nn.Module | None = None
        self.is_open = False

    def begin(self) -> None:
        """Starts watching a training step. Every rank must do so."""
        self._close()
        self.is_open = True

    def _close(self) -> None:
        self._handle.remove()
        self._handle, self._candidates, self._of_tokens, self.is_open = Handle(), [], set(), False

    def follow_outputs(self, module: nn.Module, suspects: Sequence[Suspects], sizes: tuple[int, int]) -> None:
        """Registers hooks on the submodules that pool, for the following call of ``module``.

        Args:
            module: The module that is about to be called.
            suspects: The results of `shapes_that_stay` on all ranks.
            sizes: B and S_r.
        """
        if not self.is_open:
            return
        names: dict[str, None] = {}
        for first in range(0, len(suspects), self._mesh.sp_size):
            group = suspects[first : first + self._mesh.sp_size]
            # All ranks of a group have the pooled output. One of them may see no difference: it has the first token.
            shared = [key for key in group[0] if all(key in other for other in group)]
            names |= {key[0]: None for key in shared if any(other[key] for other in group)}
        for part in (module.get_submodule(name) for name in names):
            if part is module:
                # Without a hook, since a module compiled in place can have none: `note_outputs` handles it.
                self._outer = module
                continue
            if part not in self._reachable:
                continue

            def watch(part: nn.Module, args: Any, output: Any) -> None:
                self._follow_pooled(output, part, sizes)

            self._handle.add(part.register_forward_hook(watch).remove)

    def follow_inputs(self, module: nn.Module, inputs: Any, sizes: tuple[int, int]) -> None:
        """Watches inputs of one vector for each row that the step itself made from outputs of submodules."""
        if not self.is_open:
            return
        for tensor in tensors_in(inputs):
            if _one_per_row(tensor, *sizes) and self._comes_from_tokens(tensor):
                self._follow(tensor, module, given=True)

    def note_outputs(self, output: Any, sizes: tuple[int, int]) -> None:
        """Remembers the outputs that a submodule returned to the step."""
        if not self.is_open:
            return
        if self._outer is not None:
            self._follow_pooled(output, self._outer, sizes)
            self._outer = None
        found = (tensor.grad_fn for tensor in tensors_in(output) if _leads_with_tokens(tensor, *sizes))
        self._of_tokens |= {node for node in found if node is not None}

    def _follow_pooled(self, output: Any, module: nn.Module, sizes: tuple[int, int]) -> None:
        for tensor in tensors_in(output):
            if not _is_number(tensor) and not _has_tokens(tensor, *sizes):
                self._follow(tensor, module, given=False)

    def _follow(self, tensor: Tensor, module: nn.Module, given: bool) -> None:
        # Without a gradient it cannot reach the loss.
        if not tensor.requires_grad:
            return
        name = self._names.get(id(module), "")
        candidate = Candidate(name, type(module).__name__, tuple(tensor.shape), given)
        self._candidates.append(candidate)

        def arrived(grad: Tensor) -> None:
            candidate.reached = True

        self._handle.add(tensor.register_hook(arrived).remove)

    def _comes_from_tokens(self, tensor: Tensor) -> bool:
        # A returned tensor itself, or a chunk of one, is not pooled.
        if tensor.grad_fn is None or tensor.grad_fn in self._of_tokens:
            return False
        if _is_run(tensor.grad_fn, self._of_tokens):
            return False
        # Searches the autograd graph backwards for an output with tokens.
        nodes, seen = [tensor.grad_fn], {tensor.grad_fn}
        while nodes:
            node = nodes.pop()
            if node in self._of_tokens:
                return True
            following = {other for other, _ in node.next_functions if other is not None} - seen
            seen |= following
            nodes.extend(following)
        return False

    def settle(self) -> None:
        """Refuses pooled tensors that the first backward has reached; a collective, but only once.

        Raises:
            UlyssesError: On every rank.
        """
        if not self.is_open:
            return
        mine = [candidate.key for candidate in self._candidates if candidate.reached]
        self._close()
        everyone: list[Any] = [None] * self._mesh.world_size
        dist.all_gather_object(everyone, mine)
        for first in range(0, len(everyone), self._mesh.sp_size):
            group = everyone[first : first + self._mesh.sp_size]
            for key in group[0]:
                # Refused only if every rank of the group pooled the tensor and got a gradient for it.
                if all(key in other for other in group):
                    raise _pools(*key)


def _is_number(tensor: Tensor) -> bool:
    """Whether the shape is () or (1,), as of a loss."""
    return tensor.dim() == 0 or tensor.shape == (1,)


def _has_tokens(tensor: Tensor, rows: int, share: int) -> bool:
    return share in tensor.shape or (tensor.dim() > 0 and tensor.shape[0] == rows * share)


def _leads_with_tokens(tensor: Tensor, rows: int, share: int) -> bool:
    """Whether the shape is (B, S_r, ...), (B * S_r, ...) or (S_r, ...)."""
    return tensor.shape[:2] == (rows, share) or (tensor.dim() > 0 and tensor.shape[0] in (share, rows * share))


def _one_per_row(tensor: Tensor, rows: int, share: int) -> bool:
    """Whether the shape is (B, width) or (B, 1, width)."""
    if tensor.dim() < 2 or _has_tokens(tensor, rows, share):
        return False
    return tensor.shape[0] == rows and tensor.numel() == rows * tensor.shape[-1]


def _is_run(node: Node, of_tokens: set[Node]) -> bool:
    """Whether only cuts and views lie between an output with tokens and ``node``, with at least one cut."""
    cut = False
    while node not in of_tokens:
        # Autograd names its nodes after the operation, such as "SliceBackward0".
        name = node.name().removesuffix("Backward0").removesuffix("Backward1")
        following = [other for other, _ in node.next_functions if other is not None]
        if name.removesuffix("WithSizes") not in _VIEWS or len(following) != 1:
            return False
        cut |= name.startswith(_CUTS)
        node = following[0]
    return cut


def _pools(name: str, kind: str, shape: tuple[int, ...], given: bool) -> UlyssesError:
    # "_orig_mod" is the name that torch.compile gives to the module inside its wrapper.
    clean = ".".join(part for part in name.split(".") if part not in ("", "_orig_mod"))
    module = f"{clean!r} ({kind})" if clean else kind
    what = f"a tensor of shape {shape} without a dimension of tokens"
    return UlyssesError(
        f"{what} that is made from this rank's tokens, {'given to' if given else 'returned by'} {module}, and that "
        "contributes to the loss",
        "a loss on what each token gives by itself, since a mean over tokens, or the first or last of them, is taken "
        "from one rank's slice only",
        "train a model that pools its tokens without sequence parallelism (sp_size=1). check_model=False in the "
        "strategy switches this check off",
    )
