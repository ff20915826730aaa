"""Tensors that wait in host memory: values, buffers, the order of copies, and how much room there must be."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from block_models import WIDTH, Stack, data, step
from memory import MemoryCount
from memory_parts import tiled, worst
from torch import Tensor, nn

from lightning_ulysses import UlyssesError
from lightning_ulysses.memory import offload as module
from lightning_ulysses.memory.host import HostPool, check_room
from lightning_ulysses.memory.offload import HostOffload, Kept, PlainCopies


class LateCopies(PlainCopies):
    """A stream that copies nothing before somebody waits for it, and holds no tensor meanwhile.

    Attributes:
        log: ``"out"`` and ``"in"`` for each copy that began, ``"wait"`` for each wait.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self._queue: list[tuple[int, list[Any]]] = []
        self._number = 0
        self._buffers: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def buffer(self, size: int) -> Tensor:
        made = super().buffer(size)
        self._buffers.add(made.untyped_storage())
        return made

    def start(self, target: Tensor, source: Tensor) -> Any:
        self.log.append("out" if target.untyped_storage() in self._buffers else "in")
        self._number += 1
        self._queue.append((self._number, [_weak(target), _weak(source)]))
        return self._number

    def wait(self, copy: Any) -> None:
        self.log.append("wait")
        while self._queue and self._queue[0][0] <= copy:
            target, source = map(_strong, self._queue.pop(0)[1])
            with torch.no_grad():
                target.copy_(source)


def _weak(tensor: Tensor) -> Any:
    storage = weakref.ref(tensor.untyped_storage())
    return storage, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()


def _strong(described: Any) -> Tensor:
    storage, dtype, *layout = described
    assert storage() is not None, "memory was freed before a copy was done"
    return torch.empty(0, dtype=dtype).set_(storage(), *layout)


class Lab:
    """The engines that were made while `laboratory` is in place."""

    def __init__(self) -> None:
        self.copies = LateCopies()
        self.engines: list[HostOffload] = []

    @property
    def pool(self) -> HostPool:
        (engine,) = self.engines
        return engine.pool(torch.device("cpu"))[1]


@pytest.fixture
def laboratory(monkeypatch: pytest.MonkeyPatch) -> Lab:
    lab, plain = Lab(), HostOffload.__init__

    def noted(self: HostOffload, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        lab.engines.append(self)

    monkeypatch.setattr(module, "_LEAST", 0)
    monkeypatch.setattr(module, "copies_for", lambda device: lab.copies)
    monkeypatch.setattr(HostOffload, "__init__", noted)
    return lab


ON: dict[str, Any] = {"checkpoint": "block", "offload": "cpu"}


def test_steps_are_exact_and_buffers_are_used_again(laboratory: Lab) -> None:
    plain, offloaded = Stack(layers=5, p=0.2), Stack(layers=5, p=0.2)
    wanted = step(plain)
    gc.disable()
    with tiled(offloaded, **ON):
        for _ in range(3):
            assert torch.equal(step(offloaded), wanted) and worst(offloaded, plain) <= 1e-6
            # The first input needs no gradient, and the last block's stays where it is.
            assert laboratory.pool.made == laboratory.pool.free == 4
    gc.enable()
    assert laboratory.copies.log.count("out") == laboratory.copies.log.count("in") == 9


def test_copies_begin_before_they_are_needed(laboratory: Lab) -> None:
    root = Stack(layers=5)
    x = data().requires_grad_()
    with tiled(root, **ON):
        loss = root(x).mean()
        log = laboratory.copies.log
        # Each input leaves while the following block runs.
        assert log == ["out", "wait"] * 4
        log.clear()
        loss.backward()
    # While the last block is computed again the one before comes back, and so on. Buffers are given back after that.
    assert [each for each in log if each == "in"] == ["in"] * 4
    assert log[:2] == ["in", "wait"] and "out" not in log
    for index in range(1, 4):
        begun = [place for place, each in enumerate(log) if each == "in"][index]
        assert log[:begun].count("in") == index


def test_one_block_is_on_the_device(laboratory: Lab) -> None:
    root, one = Stack(layers=5), 2 * 64 * WIDTH * 4

    def kept() -> int:
        x = data(64).requires_grad_()
        with MemoryCount() as count:
            count.hold(x, *root.parameters(), *laboratory.pool._free)
            before = count.now
            loss = root(x).mean()
            now = count.now
            loss.backward()
        return now - before

    with tiled(root, **ON):
        step(root)
        kept()
        # The loss is 4 bytes.
        assert kept() == one + 4


def test_two_backwards_and_two_graphs_at_a_time(laboratory: Lab) -> None:
    plain, offloaded = Stack(layers=4), Stack(layers=4)
    for root in (plain, offloaded):
        with tiled(root, **(ON if root is offloaded else {})):
            first, second = root(data().requires_grad_()).mean(), root(data().requires_grad_()).square().mean()
            (first + second).backward(retain_graph=True)
            first.backward()
            del first, second
    assert worst(offloaded, plain) <= 1e-6
    # The last block of all has stayed on the device.
    assert laboratory.pool.made == laboratory.pool.free == 7


class Failing(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.attention, self.calls, self.fails_at = block, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("on purpose")
        return self.attention(x)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_an_exception_leaves_nothing(when: str, laboratory: Lab) -> None:
    root = Stack(layers=4)
    root.layers = nn.ModuleList([Failing(layer) for layer in root.layers])
    with tiled(root, **ON):
        step(root)
        failing = root.layers[2 if when == "forward" else 1]
        failing.fails_at = failing.calls + (1 if when == "forward" else 2)  # type: ignore[operator,assignment]
        with pytest.raises(RuntimeError, match="on purpose"):
            step(root)
        gc.collect()
        assert laboratory.pool.free == laboratory.pool.made == 3
        step(root)
        assert laboratory.pool.made == 3


def test_longer_batches_do_not_add_buffers(laboratory: Lab) -> None:
    root = Stack(layers=4)
    with tiled(root, **ON):
        for tokens in (8, 24, 16, 24, 8):
            root(data(tokens).requires_grad_()).mean().backward()
            gc.collect()
            assert laboratory.pool.free == 3
    assert laboratory.pool.bytes == 3 * 2 * 24 * WIDTH * 4


def test_a_tensor_that_several_blocks_get_leaves_once(laboratory: Lab) -> None:
    plain, offloaded = (Stack(lambda layer, x: layer(x, scale=root_scale[0])) for _ in range(2))
    for root in (plain, offloaded):
        root_scale = [root.layers[0].mlp[0].bias.repeat(4)[:WIDTH] * 2]  # type: ignore[union-attr,index]
        with tiled(root, **(ON if root is offloaded else {})):
            root(data()).mean().backward()
    assert worst(offloaded, plain) <= 1e-6
    # The scale once, and the input of the middle block.
    gc.enable()
    assert laboratory.copies.log.count("out") == 2


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.linear = nn.Identity(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x.detach())
        x += y
        return x


def test_an_input_that_is_written_to_is_refused(laboratory: Lab) -> None:
    root = Stack()
    root.layers = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), InPlace()) for _ in range(3)])
    inner = [layer[1] for layer in root.layers]  # type: ignore[index]
    root.layers = nn.ModuleList([InPlace() for _ in inner])
    with tiled(root, checkpoint_blocks=["layers.*"], **ON), pytest.raises(UlyssesError, match="written to after"):
        root(data().requires_grad_() * 1).mean().backward()


def test_without_waiting_it_is_wrong(laboratory: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the stand-in does not copy by itself."""
    plain, offloaded = Stack(layers=4), Stack(layers=4)
    step(plain)
    get = Kept.get

    def hasty(self: Kept) -> Tensor:
        with mock.patch.object(laboratory.copies, "wait"):
            return get(self)

    monkeypatch.setattr(Kept, "get", hasty)
    with tiled(offloaded, **ON):
        step(offloaded)
    assert not worst(offloaded, plain) <= 1e-3


def machine(root: Path, free: int, limit: int | None = None, used: int = 0) -> Path:
    for folder in ("proc/self", "sys/fs/cgroup/job"):
        (root / folder).mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {free // 1024} kB\n")
    (root / "proc/self/cgroup").write_text("0::/job\n")
    (root / "sys/fs/cgroup/job/memory.max").write_text("max" if limit is None else str(limit))
    (root / "sys/fs/cgroup/job/memory.current").write_text(str(used))
    return root


GIB = 2**30


def test_room(tmp_path: Path) -> None:
    check_room(2 * GIB, 4, machine(tmp_path / "fits", 8 * GIB))
    with pytest.raises(
        UlyssesError, match=r"2 GiB for each of 4 processes on a machine with 7 GiB of available memory"
    ):
        check_room(2 * GIB, 4, machine(tmp_path / "short", 7 * GIB))
    with pytest.raises(UlyssesError, match=r"with 3 GiB left below the memory limit.*Expected at least 8 GiB"):
        check_room(2 * GIB, 4, machine(tmp_path / "limited", 100 * GIB, limit=5 * GIB, used=2 * GIB))


def test_refused_in_the_first_step(laboratory: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = machine(tmp_path, 1024)
    monkeypatch.setattr("lightning_ulysses.memory.host.available", lambda _: 1024)
    stack = Stack(layers=5)
    with tiled(stack, **ON), pytest.raises(UlyssesError, match="offload='cpu' of"):
        step(stack)
    assert root.is_dir() and not laboratory.copies.log


def test_memory_that_cannot_be_pinned() -> None:
    def refuse(size: int) -> Tensor:
        raise RuntimeError("CUDA error: out of memory\nmore")

    with pytest.raises(UlyssesError, match=r"CUDA error: out of memory\); the limit of locked memory is"):
        HostPool(refuse, lambda size: None).take(5)


def test_buffers_beyond_those_of_one_step_are_refused_too() -> None:
    sizes: list[int] = []
    pool = HostPool(lambda size: torch.empty(size, dtype=torch.uint8), sizes.append)
    pool.give(pool.take(8))
    pool.take(5)
    pool.take(5)
    # The second one was there.
    assert sizes == [8, 5]
