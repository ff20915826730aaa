"""Cross entropies of deferred logits: against full logits, for hand-written losses and for heads of transformers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from memory_parts import Holder, relative, targets, tiled, worst
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ulysses import UlyssesError
from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.memory.deferred_logits import DeferredLogits, realized

V, D = 57, 16
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def in_place(h: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits = h(x)
    rows, first = logits.view(-1, V), logits[:, :3]
    first.mul_(0.5)
    rows[:, 0] = -2.0
    return F.cross_entropy(rows, y.view(-1))


def learned(h: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy((h(x) * x.mean()).view(-1, V), y.view(-1))


WEIGHTS = torch.linspace(0.5, 2, V)
# Losses, and what needs all logits in them.
LOSSES: dict[str, tuple[Loss, set[str]]] = {
    "plain": (lambda h, x, y: F.cross_entropy(h(x).view(-1, V), y.view(-1)), set()),
    "flatten": (lambda h, x, y: F.cross_entropy(h(x).flatten(0, 1), y.flatten()), set()),
    "module": (lambda h, x, y: nn.CrossEntropyLoss()(h(x).view(-1, V), y.view(-1)), set()),
    "shift": (lambda h, x, y: F.cross_entropy(h(x)[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1)), set()),
    "shift with dots": (
        lambda h, x, y: F.cross_entropy(h(x)[..., :-1, :].contiguous().view(-1, V), y[..., 1:].reshape(-1)),
        set(),
    ),
    "a mask": (lambda h, x, y: F.cross_entropy(h(x)[y != -100], y[y != -100]), set()),
    "a row": (lambda h, x, y: F.cross_entropy(h(x)[1], y[1]), set()),
    "chosen rows": (
        lambda h, x, y: F.cross_entropy(h(x)[:, torch.tensor([3, 3, 5])].view(-1, V), y[:, :3].flatten()),
        set(),
    ),
    "steps": (lambda h, x, y: F.cross_entropy((3 * torch.tanh(h(x).float() / 3)).view(-1, V), y.view(-1)), set()),
    "smoothing": (lambda h, x, y: F.cross_entropy(h(x).view(-1, V), y.view(-1), label_smoothing=0.1), set()),
    "class weights": (lambda h, x, y: F.cross_entropy(h(x).view(-1, V), y.view(-1), WEIGHTS.to(x.dtype)), set()),
    "smoothing and class weights": (
        lambda h, x, y: F.cross_entropy(h(x).view(-1, V), y.view(-1), WEIGHTS.to(x.dtype), label_smoothing=0.1),
        set(),
    ),
    "sum": (lambda h, x, y: F.cross_entropy(h(x).view(-1, V), y.view(-1), reduction="sum") / 7, set()),
    "none": (
        lambda h, x, y: (
            F.cross_entropy(h(x).view(-1, V), y.view(-1), reduction="none") * torch.linspace(0, 1, y.numel())
        ).sum(),
        set(),
    ),
    "another ignored label": (
        lambda h, x, y: F.cross_entropy(h(x).view(-1, V), y.view(-1).clamp(min=0), ignore_index=0),
        set(),
    ),
    "all masked": (
        lambda h, x, y: F.cross_entropy(h(x).view(-1, V), torch.full_like(y, -100).view(-1), reduction="sum"),
        set(),
    ),
    "two heads' worth": (
        lambda h, x, y: F.cross_entropy((z := h(x)).view(-1, V), y.view(-1)) + F.cross_entropy(z[0], y[0]) * 2,
        set(),
    ),
    "z-loss": (
        lambda h, x, y: (
            F.cross_entropy((z := h(x)).view(-1, V), y.view(-1)) + 1e-2 * z.logsumexp(-1).pow(2).mean()
        ),
        {"logsumexp"},
    ),
    "log softmax": (lambda h, x, y: F.nll_loss(h(x).log_softmax(-1).view(-1, V), y.view(-1)), {"log_softmax"}),
    "classes in the middle": (lambda h, x, y: F.cross_entropy(h(x).transpose(1, 2), y), {"transpose"}),
    "class probabilities": (
        lambda h, x, y: F.cross_entropy(h(x).view(-1, V), torch.ones(y.numel(), V, dtype=x.dtype) / V),
        {"cross_entropy"},
    ),
    "part of the classes": (
        lambda h, x, y: F.cross_entropy(h(x)[..., :50].flatten(0, 1), y.flatten() % 50),
        {"__getitem__"},
    ),
    "a learned scale": (learned, {"mul"}),
    "a bias": (lambda h, x, y: F.cross_entropy((h(x) + WEIGHTS.to(x.dtype)).view(-1, V), y.view(-1)), {"add"}),
    "in place": (in_place, {"mul_"}),
    "another type": (lambda h, x, y: F.cross_entropy(h(x).view(-1, V).double(), y.view(-1)), set()),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:tiled_loss")
@pytest.mark.parametrize("tokens", [1, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, dtype: torch.dtype, tokens: int) -> None:
    loss, _ = LOSSES[name]
    torch.manual_seed(0)
    root = Holder("head", nn.Linear(D, V)).to(dtype)
    plain = copy.deepcopy(root)
    x, y = torch.randn(2, 13, D, dtype=dtype), targets((2, 13), V)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    wanted = loss(plain, a, y)
    (wanted * 7).backward()
    with tiled(root, tiled_loss=["head"], tile_tokens=tokens):
        found = loss(root, b, y)
        (found * 7).backward()
    bound = 1e-13 if dtype is torch.float64 else 1e-6
    assert found.dtype == wanted.dtype
    assert abs(float(found.detach() - wanted.detach())) <= bound * max(abs(float(wanted.detach())), 1.0)
    assert largest((relative(b.grad, a.grad), worst(root, plain))) <= bound


@pytest.mark.parametrize("name", LOSSES)
def test_what_needs_all_logits(name: str) -> None:
    """Each function that needs them is listed once, and only those losses compute them."""
    loss, needed = LOSSES[name]
    root = Holder("head", nn.Linear(D, V))
    x, y = torch.randn(2, 13, D, requires_grad=True), targets((2, 13), V)
    with tiled(root, tiled_loss=["head"], tile_tokens=4), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        loss(root, x, y)
        loss(root, x, y)
    said = [str(each.message).split()[1] for each in found if "tiled_loss" in str(each.message)]
    assert len(said) == len(set(said))
    assert set(said) == needed


@pytest.mark.parametrize(("reduction", "passes"), [("mean", 1), ("sum", 1), ("none", 2)])
@pytest.mark.parametrize(("masked", "share"), [(0.9, 0.1), (0.0, 1.0)])
def test_rows_without_a_target_are_skipped(masked: float, share: float, reduction: str, passes: int) -> None:
    root = Holder("head", nn.Linear(D, V))
    x, y = torch.randn(2, 500, D, requires_grad=True), targets((2, 500), V, masked)
    rows = []
    plain = root.head.forward

    def count(x: Tensor) -> Tensor:
        rows.append(x.numel() // D)
        return plain(x)

    root.head.forward = count  # type: ignore[method-assign]
    with tiled(root, tiled_loss=["head"], tile_tokens=32):
        root(x)
        rows.clear()
        F.cross_entropy(root(x).view(-1, V), y.view(-1), reduction=reduction).sum().backward()
    assert max(rows) == 32
    assert sum(rows) == passes * int((y != -100).sum())
    assert sum(rows) / 1000 / passes == pytest.approx(share, abs=0.03)


def test_keeps_no_logits() -> None:
    def kept(root: nn.Module) -> int:
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = F.cross_entropy(root(x).view(-1, V).float(), y.view(-1))
        assert loss.requires_grad
        return sum(found.values())

    root = Holder("head", nn.Linear(D, V))
    x, y = torch.randn(2, 100, D, requires_grad=True), targets((2, 100), V)
    whole = kept(root)
    with tiled(root, tiled_loss=["head"], tile_tokens=8):
        root(x)
        # The gradients of hidden states and head.
        gradients = x.numel() + V * D + V
        assert kept(root) <= gradients * 4 + 8
    assert whole > 200 * V * 4


def test_values_and_metrics() -> None:
    root = Holder("head", nn.Linear(D, V))
    x = torch.randn(2, 13, D, requires_grad=True)
    wanted = root(x)
    with tiled(root, tiled_loss=["head"], tile_tokens=4), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = root(x)
        assert isinstance(logits, DeferredLogits)
        assert logits.shape == wanted.shape and logits.dtype == wanted.dtype and logits.requires_grad
        assert torch.equal(logits.argmax(-1), wanted.argmax(-1))
        assert torch.equal(logits.detach(), wanted.detach()) and not logits.detach().requires_grad
        # Nothing of that keeps all logits for the backward.
        assert logits.computed is None
        assert type(realized({"a": [logits]})["a"][0]) is Tensor
        assert type(torch.stack([logits, logits])) is Tensor
        with torch.no_grad():
            assert type(root(x)) is Tensor
    assert type(root(x)) is Tensor


def test_in_evaluation() -> None:
    root = Holder("head", nn.Linear(D, V)).eval()
    x, y = torch.randn(2, 13, D), targets((2, 13), V)
    wanted = F.cross_entropy(root(x).view(-1, V), y.view(-1))
    for mode in (torch.no_grad, torch.inference_mode):
        with tiled(root, tiled_loss=["head"], tile_tokens=4), mode():
            logits = root(x)
            assert isinstance(logits, DeferredLogits)
            assert torch.allclose(F.cross_entropy(logits.view(-1, V), y.view(-1)), wanted)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


@pytest.mark.filterwarnings("ignore:tiled_loss")
def test_functions_that_ask_no_tensor_are_refused() -> None:
    """Their gradient would be lost. What the message says helps."""
    root = Holder("head", nn.Linear(D, V))
    x = torch.randn(2, 13, D)
    with tiled(root, tiled_loss=["head"]):
        with pytest.raises(UlyssesError, match=r"logits\.clone\(\)"):
            Square.apply(root(x)).sum().backward()
        Square.apply(root(x).clone()).sum().backward()
    assert root.head.weight.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", ["head", "loss"])
def test_under_a_checkpoint(inside: str, reentrant: bool) -> None:
    torch.manual_seed(0)
    root = Holder("head", nn.Linear(D, V)).double()
    plain = copy.deepcopy(root)
    x, y = torch.randn(2, 13, D, dtype=torch.float64), targets((2, 13), V)

    def run(head: nn.Module, x: Tensor) -> Tensor:
        if inside == "head":
            return F.cross_entropy(checkpoint(head, x, use_reentrant=reentrant).view(-1, V), y.view(-1))
        whole = lambda x: F.cross_entropy(head(x).view(-1, V), y.view(-1))  # noqa: E731
        return checkpoint(whole, x, use_reentrant=reentrant)

    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    run(plain, a).backward()
    with tiled(root, tiled_loss=["head"], tile_tokens=4):
        run(root, b).backward()
    assert largest((relative(b.grad, a.grad), worst(root, plain))) <= 1e-13


def test_hooks_of_the_head_see_logits() -> None:
    root, seen = Holder("head", nn.Linear(D, V)), []
    root.head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    x, y = torch.randn(2, 13, D), targets((2, 13), V)
    with tiled(root, tiled_loss=["head"]), pytest.warns(UserWarning, match="a hook of the module"):
        F.cross_entropy(root(x).view(-1, V), y.view(-1))
    assert seen == [(2, 13, V)]


def test_a_head_that_draws_is_refused() -> None:
    root = Holder("head", nn.Sequential(nn.Dropout(0.1), nn.Linear(D, V)))
    with tiled(root, tiled_loss=["head"]), pytest.raises(UlyssesError, match="draws random numbers"):
        root(torch.randn(2, 13, D))


def test_lora_on_the_head() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(D, D), nn.Linear(D, V)).double()
    root = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["1"], init_lora_weights=False), base)
    root.double()
    plain = copy.deepcopy(root)
    x, y = torch.randn(2, 13, D, dtype=torch.float64), targets((2, 13), V)
    F.cross_entropy(plain(x).view(-1, V), y.view(-1)).backward()
    with tiled(root, tiled_loss=["1"], tile_tokens=4):
        F.cross_entropy(root(x).view(-1, V), y.view(-1)).backward()
    assert worst(root, plain) <= 1e-12
    assert sum(p.grad is not None for p in root.parameters()) == 2


SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 101,
    "num_key_value_heads": 2, "head_dim": 8, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
HEADS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama tied": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Gemma2": {"final_logit_softcapping": 3.0, "tie_word_embeddings": True},
    "Gemma3Text": {"final_logit_softcapping": 3.0},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 2.0},
    "Mixtral": {"num_local_experts": 4, "output_router_logits": True},
    "Bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "GPTNeoX": {},
    "Phi3": {},
    "Olmo2": {},
}


def hugging_face(name: str) -> nn.Module:
    import transformers

    kind = name.split()[0]
    config = getattr(transformers, f"{kind}Config")(**SMALL, **HEADS[name])
    ends = {"Bert": "BertForMaskedLM", "GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
    model: nn.Module = getattr(transformers, ends.get(kind, f"{kind}ForCausalLM"))(config)
    return model.train()


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_transformers(name: str) -> None:
    """Unchanged models: loss and gradients, with every part that suits the model."""
    torch.manual_seed(1)
    root = hugging_face(name)
    plain = copy.deepcopy(root)
    ids, labels = torch.randint(5, 99, (2, 21)), torch.randint(5, 99, (2, 21))
    labels[:, :5] = -100
    wanted = plain(input_ids=ids, labels=labels).loss
    (wanted * 7).backward()
    with tiled(root, tiled_loss=True, tiled_norm=True, tile_tokens=10), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        output = root(input_ids=ids, labels=labels)
        assert isinstance(output.logits, DeferredLogits)
        (output.loss * 7).backward()
    assert relative(output.loss.detach(), wanted.detach()) <= 1e-6
    assert worst(root, plain) <= 1e-6
