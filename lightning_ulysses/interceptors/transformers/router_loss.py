r"""The auxiliary loss of a mixture of experts, which balances the load of all tokens of a batch.

With L layers, E experts and the tokens t that the attention mask keeps, it is

    A = E * sum_e f_e * p_e,    f_e = share of the L * t choices that fell on e,    p_e = mean probability of e,

a product of means, which no rank can take from its own slice. The sums are exchanged, 2 E + 1 numbers, so A is the same
on every rank of the group. Rank r's loss has the weight n_r * W / N of its targets (`loss.token_mean`); ZeRO averages
over W; the gradients that all ranks send to a slice are therefore added up, and A counts n / N in the step for a batch
of n targets: as much as the mean over tokens that it is added to. A batch here is what one group gets in one
micro-batch, as in one process that takes the batches of a step one by one. Of all of them at once, A would be another
number.

Source: transformers ``load_balancing_loss_func`` of ``models/*/modeling_*.py``; Switch Transformers, arXiv 2101.03961.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.loss.evidence import LossEvidence
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.patching.outside_graphs import eager

FUNCTION = "load_balancing_loss_func"
_PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks; backward, each rank's part gets the sum of the gradients that all ranks have for it."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def balance_sums(gate_logits: tuple[Tensor, ...], num_experts: int, top_k: int, kept: Tensor) -> Tensor:
    """What the loss needs to know of some tokens.

    Args:
        gate_logits: For each layer (tokens, E).
        num_experts: E.
        top_k: Experts that each token goes to.
        kept: (tokens,) float32, the weight of each token.

    Returns:
        (2 E + 1,) float32: choices of each expert, sums of its probability, number of tokens, over all layers.
    """
    device = gate_logits[0].device
    chosen = torch.zeros(num_experts, device=device)
    likely = torch.zeros(num_experts, device=device)
    kept = kept.to(device)
    for layer in gate_logits:
        weights = torch.softmax(layer.to(device), dim=-1)
        experts = weights.topk(top_k, dim=-1).indices
        # (tokens, top_k) -> (tokens * top_k,)
        chosen = chosen.scatter_add(0, experts.reshape(-1), kept.repeat_interleave(top_k))
        likely = likely + (weights.float() * kept[:, None]).sum(dim=0)
    return torch.cat([chosen, likely, (len(gate_logits) * kept.sum())[None]])


def balance_loss(sums: Tensor) -> Tensor:
    """A from the sums over all tokens, (2 E + 1,) -> ()."""
    experts = (sums.numel() - 1) // 2
    chosen, likely, count = sums[:experts], sums[experts:-1], sums[-1]
    return experts * (chosen / count * (likely / count)).sum()


def _same_formula(original: Callable[..., Any]) -> bool:
    """Whether a model's own function computes A, tried on a few random tokens with and without a mask."""
    if list(inspect.signature(original).parameters) != _PARAMETERS:
        return False
    random = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(6, 4, generator=random) for _ in range(2))
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    for given, kept in ((None, torch.ones(6)), (mask, mask.flatten().float())):
        theirs = original(logits, 4, 2, given)
        if not torch.allclose(theirs, balance_loss(balance_sums(logits, 4, 2, kept)), rtol=1e-4):
            return False
    return True


def _kept(gate_logits: tuple[Tensor, ...], attention_mask: Tensor | None, batch: LocalBatch, share: int) -> Tensor:
    """(B * S_r,) float32: 1 for the slice's tokens that count."""
    tokens = gate_logits[0].shape[0]
    fits = all(layer.dim() == 2 and layer.shape[0] == tokens for layer in gate_logits) and tokens % share == 0
    if not fits or (attention_mask is not None and attention_mask.shape != (tokens // share, share)):
        raise UlyssesError(
            f"router logits of shapes {sorted({tuple(layer.shape) for layer in gate_logits})} with an attention mask "
            f"of {None if attention_mask is None else tuple(attention_mask.shape)} on a slice of {share} tokens",
            "(B * S_r, experts) for each layer, and a 2-D padding mask (B, S_r) at most",
            "set config.output_router_logits = False",
        )
    mask = torch.ones(tokens // share, share) if attention_mask is None else attention_mask
    return mask.reshape(-1).float()


def _wrap(context: SequenceContext, original: Callable[..., Any], owner: str) -> Callable[..., Any]:
    tried: list[bool] = []

    def load_balancing_loss_func(
        gate_logits: Any, num_experts: int | None = None, top_k: int = 2, attention_mask: Tensor | None = None
    ) -> Any:
        batch, mesh, place = context.split, context.mesh, context.place
        if place.batch is not None:
            place.batch.notes.of(LossEvidence).has_whole_part = True
        if place.is_tried or batch is None or mesh.sp_group is None or not isinstance(gate_logits, tuple):
            return original(gate_logits, num_experts, top_k, attention_mask)
        if not tried:
            tried.append(_same_formula(original))
        if not tried[0] or num_experts is None:
            raise _unknown(owner)
        layout, share = batch.layout, batch.layout.shares[mesh.sp_rank]
        kept = _kept(gate_logits, attention_mask, batch, share)
        if layout.num_padding:
            # Tokens that this package added are none in one process.
            positions = torch.arange(share, device=kept.device) + layout.starts[mesh.sp_rank]
            kept = kept * (positions < layout.real_len).repeat(kept.numel() // share)
        sums = balance_sums(gate_logits, num_experts, top_k, kept)
        return balance_loss(_SumOverRanks.apply(sums, mesh.sp_group))

    return eager(functools.wraps(original)(load_balancing_loss_func))


def _unknown(owner: str) -> UlyssesError:
    return UlyssesError(
        f"{owner} with output_router_logits=True",
        f"no auxiliary loss of the router, or the usual one, {FUNCTION}(gate_logits, num_experts, top_k, "
        "attention_mask), whose means over all tokens can be exchanged",
        "set config.output_router_logits = False",
    )


def check_router(model: nn.Module) -> None:
    """Refuses a model that asks for a router's loss that is not made by a function of the usual kind.

    Raises:
        UlyssesError: Naming the model.
    """
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        functions = [getattr(module, FUNCTION) for module in _modules_of(model)]
        if not functions or not all(_same_formula(function) for function in functions):
            raise _unknown(type(model).__name__)


def _modules_of(model: nn.Module) -> list[Any]:
    modules = [sys.modules.get(kind.__module__) for kind in type(model).__mro__]
    return [module for module in dict.fromkeys(modules) if module is not None and hasattr(module, FUNCTION)]


def install_router(context: SequenceContext, handle: Handle, models: Sequence[nn.Module]) -> None:
    """Has the auxiliary loss of transformers models computed over all tokens of a batch that is cut.

    Args:
        context: Where the step stands.
        handle: Undoes it.
        models: What is trained.
    """
    owners = {module: type(model).__name__ for model in models for module in _modules_of(model)}
    for module, owner in owners.items():
        handle.patch(module, FUNCTION, _wrap(context, getattr(module, FUNCTION), owner))
