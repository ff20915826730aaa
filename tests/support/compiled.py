"""Models compiled by hand, and the operators of their graphs."""

from __future__ import annotations

from typing import Any

from models import HandWritten, pair_batch
from torch import Tensor

from lightning_ulysses.testing import StepResult

PAIRS = [pair_batch(seed, 32 + seed % 2, 2, "uneven") for seed in range(2)]


# Every operator in the graphs that were compiled in this process, forward and backward.
OPERATORS: list[str] = []


def watched(graph: Any, inputs: Any) -> Any:
    """A backend that runs graphs as they are, as ``aot_eager`` does, and notes what is in them."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def note(traced: Any, inputs: Any) -> Any:
        OPERATORS.extend(str(node.target) for node in traced.graph.nodes if node.op == "call_function")
        return make_boxed_func(traced.forward)

    return aot_autograd(fw_compiler=note, bw_compiler=note)(graph, inputs)


class CompiledByHand(HandWritten):
    def __init__(self, how: str, backend: Any = watched, **kwargs: Any) -> None:
        super().__init__(lr=0.2, **kwargs)
        for block in self.blocks if how == "blocks" else self.blocks[:1]:
            block.compile(backend=backend)


def named_as(result: StepResult, reference: StepResult) -> StepResult:
    """``result`` without what ``torch.compile`` adds to names."""

    def plain(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace("_orig_mod.", ""): value for name, value in values.items()}

    assert set(plain(result.before)) == set(reference.before)
    return StepResult(result.losses, result.grad_norms, plain(result.before), plain(result.after))
