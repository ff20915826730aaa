"""Code that is written for a whole sequence, on slices of it: the same values and gradients, and what stays divided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lightning_ulysses import UlyssesError, gather_sequence
from lightning_ulysses.divided import Divided, Division
from lightning_ulysses.exchange.mesh import MeshSizes, SequenceMesh
from lightning_ulysses.geometry.shares import even_shares, starts
from lightning_ulysses.testing import ProcessPool

B, V = 4, 5


class Square(torch.autograd.Function):
    """Asks no tensor what it stands for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x * x).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0] * ctx.saved_tensors[0]


Case = Callable[[Tensor, Tensor, Tensor, Tensor], Any]


def log_probabilities(x: Tensor, y: Tensor) -> Tensor:
    # (B, S, V), (B, S) -> (B, S)
    return x.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).squeeze(-1) * (y != -100)


def shifted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :-1], y[:, 1:]


def dpo(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    chosen, rejected = log_probabilities(*shifted(x, y)).sum(-1).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def orpo(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    t = log_probabilities(x, y).sum(1) / (y != -100).sum(1).clamp(min=1)
    c, r = t[:2], t[2:]
    return (-c - 0.1 * F.logsigmoid(c - r - (torch.log1p(-c.exp()) - torch.log1p(-r.exp())))).mean()


def inplace(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    z = x * 2
    z.div_(3).masked_fill_(mask[..., None] == 0, 0.5)
    z[..., 1] = 0.25
    z[:, 2] += 1
    return z.pow(2).sum()


def through_a_view(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    z = x * 2
    z.flatten(0, 1)[y.flatten() > 1, 0] = 0.5
    return z.pow(2).sum()


def inverted(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    large = x > 0
    small = ~large
    return (x * large).sum() + 3 * (x * small).square().mean()


# What to compute of scores x (B, S, V), labels y and a mask (B, S), and a weight w (V, V); whether x is never joined.
CASES: dict[str, tuple[Case, bool]] = {
    "cross entropy": (lambda x, y, m, w: F.cross_entropy(x.flatten(0, 1), y.flatten()), True),
    "of views": (lambda x, y, m, w: F.cross_entropy(x.view(-1, x.size(-1)), y.view(-1), ignore_index=-100), True),
    "transposed": (lambda x, y, m, w: F.cross_entropy(x.transpose(1, 2), y, label_smoothing=0.1), True),
    "summed": (lambda x, y, m, w: F.cross_entropy(x.double().flatten(0, 1), y.flatten(), reduction="sum") / 7, True),
    "shifted": (
        lambda x, y, m, w: F.cross_entropy(shifted(x, y)[0].reshape(-1, V), shifted(x, y)[1].reshape(-1)), True,
    ),
    "shifted contiguous": (
        lambda x, y, m, w: F.cross_entropy(x[..., :-1, :].contiguous().view(-1, V), y[..., 1:].contiguous().view(-1)),
        True,
    ),
    "weighted classes": (
        lambda x, y, m, w: F.cross_entropy(x.flatten(0, 1), y.flatten(), weight=w[0].detach().abs()), True,
    ),
    "soft targets": (
        lambda x, y, m, w: F.cross_entropy(x.flatten(0, 1), F.one_hot(y.clamp(0), V).to(x).flatten(0, 1)), True,
    ),
    "nll": (lambda x, y, m, w: F.nll_loss(x.log_softmax(-1).flatten(0, 1), y.flatten()), True),
    "each": (
        lambda x, y, m, w: (
            (F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="none").view(B, -1) * m).sum() / m.sum()
        ),
        True,
    ),
    "dpo": (dpo, True),
    "orpo": (orpo, True),
    "row means": (lambda x, y, m, w: -(log_probabilities(x, y).sum(1) / (y != -100).sum(1)).mean(), True),
    "focal": (lambda x, y, m, w: ((1 - log_probabilities(x, y).exp()) ** 2 * log_probabilities(x, y)).mean(), True),
    "last token": (lambda x, y, m, w: x[:, -1].pow(2).mean() + x[:, 0, 1:3].sum(), True),
    "eos token": (lambda x, y, m, w: x[..., 0].gather(1, m.sum(1, keepdim=True) - 1).sigmoid().sum(), False),
    "by rows": (
        lambda x, y, m, w: x[torch.arange(B), m.sum(1) - 1].sigmoid().sum() + x[m[:, 0], -m[:, 1]].sum(), True,
    ),
    "mean pooling": (lambda x, y, m, w: ((x * m[..., None]).sum(1) / m.sum(1)[:, None]).sigmoid().sum(), True),
    "centered": (lambda x, y, m, w: (x - x.mean(1, keepdim=True)).pow(2).mean(), True),
    "z-loss": (lambda x, y, m, w: x.logsumexp(-1).pow(2).mean() + x.logsumexp(-1)[m.bool()].sum(), True),
    "two ahead": (lambda x, y, m, w: 0.3 * F.cross_entropy(x[:, :-2].flatten(0, 1), y[:, 2:].flatten()), True),
    "positions": (lambda x, y, m, w: (x * torch.arange(x.shape[1])[None, :, None]).sin().mean(), True),
    "noise": (lambda x, y, m, w: (torch.manual_seed(3), (x + torch.randn(x.shape).to(x)).pow(2).mean())[1], True),
    "drawn alike": (lambda x, y, m, w: (torch.manual_seed(3), (x + torch.randn_like(x)).pow(2).mean())[1], False),
    "dropout": (lambda x, y, m, w: (torch.manual_seed(3), F.dropout(x, 0.3).pow(2).mean())[1], True),
    "running sum": (lambda x, y, m, w: x.cumsum(1).sin().mean() + x.cumsum(-1).cos().mean(), False),
    "chosen tokens": (lambda x, y, m, w: F.cross_entropy(x[m.bool()], y[m.bool()]) + x[y > 0].square().mean(), True),
    "chosen of a list": (
        lambda x, y, m, w: (x.flatten(0, 1)[m.flatten().bool()] * x[m.bool()]).view(-1, 1, V).mean(), True,
    ),
    "chosen and sorted": (lambda x, y, m, w: x[m.bool()].cumsum(0).sin().mean(), False),
    "largest": (lambda x, y, m, w: x.amax(1).sum() + x.min() + x.logsumexp(1).sum(), False),
    "a layer": (lambda x, y, m, w: F.gelu(F.layer_norm(F.linear(x, w, w[0]), (V,), w[1], w[2])).matmul(w).mean(), True),
    "heads": (lambda x, y, m, w: (x[..., :4].unflatten(-1, (2, 2)).transpose(1, 2) @ w[:2, :2]).std(), False),
    "similarity": (lambda x, y, m, w: F.cosine_similarity(x, x.flip(-1).detach(), dim=-1).mean(), True),
    "normalized": (lambda x, y, m, w: F.normalize(x, dim=-1).amax(-1).sum() + x.max(-1).values.sum(), True),
    "regression": (lambda x, y, m, w: F.mse_loss(x, m[..., None].to(x).expand(x.shape)), True),
    "next step": (lambda x, y, m, w: F.smooth_l1_loss(x[:, :-1, 0], m[:, 1:].to(x)), True),
    "binary": (
        lambda x, y, m, w: F.binary_cross_entropy_with_logits(x[..., 0], m.to(x), pos_weight=w[0, :1].detach().abs()),
        True,
    ),
    "kl": (
        lambda x, y, m, w: F.kl_div(
            x.log_softmax(-1), (x.detach() * 2).log_softmax(-1), log_target=True, reduction="batchmean"
        ),
        True,
    ),
    "experts": (lambda x, y, m, w: x.topk(2, dim=-1).values.softmax(-1).prod(-1).sum(0).sum(), True),
    "layers side by side": (
        lambda x, y, m, w: torch.stack([torch.cat([x, x * 2], -1)[..., 3:], x[..., :1].expand(-1, -1, 7)]).mean(), True,
    ),
    "inplace": (inplace, False),
    "through a view": (through_a_view, False),
    "inverted": (inverted, True),
    "bits": (lambda x, y, m, w: (x.detach().view(dtype=torch.int64) % 7).sum() * x.sum(), False),
    "complex": (lambda x, y, m, w: (x.to(torch.complex128) * (1 + 2j)).sum((0, 1)).abs().sum(), True),
    "data": (lambda x, y, m, w: ((z := x * 2).data.clamp_(-1, 1), z.pow(2).sum())[1], True),
    "a function of one's own": (lambda x, y, m, w: Square.apply(gather_sequence(x)), False),
    "where": (lambda x, y, m, w: torch.where(m[..., None].bool(), x, -1.0).clamp(-0.5, 0.5).sum((0, 1)).norm(), True),
    "operators": (lambda x, y, m, w: (1 - x / 2 + 2**x - (-x)).mean((1, 2)).square().sum(), True),
    "rows": (lambda x, y, m, w: torch.stack([part * i for i, part in enumerate(x.unbind(0))]).mean() + len(x), True),
    "rows in a row": (lambda x, y, m, w: torch.cat([*x]).pow(2).mean(), False),
    "numbers": (lambda x, y, m, w: (x * float(x.detach().mean())).sum() / x.numel(), True),
    "pairs": (lambda x, y, m, w: (x @ x.transpose(1, 2)).softmax(-1).diagonal(dim1=1, dim2=2).sum(), False),
}  # fmt: skip


def tensors(seq_len: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, seq_len, V, generator=generator, dtype=torch.float64)
    y = torch.randint(0, V, (B, seq_len), generator=generator)
    y[:, : seq_len // 4] = -100
    y[1, : seq_len - 3] = -100
    mask = (torch.arange(seq_len) < seq_len - 3 * torch.arange(B)[:, None] % 5).long()
    return x, y, mask, torch.randn(V, V, generator=generator, dtype=torch.float64)


def on_whole(case: Case, seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    x, y, mask, w = tensors(seq_len)
    x, w = x.requires_grad_(), w.requires_grad_()
    loss = case(x.clone(), y, mask, w)
    loss.backward()
    assert x.grad is not None
    return loss.detach(), x.grad, torch.zeros_like(w) if w.grad is None else w.grad


def on_slices(rank: int, seq_len: int) -> dict[str, tuple[Tensor, Tensor, Tensor, int]]:
    """For each case the value, the gradients of slice and weight, and how often something was joined."""
    dist.init_process_group("gloo")
    mesh = SequenceMesh.create(MeshSizes(sp_size=dist.get_world_size(), dp_size=1), "cpu")
    division = Division(1, ((*starts(even_shares(seq_len, mesh.sp_size)), seq_len),), mesh)
    joins: list[Any] = []
    join = Division.join

    def counted(self: Division, part: Tensor) -> Tensor:
        joins.append(part)
        return join(self, part)

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Division, "join", counted)
        for name, (case, _) in CASES.items():
            x, y, mask, w = tensors(seq_len)
            part, w = division.cut(x, 1).clone().requires_grad_(), w.requires_grad_()
            value = case(Divided(part.clone(), division), y, mask, w)
            # Every rank has the value, and a part of the gradient.
            (value / mesh.sp_size).backward()
            assert part.grad is not None
            found[name] = value.detach(), part.grad, torch.zeros_like(w) if w.grad is None else w.grad, len(joins)
            joins.clear()
    x = Divided(division.cut(tensors(seq_len)[0], 1).requires_grad_(), division)
    with pytest.raises(UlyssesError, match=r"gather_sequence\(x\)"):
        Square.apply(x).backward()
    for wrong in (lambda: x[torch.arange(B), torch.full((B,), seq_len)], lambda: (x * 1).unsqueeze_(0)):
        with pytest.raises((IndexError, NotImplementedError)):
            wrong()
    return found


@pytest.mark.parametrize(("size", "seq_len"), [(2, 16), (2, 17), (4, 15)])
def test_values_and_gradients(pool: ProcessPool, size: int, seq_len: int) -> None:
    results = pool.run(on_slices, seq_len, world_size=size)
    for name, (case, stays) in CASES.items():
        value, of_x, of_w = on_whole(case, seq_len)
        values, parts, of_weights, joins = zip(*(result[name] for result in results), strict=True)
        for own in values:
            assert torch.allclose(own, value, atol=1e-10), name
        assert float((torch.cat(parts, dim=1) - of_x).norm() / of_x.norm()) < 1e-10, name
        assert float((sum(of_weights) - of_w).norm()) <= 1e-10 * max(float(of_w.norm()), 1.0), name
        assert stays == (not any(joins)), (name, joins)
