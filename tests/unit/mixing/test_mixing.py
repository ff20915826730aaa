"""Scans and convolutions on slices against the same on the whole sequence, by stand-ins with the kernels' arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import scans
import torch
import torch.distributed as dist
from nightly import mostly
from torch import Tensor

from lightning_ulysses import UlyssesError
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.mixing.call import MixerCall, as_given, by_heads
from lightning_ulysses.mixing.exchange import exchanged
from lightning_ulysses.mixing.table import TABLE
from lightning_ulysses.testing.processes import ProcessPool

EDGES = (0, 5, 13, 14)


@dataclass(frozen=True)
class Case:
    """A call of one function.

    Attributes:
        name: The function.
        sequence: Shapes of what carries tokens, S for the sequence.
        parameters: Shapes of what belongs to heads.
        settings: Other arguments.
        documents: Whether rows hold documents, told by edges or by numbers.
        last: Whether channels are last in memory.
    """

    name: str
    sequence: dict[str, tuple[Any, ...]]
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    documents: str = ""
    last: bool = False


def gated(keys: int, values: int, rows: int = 2) -> dict[str, tuple[Any, ...]]:
    shapes: dict[str, tuple[Any, ...]] = dict.fromkeys("qk", (rows, "S", keys, 4))
    return {**shapes, "v": (rows, "S", values, 6), "g": (rows, "S", values), "beta": (rows, "S", values)}


def space(heads: int, groups: int) -> dict[str, tuple[Any, ...]]:
    return {
        "x": (2, "S", heads, 3),
        "dt": (2, "S", heads),
        "B": (2, "S", groups, 5),
        "C": (2, "S", groups, 5),
    }


def selective(channels: int, *shape: Any) -> dict[str, tuple[Any, ...]]:
    every: dict[str, tuple[Any, ...]] = dict.fromkeys(("u", "delta", "z"), (2, channels, "S"))
    return {**every, "B": shape, "C": shape}


NORMAL = {"use_qk_l2norm_in_kernel": True}
SOFT = {"dt_softplus": True, "chunk_size": 4}
DELTA = {"delta_softplus": True}
SCAN = {"A": (7, 5), "D": (7,), "delta_bias": (7,)}
CASES = {
    "gated delta rule": Case("chunk_gated_delta_rule", gated(4, 4), settings=NORMAL),
    "groups of values": Case("chunk_gated_delta_rule", gated(3, 6), settings=NORMAL),
    "fewer heads than ranks": Case("chunk_gated_delta_rule", gated(1, 3), settings={**NORMAL, "scale": 0.3}),
    "documents": Case("chunk_gated_delta_rule", gated(2, 4, rows=1), settings=NORMAL, documents="cu_seqlens"),
    "gated by channels": Case(
        "chunk_kda",
        {**gated(5, 5), "g": (2, "S", 5, 4)},
        {"A_log": (5,), "dt_bias": (20,)},
        {**NORMAL, "use_gate_in_kernel": True},
    ),
    "state space": Case("mamba_chunk_scan_combined", space(4, 1), {"A": (4,), "dt_bias": (4,)}, SOFT),
    "groups of heads": Case(
        "mamba_chunk_scan_combined",
        {**space(6, 3), "z": (2, "S", 6, 3)},
        {"A": (6,), "D": (6, 3), "dt_bias": (6,)},
        SOFT,
        documents="seq_idx",
    ),
    "uneven groups": Case("mamba_chunk_scan_combined", space(10, 2), {"A": (10,), "D": (10,), "dt_bias": (10,)}, SOFT),
    "selective scan": Case("selective_scan_fn", selective(7, 2, 5, "S"), SCAN, DELTA),
    "selective scan of groups": Case(
        "selective_scan_fn", selective(8, 2, 4, 5, "S"), {"A": (8, 5), "D": (8,), "delta_bias": (8,)}, DELTA
    ),
    "selective scan without B": Case(
        "selective_scan_fn",
        dict.fromkeys(("u", "delta"), (2, 7, "S")),
        {**SCAN, "B": (7, 5), "C": (7, 5)},
        DELTA,
    ),
    "convolution": Case(
        "causal_conv1d_fn", {"x": (2, 5, "S")}, {"weight": (5, 4), "bias": (5,)}, {"activation": "silu"}
    ),
    "convolution of documents": Case(
        "causal_conv1d_fn", {"x": (2, 5, "S")}, {"weight": (5, 4)}, documents="seq_idx", last=True
    ),
    "long convolution": Case("causal_conv1d_fn", {"x": (1, 3, "S")}, {"weight": (3, 12)}, last=True),
}


def numbers(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(case: Case, length: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    sequence, parameters = {}, {}
    for seed, (name, shape) in enumerate(case.sequence.items()):
        tensor = numbers(seed, tuple(length if size == "S" else size for size in shape))
        # Gates are decays in log space, and the others between 0 and 1.
        tensor = -tensor.abs() if name == "g" else tensor.sigmoid() if name in ("beta", "dt") else tensor
        # (B, C, S) with the channels last in memory
        sequence[name] = tensor.mT.contiguous().mT if case.last else tensor
    for seed, (name, size) in enumerate(case.parameters.items()):
        parameters[name] = -numbers(50 + seed, size).abs() if name == "A" else numbers(50 + seed, size)
    extra: dict[str, Any] = dict(case.settings)
    if case.documents == "cu_seqlens":
        extra["cu_seqlens"] = torch.tensor([*EDGES, length])
    if case.documents == "seq_idx":
        rows = next(iter(sequence.values())).shape[0]
        extra["seq_idx"] = torch.bucketize(torch.arange(length), torch.tensor(EDGES), right=True).repeat(rows, 1)
    return sequence, parameters, extra


def called(name: str, operands: dict[str, Tensor], extra: dict[str, Any], original: Callable[..., Any]) -> MixerCall:
    """The first arguments by position, as models pass them."""
    order = {"causal_conv1d_fn": ["x", "weight"], "mamba_chunk_scan_combined": ["x", "dt", "A", "B", "C"]}
    first = order.get(name, [operand.names[0] for operand in TABLE[name].operands[: TABLE[name].by_position]])
    rest = {key: value for key, value in operands.items() if key not in first}
    return MixerCall(name, TABLE[name], original, tuple(operands[key] for key in first), {**rest, **extra})


def compared(rank: int, case: Case, length: int, size: int, breaks: bool = False) -> dict[str, float]:
    """The largest differences of the output and of each gradient from those of the whole, relative to these."""
    dist.init_process_group("gloo", rank=rank, world_size=size)
    mesh = SequenceMesh(rank, size, size, rank, 1, 0, sp_group=dist.group.WORLD)
    context, layout = SequenceContext(mesh), SequenceLayout(length, size)
    batch, function, span = LocalBatch(layout), getattr(scans, case.name), layout.spans[rank]
    sequence, parameters, extra = made(case, length)
    leaves = {name: tensor.requires_grad_() for name, tensor in {**sequence, **parameters}.items()}
    whole = called(case.name, leaves, extra, function)
    out = whole.original(*whole.args, **whole.kwargs)
    out = out[0] if isinstance(out, tuple) else out
    dim = out.dim() - 1 if case.name in ("selective_scan_fn", "causal_conv1d_fn") else 1
    weight = numbers(99, tuple(out.shape))
    wanted = torch.autograd.grad((out * weight).sum(), [*leaves.values()])

    def cut(tensor: Tensor, dim: int) -> Tensor:
        return tensor.detach().narrow(dim, span.start, span.stop - span.start)

    mine = {
        name: (cut(t, case.sequence[name].index("S")) if name in sequence else t.detach()).requires_grad_()
        for name, t in leaves.items()
    }
    own = {**extra, **({"seq_idx": cut(extra["seq_idx"], 1)} if "seq_idx" in extra else {})}
    call = called(case.name, mine, own, function)
    with context.step(batch):
        part = call.run({}) if breaks else exchanged(call, batch, context)
    (part * cut(weight, dim)).sum().backward()
    found = {"output": _apart(part, cut(out, dim), out)}
    for (name, leaf), gradient in zip(mine.items(), wanted, strict=True):
        assert leaf.grad is not None
        if name in sequence:
            found[name] = _apart(leaf.grad, cut(gradient, case.sequence[name].index("S")), gradient)
        else:
            # Every rank has the gradients of its own heads, or of its own tokens: their sum is that of the whole.
            total = leaf.grad.clone()
            dist.all_reduce(total)
            found[name] = _apart(total, gradient, gradient)
    return found


def _apart(one: Tensor, other: Tensor, whole: Tensor) -> float:
    assert one.shape == other.shape and one.dtype == other.dtype
    return float((one - other).abs().max() / whole.abs().max())


# Each on two or on four processes.
SIZES = [(name, *size) for name in CASES for size in ((2, 17), (4, 18))]


@pytest.mark.parametrize(("name", "size", "length"), mostly(SIZES, SIZES[::4] + SIZES[3::4]))
def test_slices_are_those_of_the_whole(pool: ProcessPool, name: str, size: int, length: int) -> None:
    for found in pool.run(compared, CASES[name], length, size, world_size=size):
        assert largest(found.values()) <= 1e-10, found


@pytest.mark.parametrize("name", ["gated delta rule", "state space", "selective scan", "convolution"])
def test_without_the_exchange_they_are_not(pool: ProcessPool, name: str) -> None:
    for found in pool.run(compared, CASES[name], 17, 2, True, world_size=2)[1:]:
        assert found["output"] > 1e-3


def mixed(rank: int, ours: str, other: str) -> list[Any]:
    """Queries and gates of other dtypes in one exchange, against queries and gates that travel alone."""
    from lightning_ulysses.exchange.bundle import bundle_to_heads
    from lightning_ulysses.geometry.heads import head_layout

    dist.init_process_group("gloo", rank=rank, world_size=2)
    group = dist.group.WORLD
    assert group is not None
    layout, shares = head_layout(3, 3, 2), (4, 3)
    shared = head_layout(2, 1, 2)
    tensors = [
        numbers(rank, (2, 3, shares[rank], 5)).to(getattr(torch, ours)).requires_grad_(),
        numbers(7 + rank, (2, 3, shares[rank], 1)).to(getattr(torch, other)).requires_grad_(),
        numbers(9 + rank, (2, 1, shares[rank], 3)).to(getattr(torch, other)).requires_grad_(),
    ]
    ranges = [layout.query_ranges, layout.query_ranges, shared.kv_ranges]
    same = []
    for chosen in ([0, 1, 2], [0, 1]):
        alone = [bundle_to_heads([tensors[i]], [ranges[i]], shares, rank, group)[0] for i in chosen]
        together = bundle_to_heads([tensors[i] for i in chosen], [ranges[i] for i in chosen], shares, rank, group)
        same += [torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(alone, together, strict=True)]
        used = [tensors[i] for i in chosen]
        grads = [torch.autograd.grad(sum(p.float().square().sum() for p in parts), used) for parts in (alone, together)]
        same += [torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*grads, strict=True)]
    return same


@pytest.mark.parametrize(
    ("ours", "other"),
    [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16"), ("float32", "float64")],
)
def test_dtypes_travel_together(pool: ProcessPool, ours: str, other: str) -> None:
    """Bit by bit. Heads that several ranks have are summed in their own dtype, or in a wider one."""
    for same in pool.run(mixed, ours, other, world_size=2):
        assert all(same), same


def test_dims_are_read_and_written() -> None:
    for dims, shape in {"bshd": (2, 3, 4, 5), "bsh": (2, 3, 4), "bhs": (2, 4, 3), "bns": (2, 5, 3)}.items():
        tensor = numbers(0, shape)
        part = by_heads(tensor, dims)
        assert part.shape[0] == 2 and part.shape[2] == 3 and torch.equal(as_given(part, dims), tensor)


REFUSED = {
    "a state that is handed on": ({"output_final_state": True}, "with output_final_state"),
    "a state from before": ({"initial_state": torch.zeros(2, 4, 4, 6)}, "with initial_state"),
    "heads first": ({"head_first": True}, "head_first=True"),
    "an unknown tensor": ({"gates": torch.zeros(2, 17, 4)}, "a further tensor of shape"),
    "an unknown shape": ({"beta": torch.zeros(2, 17, 4, 1)}, r"beta of shape \(2, 17, 4, 1\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exchanged_is_refused(name: str) -> None:
    extra, message = REFUSED[name]
    case = replace(CASES["gated delta rule"], settings={})
    sequence, _, _ = made(case, 17)
    first = {key: value for key, value in sequence.items() if key in "qkv"}
    mixer = replace(TABLE["chunk_gated_delta_rule"], by_position=3)
    call = MixerCall("chunk_gated_delta_rule", mixer, print, tuple(first.values()), {**sequence, **extra})
    for key in first:
        assert key in call.given
    with pytest.raises(UlyssesError, match=message):
        call.check(LocalBatch(SequenceLayout(17, 2)))
