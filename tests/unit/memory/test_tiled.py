"""A per-token submodule on tiles: values and gradients, what is kept, how often it runs, and what is refused."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from memory_parts import Gated, Holder, relative, tiled, worst
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ulysses import UlyssesError
from lightning_ulysses.geometry.distance import largest


def run(module: nn.Module, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    output = module(x)
    (output * weight).sum().backward()
    assert x.grad is not None
    return output.detach(), x.grad


def both(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, **settings: Any) -> float:
    """The largest relative error of outputs and gradients against the module as it is."""
    torch.manual_seed(0)
    root = Holder("mlp", module).to(dtype)
    root.zero_grad()
    plain = copy.deepcopy(root)
    x = torch.randn(shape, dtype=dtype)
    wanted = run(plain, x, weight := torch.randn_like(plain(x)))
    with tiled(root, tiled_mlp=["mlp"], **settings):
        found = run(root, x, weight)
    return largest((relative(found[0], wanted[0]), relative(found[1], wanted[1]), worst(root, plain)))


@pytest.mark.parametrize("tokens", [1, 7, 16, 37, 101, 1000])
@pytest.mark.parametrize("length", [1, 2, 37, 101])
def test_every_length_and_tile(length: int, tokens: int) -> None:
    assert both(Gated(), (1, length, 8), tile_tokens=tokens) <= 1e-14


@pytest.mark.parametrize("shape", [(37, 8), (3, 13, 8), (2, 5, 3, 8)])
@pytest.mark.parametrize("module", [Gated(), nn.LayerNorm(8), nn.RMSNorm(8), nn.Linear(8, 5)])
def test_shapes_and_modules(module: nn.Module, shape: tuple[int, ...]) -> None:
    assert both(module, shape, tile_tokens=4) <= 1e-14
    assert both(module, shape, torch.float32, tile_tokens=4) <= 1e-6


def test_tiles_by_bytes() -> None:
    module = Gated()
    root = Holder("mlp", module).double()
    x = torch.randn(1, 40, 8, dtype=torch.float64)
    sizes: list[int] = []
    # In float64 a row keeps its input, and 24 values each of the gate, what comes out of it, the other factor and more.
    with tiled(root, tiled_mlp=True, tile_bytes=10_000), mock.patch.object(module, "down", module.down) as _:
        root(x)
        module.down.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[-2]))
        with pytest.raises(UlyssesError, match=r"submodule 'down' has hooks"):
            root(x)
    kept = (8 + 4 * 24) * 8
    assert both(Gated(), (1, 40, 8), tile_bytes=3 * kept) <= 1e-14
    assert both(Gated(), (1, 40, 8), tile_bytes=1) <= 1e-14


@pytest.mark.parametrize("frozen", ["gate", "up", "all", "input"])
def test_frozen_parts(frozen: str) -> None:
    torch.manual_seed(0)
    root = Holder("mlp", Gated()).double()
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(frozen != "all" and frozen not in name)
    plain = copy.deepcopy(root)
    x = torch.randn(1, 13, 8, dtype=torch.float64, requires_grad=frozen != "input")
    own = x.detach().clone().requires_grad_(x.requires_grad)
    plain(x).square().sum().backward()
    with tiled(root, tiled_mlp=True, tile_tokens=4):
        root(own).square().sum().backward()
    assert worst(root, plain) <= 1e-14
    assert relative(own.grad, x.grad) <= 1e-14


def test_hooks_fire_once() -> None:
    root, fired = Holder("mlp", Gated()), []
    for name, parameter in root.named_parameters():
        parameter.register_hook(lambda gradient, name=name: fired.append(name))
        parameter.register_post_accumulate_grad_hook(lambda parameter, name=name: fired.append(f"{name} after"))
    with tiled(root, tiled_mlp=True, tile_tokens=3):
        root(torch.randn(1, 20, 8)).sum().backward()
    assert sorted(fired) == sorted(name + end for name, _ in root.named_parameters() for end in ("", " after"))


@pytest.mark.parametrize(("part", "passes"), [("tiled", 2.0), ("plain", 2.0), ("after", 3.0)])
def test_passes_under_a_checkpoint(part: str, passes: float) -> None:
    """Two passes, as without tiles. A module whose output is needed again runs a third time: the control."""
    root = Holder("mlp", Gated())
    x = torch.randn(1, 20, 8, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        x = x + root(x.tanh())
        return x.square() if part == "after" else x

    with tiled(root, tiled_mlp=True, tile_tokens=40 if part == "plain" else 3):
        root(x.detach())
        root.mlp.rows = 0
        checkpoint(block, x, use_reentrant=False).sum().backward()
    assert root.mlp.rows / 20 == passes


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_a_checkpoint(reentrant: bool) -> None:
    torch.manual_seed(0)
    root = Holder("mlp", Gated()).double()
    plain = copy.deepcopy(root)
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    (a + plain(a.tanh())).square().sum().backward()
    with tiled(root, tiled_mlp=True, tile_tokens=3):
        checkpoint(lambda x: x + root(x.tanh()), b, use_reentrant=reentrant).square().sum().backward()
    assert relative(b.grad, a.grad) <= 1e-14
    assert worst(root, plain) <= 1e-14


@pytest.mark.parametrize("part", ["tiled_mlp", "tiled_loss"])
def test_nothing_is_kept_under_a_checkpoint(part: str) -> None:
    """Not even the input, which the checkpoint computes again."""
    root, held = Holder("mlp", nn.Linear(8, 8) if part == "tiled_loss" else Gated()), []

    def block(x: Tensor) -> Tensor:
        x = x.tanh()
        held.append(weakref.ref(x.untyped_storage()))
        output = root(x)
        return nn.functional.cross_entropy(output[0], torch.zeros(20).long()) if part == "tiled_loss" else output

    x = torch.randn(1, 20, 8, requires_grad=True)
    with tiled(root, **{part: ["mlp"], "tile_tokens": 3}):
        root(x.detach())
        output = checkpoint(block, x, use_reentrant=False)
        assert held[0]() is None
        output.sum().backward()
        assert len(held) == 2


def test_keeps_the_input_only() -> None:
    def kept(root: nn.Module) -> int:
        found: dict[int, int] = {p.untyped_storage().data_ptr(): 0 for p in root.parameters()}
        hold = []

        def pack(tensor: Tensor) -> Tensor:
            hold.append(tensor)
            found.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            root(x)
        return sum(found.values())

    root, x = Holder("mlp", Gated()), torch.randn(1, 64, 8, requires_grad=True)
    plain = kept(root)
    with tiled(root, tiled_mlp=True, tile_tokens=4):
        root(x.detach())
        assert kept(root) == x.numel() * 4
    assert plain >= 10 * x.numel() * 4


@pytest.mark.parametrize("enabled", [False, True])
def test_mixed_precision(enabled: bool) -> None:
    torch.manual_seed(0)
    root = Holder("mlp", Gated())
    plain = copy.deepcopy(root)
    x = torch.randn(1, 30, 8)
    for each in (root, plain):
        settings = {"tile_tokens": 4 if each is root else 100}
        with tiled(each, tiled_mlp=True, **settings), torch.autocast("cpu", torch.bfloat16, enabled):
            output = each(x)
            # The second use of weights that were cast without gradients in the first.
            output = each(output.float())
        assert output.dtype is (torch.bfloat16 if enabled else torch.float32)
        output.float().square().sum().backward()
    assert worst(root, plain) <= (2e-2 if enabled else 1e-6)


class Experts(nn.Module):
    """Each expert takes as many tokens as its capacity, which goes by the tokens of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 4), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        choice, output = self.router(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = (choice == number).flatten().nonzero().squeeze(-1)[: max(x[..., 0].numel() // 4, 1)]
            output.view(-1, 8)[chosen] = expert(x.reshape(-1, 8)[chosen])
        return output


class Counting(nn.Module):
    """Remembers what it saw, as routers do for their auxiliary loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.load = self.inner(x).mean()
        return self.inner(x)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Outside(nn.Module):
    """Uses a parameter of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Parameter(torch.ones(8))]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.hidden[0]


class Normalized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(-2, keepdim=True)


class Smoothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.detach().flatten(0, -2).mean(0))
        return x * 2


class OfRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, -2)).view_as(x)


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "capacity": (Experts(), "depend on those that run with them"),
    "statistics": (OfRows(), "more than 1 value per channel"),
    "a running mean": (Smoothing(), "writes to its buffer 'mean'"),
    "a mean over tokens": (Normalized(), "depend on those that run with them"),
    "dropout": (nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1)), "draws random numbers"),
    "an auxiliary loss": (Counting(), "keeps 'load' of the tokens it has seen"),
    "two outputs": (Pair(), "returns a tuple"),
    "a parameter from elsewhere": (Outside(), "uses a parameter"),
    "another width": (nn.Linear(9, 8), "does not run on a few tokens"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals(kind: str) -> None:
    module, reason = REFUSED[kind]
    root = Holder("mlp", copy.deepcopy(module))
    state, buffers = torch.get_rng_state(), {name: b.clone() for name, b in root.named_buffers()}
    with tiled(root, tiled_mlp=["mlp"], tile_tokens=2), pytest.raises(UlyssesError, match=reason) as found:
        root(torch.randn(1, 9, 9 if kind == "a width" else 8, generator=torch.Generator().manual_seed(0)))
    assert "tiled_mlp for 'mlp'" in str(found.value)
    # The trial leaves no trace.
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(b, buffers[name]) for name, b in root.named_buffers())
    assert not hasattr(module, "load")


def test_statistics_are_per_token_in_evaluation() -> None:
    assert both(OfRows().eval(), (2, 9, 8), tile_tokens=4) <= 1e-14


def test_other_tensors_are_refused() -> None:
    root = Holder("mlp", nn.Bilinear(8, 8, 8))
    with tiled(root, tiled_mlp=["mlp"]), pytest.raises(UlyssesError, match="called with 2 tensors"):
        root(torch.randn(1, 9, 8), torch.randn(1, 9, 8))


def test_names() -> None:
    root = nn.ModuleDict({"a": Holder("mlp", Gated()), "b": Holder("ff", Gated()), "norm": nn.LayerNorm(8)})
    with pytest.raises(UlyssesError, match=r"tiled_mlp='mpl'.*a\.mlp"), tiled(root, tiled_mlp=["mpl"]):
        pass
    with tiled(root, tiled_mlp=["a.*"], tiled_norm=True):
        assert {name for name, module in root.named_modules() if "forward" in vars(module)} == {"a.mlp", "norm"}
    assert not any("forward" in vars(module) for module in root.modules())


def test_copies_are_of_their_own() -> None:
    """Averages of weights copy the module in the middle of a run."""
    root = Holder("mlp", Gated()).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    with tiled(root, tiled_mlp=True, tile_tokens=2):
        copied = copy.deepcopy(root)
        loaded = pickle.loads(pickle.dumps(root))
        wanted = root(x).detach()
        for parameter in root.parameters():
            parameter.data.zero_()
        assert torch.allclose(copied(x), wanted)
        assert torch.allclose(loaded(x), wanted)
        assert not root(x).any()


def test_a_try_holds_no_parameter() -> None:
    """ZeRO-3 frees whole parameters after a call, and nothing else may hold their memory."""
    mlp = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 8))
    root = Holder("mlp", mlp)
    with tiled(root, tiled_mlp=["mlp"], tile_tokens=3):
        root(torch.randn(1, 9, 8)).sum().backward()
    held = [weakref.ref(parameter.untyped_storage()) for parameter in mlp.parameters()]
    for parameter in mlp.parameters():
        parameter.data = torch.empty(0)
    gc.collect()
    assert [each() for each in held] == [None] * 4


def test_a_checkpoint_around_tiles_frees_their_input():
    module = Holder("mlp", Gated())
    inputs = []

    def block(x):
        inner = x * 2
        inputs.append(weakref.ref(inner.untyped_storage()))
        return module(inner)

    with tiled(module, tiled_mlp=True, tile_tokens=4):
        x = torch.randn(1, 16, 8, requires_grad=True)
        y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        assert inputs[0]() is None
        y.sum().backward()
    # Without a checkpoint the input is what is kept.
    with tiled(module, tiled_mlp=True, tile_tokens=4):
        y = block(x)
        assert inputs[-1]() is not None
