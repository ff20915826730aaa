"""Softcap, sinks and ALiBi by one kernel of a GPU; a stand-in computes what the blocks of its mask say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from gpu_paths import Flex, gpu_paths
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ulysses.attention import MaskSpec, attend
from lightning_ulysses.attention import fused_extras as module
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.attention.kernel_report import KernelReport
from lightning_ulysses.attention.visible_blocks import visible_keys
from lightning_ulysses.context import LocalBatch, SequenceContext, activate
from lightning_ulysses.exchange.mesh import ALONE
from lightning_ulysses.geometry.layout import SequenceLayout, runs_from_starts

S = 100

SPECS = {
    "causal": MaskSpec(True),
    "full": MaskSpec(False),
    "window": MaskSpec(True, window=20),
    "window ahead": MaskSpec(False, window=20, ahead=7),
    "documents": MaskSpec(True, documents=(((0, 1), (1, 40), (40, S)), ((0, 70), (70, S)))),
    "documents in a window": MaskSpec(True, window=9, documents=(((0, 33), (33, S)),) * 2),
    "padding": MaskSpec(True, valid=(((0, 60),), ((30, S),))),
    "padding behind the end": MaskSpec(False, num_padding=3),
    "chunks": MaskSpec(True, chunk=24),
}


def slopes(heads: int) -> Tensor:
    return torch.linspace(0.1, 0.5, heads, dtype=torch.float64)


def extras(name: str, heads: int) -> Extras:
    sinks = torch.linspace(-1, 1, heads, dtype=torch.float64).requires_grad_()
    return {
        "softcap": Extras(softcap=1.5),
        "sinks": Extras(sinks=sinks),
        "ALiBi": Extras(alibi_slopes=slopes(heads)),
        "all": Extras(1.5, sinks, slopes(heads)),
    }[name]


@pytest.fixture
def flex() -> Iterator[Flex]:
    with gpu_paths() as (_, sdpa), mock.patch("lightning_ulysses.attention.visible_blocks._BLOCK", 16):
        yield sdpa.flex


def results(spec: MaskSpec, given: Extras, heads: int = 4, kv_heads: int = 2, **settings: Any) -> list[Tensor]:
    """The output, and the gradients of q, k, v and sinks."""
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(2, number, S, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for number in (heads, kv_heads, kv_heads)
    ]
    out = attend(*leaves, spec, extras=given, **settings)
    if given.sinks is not None and given.sinks.requires_grad:
        leaves.append(given.sinks)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    # What the package has added at the end is never looked at.
    upstream[:, :, S - spec.num_padding :] = 0
    return [out[:, :, : S - spec.num_padding], *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("name", ["softcap", "sinks", "ALiBi", "all"])
@pytest.mark.parametrize("kind", SPECS)
def test_as_by_the_formula(kind: str, name: str, flex: Flex) -> None:
    found = results(SPECS[kind], extras(name, 4), scale=0.3)
    # Once to be tried, and once for the call.
    assert [shape[2] for shape in flex.calls] == [200, S]
    with mock.patch("lightning_ulysses.attention.device.is_gpu", return_value=False):
        wanted = results(SPECS[kind], extras(name, 4), scale=0.3)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("heads", "kv_heads", "groups"), [(6, 2, 6), (5, 5, 5), (4, 1, 4)])
def test_groups_of_heads(heads: int, kv_heads: int, groups: int, flex: Flex) -> None:
    found = results(SPECS["documents"], extras("all", heads), heads, kv_heads)
    assert flex.calls[-1][1] == groups
    flex.calls.clear()
    with mock.patch.object(module._KNOWN, "reason", return_value="by the formula"):
        wanted = results(SPECS["documents"], extras("all", heads), heads, kv_heads)
    assert not flex.calls
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.fixture
def live() -> Iterator[SequenceContext]:
    """A step on two rows."""
    context = SequenceContext(ALONE)
    activate(context)
    with context.step(LocalBatch(SequenceLayout(S, 1), rows=2)):
        yield context
    activate(None)


def test_what_is_seen_is_built_once_for_each_batch(live: SequenceContext, flex: Flex) -> None:
    with mock.patch.object(module, "visible_keys", wraps=visible_keys) as built:
        for _ in range(3):
            results(SPECS["causal"], extras("softcap", 4))
            results(SPECS["window"], extras("softcap", 4))
    # And once for the try.
    assert built.call_count == 3


class Wrong(Flex):
    """A kernel that forgets the function of the scores."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, score_mod: Any, *rest: Any, **settings: Any) -> Any:
        return super().__call__(q, k, v, None, *rest, **settings)


class Failing(Flex):
    """A kernel that does not compile."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        raise RuntimeError("no Triton")


@pytest.mark.parametrize(
    ("kernel", "given", "said"),
    [
        (Wrong, Extras(1.5), "is off by"),
        # Of random numbers, such a cap and such slopes change next to nothing.
        (Wrong, Extras(50.0), "is off by"),
        (Wrong, Extras(alibi_slopes=1e-4 * slopes(4)), "is off by"),
        (Failing, Extras(1.5), "RuntimeError: no Triton"),
    ],
)
def test_a_kernel_that_is_wrong_is_not_used(
    kernel: type[Flex], given: Extras, said: str, live: SequenceContext
) -> None:
    notes: list[str] = []
    live.notes.of(KernelReport).say = notes.append
    with gpu_paths() as (_, sdpa):
        sdpa.flex = kernel()
        found = results(SPECS["causal"], given)
        tried = len(sdpa.flex.calls)
        results(SPECS["window"], given)
        assert len(sdpa.flex.calls) == tried
    wanted = results(SPECS["causal"], given)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert said in notes[0] and "its formula" in notes[0]


class Watch(TorchDispatchMode):
    """Looks on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("given", "settings", "mode"),
    [
        (Extras(1.5), {"dropout_p": 1e-9}, nullcontext),
        (Extras(alibi_slopes=slopes(4).requires_grad_()), {}, nullcontext),
        (Extras(1.5), {"bias": torch.zeros(1, 1, S, S, dtype=torch.float64)}, nullcontext),
        # A compiled kernel is not seen by what looks on, and would not be compiled there.
        (Extras(1.5), {}, Watch),
    ],
)
def test_what_goes_by_the_formula(given: Extras, settings: dict[str, Any], mode: Any, flex: Flex) -> None:
    with mode():
        results(MaskSpec(True), given, **settings)
    assert not flex.calls


def test_tried_once_for_a_kind_and_drawing_nothing(flex: Flex) -> None:
    state = torch.get_rng_state()
    for _ in range(3):
        results(MaskSpec(True), extras("softcap", 4))
    assert len(flex.calls) == 4 and torch.equal(torch.get_rng_state(), state)
    results(MaskSpec(True), extras("sinks", 4))
    assert len(flex.calls) == 6


@given(
    st.sets(st.integers(1, 59), max_size=5),
    st.sets(st.integers(1, 59), max_size=4),
    st.booleans(),
    st.none() | st.tuples(st.integers(0, 30), st.integers(0, 30)),
)
def test_blocks_hold_what_is_seen(cuts: set[int], gaps: set[int], causal: bool, reach: tuple[int, int] | None) -> None:
    length, size = 60, 8
    valid = tuple(run for number, run in enumerate(runs_from_starts(sorted({0, *gaps}), length)) if number % 2 == 0)
    row = runs_from_starts(sorted({0, *cuts}), length), valid if gaps else None
    with mock.patch("lightning_ulysses.attention.visible_blocks._BLOCK", size):
        keys = visible_keys([row], 1, length, causal, reach, torch.device("cpu"))
        some, whole = (blocks[0, 0] for blocks in keys.blocks)
    place = torch.arange(length)
    # (S, S), by the definition
    number = torch.bucketize(place, torch.tensor(sorted(cuts)), right=True) if cuts else torch.zeros_like(place)
    distance = place[:, None] - place
    dense = (number[:, None] == number) & keys.kept[0]
    dense &= distance >= 0 if causal else True
    if reach is not None:
        dense &= (distance <= reach[0]) & (distance >= -reach[1])
    padded = torch.nn.functional.pad(dense, (0, 4, 0, 4))
    # (S, S) -> (n, n), whether any pair and whether all pairs of two blocks are seen
    tiles = padded.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2).flatten(2)
    assert torch.equal(whole, tiles.all(2))
    assert bool(((some | whole) >= tiles.any(2)).all()) and not bool((some & whole).any())
    # With one run of keys a block of queries takes no block too many at the ends of its own run.
    if not cuts and not gaps and reach is None:
        assert torch.equal(some | whole, tiles.any(2))
