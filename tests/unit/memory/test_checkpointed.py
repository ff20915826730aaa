"""Blocks under a checkpoint, in one process: which they are, what they keep, and what is refused."""

from __future__ import annotations

import copy
import gc
import inspect
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from block_models import WIDTH, Block, Stack, data, step
from memory import MemoryCount
from memory_parts import tiled, worst
from torch import Tensor, nn

from lightning_ulysses import UlyssesError
from lightning_ulysses.attention.kept import Ledger
from lightning_ulysses.config import MemoryConfig
from lightning_ulysses.context import SequenceContext
from lightning_ulysses.exchange.mesh import ALONE
from lightning_ulysses.memory import install
from lightning_ulysses.memory.blocks import find_blocks

CALLS: dict[str, Any] = {
    "by position": lambda layer, x: layer(x),
    "by name": lambda layer, x: layer(x=x, scale=x.mean()),
    "a list that the block changes": lambda layer, x: layer(x, seen=[x * 0.5]),
}


@pytest.mark.parametrize("kind", ["block", "block+attention"])
@pytest.mark.parametrize("name", CALLS)
def test_gradients_and_draws(name: str, kind: str) -> None:
    given = {"p": 0.3, "is_drawn": True}
    plain, checkpointed = Stack(CALLS[name], **given), Stack(CALLS[name], **given)
    wanted = step(plain)
    with tiled(checkpointed, checkpoint=kind):
        found = step(checkpointed)
    assert worst(checkpointed, plain) <= 1e-6 and torch.equal(found, wanted)
    assert [layer.calls for layer in checkpointed.layers] == [2, 2, 2]  # type: ignore[union-attr]


def test_without_the_draws_of_the_host_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    plain, checkpointed = Stack(is_drawn=True), Stack(is_drawn=True)
    step(plain)
    monkeypatch.setattr("lightning_ulysses.memory.checkpointed._set_host_draws", lambda states: None)
    with tiled(checkpointed, checkpoint="block"):
        step(checkpointed)
    assert worst(checkpointed, plain) > 1e-3


def test_kept_bytes() -> None:
    """The input of each block, and nothing else; nothing is left after the step."""

    def kept(root: Stack) -> tuple[int, int]:
        x = data(64).requires_grad_()
        gc.disable()
        with MemoryCount() as count:
            count.hold(x, *root.parameters())
            before = count.now
            loss = root(x).mean()
            now = count.now
            loss.backward()
            for parameter in root.parameters():
                parameter.grad = None
            del loss
            x.grad = None
        gc.enable()
        return now - before, count.now - before

    plain, _ = kept(Stack())
    root = Stack()
    with tiled(root, checkpoint="block"):
        kept(root)
        checkpointed, left = kept(root)
    one = 2 * 64 * WIDTH * 4
    # The input of the first block was there before. The loss is 4 bytes.
    assert checkpointed == 2 * one + 4 and left == 0 and plain > 20 * one


def test_what_is_kept_of_attention_is_freed_without_the_collector() -> None:
    root = Stack()
    gc.collect()
    gc.disable()
    try:
        with tiled(root, checkpoint="block+attention"):
            step(root)
        left = [each for each in gc.get_objects() if type(each) is Ledger]
    finally:
        gc.enable()
    assert not left


def test_evaluation_is_not_checkpointed() -> None:
    root = Stack()
    with tiled(root, checkpoint="block"), torch.no_grad():
        root(data())
    assert [layer.calls for layer in root.layers] == [1, 1, 1]  # type: ignore[union-attr]


def test_frozen_blocks_are_not_checkpointed() -> None:
    root = Stack().requires_grad_(False)
    with tiled(root, checkpoint="block"):
        root(data())
        assert not root(data()).requires_grad


def test_a_second_backward() -> None:
    plain, checkpointed = Stack(), Stack()
    for root in (plain, checkpointed):
        with tiled(root, **({"checkpoint": "block+attention"} if root is checkpointed else {})):
            loss = root(data()).mean()
            loss.backward(retain_graph=True)
            loss.backward()
    assert worst(checkpointed, plain) <= 1e-6


# What is found


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(4, 4)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)


class Sparse(Attend):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Expert() for _ in range(3)])


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attend(), Attend()])
        self.down = nn.Linear(4, 4)


def listed(**modules: nn.Module) -> nn.Module:
    root = nn.Module()
    for name, module in modules.items():
        root.add_module(name, module)
    return root


FOUND: dict[str, tuple[nn.Module, list[str]]] = {
    "a list": (listed(h=nn.ModuleList([Attend(), Attend()])), ["h.0", "h.1"]),
    "a sequence": (listed(h=nn.Sequential(Attend(), Attend(), nn.Linear(4, 4))), ["h.0", "h.1"]),
    "experts stay whole": (listed(h=nn.ModuleList([Sparse(), Sparse()])), ["h.0", "h.1"]),
    "stages": (listed(s=nn.ModuleList([Stage(), Stage()])), [f"s.{i}.blocks.{j}" for i in (0, 1) for j in (0, 1)]),
    "lists in a list": (
        listed(h=nn.ModuleList([nn.ModuleList([Attend(), Expert()]), nn.ModuleList([Attend(), Expert()])])),
        ["h.0.0", "h.0.1", "h.1.0", "h.1.1"],
    ),
    "attention before other lists": (
        listed(conv=nn.ModuleList([Expert(), Expert()]), h=nn.ModuleList([Attend(), Attend()])), ["h.0", "h.1"],
    ),
    "no attention": (listed(h=nn.ModuleList([Expert(), Expert()])), ["h.0", "h.1"]),
    "a dict": (listed(h=nn.ModuleDict({"a": Attend(), "b": Attend()})), ["h.a", "h.b"]),
    "an encoder of torch": (
        listed(e=nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2)), ["e.layers.0", "e.layers.1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    root, wanted = FOUND[name]
    assert list(find_blocks(root, None)) == wanted


def test_named() -> None:
    root = listed(a=nn.ModuleList([Attend(), Attend()]), b=nn.ModuleList([Attend(), Attend()]))
    assert list(find_blocks(root, ["b.*"])) == ["b.0", "b.1"]
    with pytest.raises(UlyssesError, match=r"checkpoint_blocks='c.\*'.*no such submodule"):
        find_blocks(root, ["c.*"])


def test_no_blocks() -> None:
    with pytest.raises(UlyssesError, match="no repeated blocks in Linear"):
        find_blocks(nn.Linear(4, 4), None)


def test_models_of_transformers() -> None:
    from transformers import AutoModel, BertConfig, GPT2Config, LlamaConfig, T5Config

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = AutoModel.from_config(BertConfig(vocab_size=32, **sizes))
    assert list(find_blocks(bert, None)) == ["encoder.layer.0", "encoder.layer.1"]
    llama = AutoModel.from_config(LlamaConfig(vocab_size=32, **sizes))
    assert list(find_blocks(llama, None)) == ["layers.0", "layers.1"]
    gpt2 = AutoModel.from_config(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2))
    assert list(find_blocks(gpt2, None)) == ["h.0", "h.1"]
    t5 = AutoModel.from_config(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2))
    assert list(find_blocks(t5, None)) == [f"{half}.block.{i}" for half in ("encoder", "decoder") for i in (0, 1)]


# What is refused


def by_hand(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)  # type: ignore[no-any-return]


def reentrant(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)  # type: ignore[no-any-return]


def by_deepspeed(layer: nn.Module, x: Tensor) -> Tensor:
    import deepspeed

    return deepspeed.checkpointing.checkpoint(layer, x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("call", [by_hand, reentrant, by_deepspeed])
def test_blocks_that_the_user_checkpoints(call: Any) -> None:
    import deepspeed  # noqa: F401

    root = Stack(call)
    with (
        tiled(root, checkpoint="block"),
        pytest.raises(UlyssesError, match=r"'layers.0', which is checkpointed already"),
    ):
        root(data().requires_grad_())


def test_a_checkpoint_inside_of_a_block() -> None:
    root = Stack()
    for layer in root.layers:
        plain = layer.mlp.forward  # type: ignore[union-attr]
        layer.mlp.forward = lambda x, plain=plain: by_hand(plain, x)  # type: ignore[union-attr]
    with tiled(root, checkpoint="block"), pytest.raises(UlyssesError, match="inside of it"):
        root(data())


def test_transformers_that_checkpoint() -> None:
    from transformers import AutoModel, LlamaConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AutoModel.from_config(LlamaConfig(vocab_size=32, **sizes))
    model.gradient_checkpointing_enable()
    with pytest.raises(UlyssesError, match="gradient_checkpointing is on"):
        install(SequenceContext(ALONE), model, MemoryConfig(checkpoint="block"))
    # As the message says.
    model.gradient_checkpointing_disable()
    install(SequenceContext(ALONE), model, MemoryConfig(checkpoint="block")).remove()


def test_wrapped_blocks() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    root = Stack()
    root.layers[1] = checkpoint_wrapper(root.layers[1])
    with pytest.raises(UlyssesError, match="CheckpointWrapper"):
        install(SequenceContext(ALONE), root, MemoryConfig(checkpoint="block"))


def test_a_block_that_writes_its_buffers() -> None:
    root = Stack()
    root.layers[0].mlp[1] = nn.BatchNorm1d(12)  # type: ignore[union-attr,index]
    with tiled(root, checkpoint="block"), pytest.raises(UlyssesError, match=r"writes to its buffer 'mlp.1"):
        root(data())


def test_a_filled_cache() -> None:
    from transformers import DynamicCache

    class Caching(Block):
        def forward(self, x: Tensor, cache: Any = None) -> Tensor:  # type: ignore[override]
            return super().forward(x) + (0 if cache is None else 1)

    root = Stack(lambda layer, x: layer(x, cache=cache), layers=2)
    root.layers = nn.ModuleList([Caching(), Caching()])
    cache = DynamicCache()
    with tiled(root, checkpoint="block"):
        # An empty one is left out: a block that is computed again would add to it twice.
        assert torch.equal(root(data()), root.layers[1](root.layers[0](data())))
        cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
        with pytest.raises(UlyssesError, match="a cache of 3 keys"):
            root(data())


def test_plans_read_the_names_of_arguments() -> None:
    root = Stack()
    wanted = inspect.signature(root.layers[0].forward)
    with tiled(root, checkpoint="block"):
        assert inspect.signature(root.layers[0].forward) == wanted


def test_copies_of_a_model_are_their_own() -> None:
    root = Stack(layers=2)
    with tiled(root, checkpoint="block"):
        copied = copy.deepcopy(root)
    copied.layers[0].mlp[0].weight.data.zero_()  # type: ignore[union-attr,index,operator]
    assert not torch.equal(copied(data()), root(data())) and copied.layers[0].calls == 1  # type: ignore[union-attr]


def test_a_compiled_block_is_checkpointed_around_its_graph() -> None:
    """And where the model as a whole is compiled, blocks run as they are."""
    from torch._dynamo.testing import CompileCounter

    plain, inner, outer = (Stack(layers=2, p=0.0) for _ in range(3))
    wanted = step(plain)
    counter = CompileCounter()
    for layer in inner.layers:
        layer.compile(backend=counter)
    with tiled(inner, checkpoint="block"):
        assert torch.equal(step(inner), wanted) and worst(inner, plain) <= 1e-6
    assert counter.frame_count > 0
    compiled = torch.compile(outer, backend="eager")
    with tiled(compiled, checkpoint="block"):
        assert torch.equal(step(compiled), wanted) and worst(outer, plain) <= 1e-6
    # Python code of a compiled block is traced once, and does not count its runs.
    assert [layer.calls for layer in outer.layers] == [2, 2]  # type: ignore[union-attr]


def test_everything_is_put_back() -> None:
    root, original = Stack(), torch.utils.checkpoint.checkpoint
    with tiled(root, checkpoint="block"):
        assert torch.utils.checkpoint.checkpoint is not original and "forward" in vars(root.layers[0])
    assert torch.utils.checkpoint.checkpoint is original and "forward" not in vars(root.layers[0])
