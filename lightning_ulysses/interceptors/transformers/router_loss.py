r"""The auxiliary loss of a mixture of experts, which balances the load of the experts over all tokens of a batch.

With L layers, E experts and t tokens that the attention mask keeps, it is

    A = E * sum_e f_e * p_e,    f_e = (choices of e) / (L * t),    p_e = mean probability of e.

A product of means cannot be computed from one slice. So the ranks of a group exchange the sums, 2 E + 1 numbers, and A
is the same on each of them. Rank r weights its loss by n_r * W / N (`loss.token_mean`), and ZeRO averages over W. The
backward of the exchange sums the gradients of all ranks. So A counts n / N in the step for a batch of n targets, like
the mean over tokens to which it is added.

A batch here is one micro-batch of one group. One process that takes these batches one by one has the same A. All
batches of a step as one large batch would have another A.

Source: transformers ``load_balancing_loss_func`` of ``models/*/modeling_*.py``; Switch Transformers, arXiv 2101.03961.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.cut_and_join import sum_over_ranks
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.patching.outside_graphs import eager

FUNCTION = "load_balancing_loss_func"
_PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


def balance_sums(gate_logits: tuple[Tensor, ...], num_experts: int, top_k: int, kept: Tensor) -> Tensor:
    """The sums over some tokens from which the loss is computed.

    Args:
        gate_logits: For each layer (tokens, E).
        num_experts: E.
        top_k: Number of experts for each token.
        kept: (tokens,) float32, the weight of each token: 0 for padding.

    Returns:
        (2 E + 1,) float32 over all layers: choices of each expert, sum of its probabilities, number of tokens.
    """
    device = gate_logits[0].device
    chosen = torch.zeros(num_experts, device=device)
    likely = torch.zeros(num_experts, device=device)
    kept = kept.to(device)
    for layer in gate_logits:
        weights = torch.softmax(layer.to(device), dim=-1)
        experts = weights.topk(top_k, dim=-1).indices
        # (tokens, top_k) -> (tokens * top_k,), the choices of one token next to each other
        chosen = chosen.scatter_add(0, experts.reshape(-1), kept.repeat_interleave(top_k))
        likely = likely + (weights.float() * kept[:, None]).sum(dim=0)
    return torch.cat([chosen, likely, (len(gate_logits) * kept.sum())[None]])


def balance_loss(sums: Tensor) -> Tensor:
    """A from the sums over all tokens, (2 E + 1,) -> ()."""
    experts = (sums.numel() - 1) // 2
    chosen, likely, count = sums[:experts], sums[experts:-1], sums[-1]
    return experts * (chosen / count * (likely / count)).sum()


def _same_formula(original: Callable[..., Any]) -> bool:
    """Whether a model's own function computes A, tested on a few random tokens with and without a mask."""
    if list(inspect.signature(original).parameters) != _PARAMETERS:
        return False
    random = torch.Generator().manual_seed(0)
    # Two layers, six tokens, four experts; the masks leave out the third and fourth token.
    logits = tuple(torch.randn(6, 4, generator=random) for _ in range(2))
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    for given, kept in ((None, torch.ones(6)), (mask, mask.flatten().float())):
        theirs = original(logits, 4, 2, given)
        if not torch.allclose(theirs, balance_loss(balance_sums(logits, 4, 2, kept)), rtol=1e-4):
            return False
    return True


def _kept(gate_logits: tuple[Tensor, ...], attention_mask: Tensor | None, batch: LocalBatch, share: int) -> Tensor:
    """(B * S_r,) float32: 1 for tokens of the slice that the attention mask keeps, else 0."""
    tokens = gate_logits[0].shape[0]
    # Models flatten rows and tokens, and the mask must describe the same tokens.
    fits = all(layer.dim() == 2 and layer.shape[0] == tokens for layer in gate_logits) and tokens % share == 0
    if not fits or (attention_mask is not None and attention_mask.shape != (tokens // share, share)):
        raise UlyssesError(
            f"router logits of shapes {sorted({tuple(layer.shape) for layer in gate_logits})} with an attention mask "
            f"of {None if attention_mask is None else tuple(attention_mask.shape)} on a slice of {share} tokens",
            "(B * S_r, experts) for each layer, and a 2-D padding mask (B, S_r) at most",
            "set config.output_router_logits = False",
        )
    mask = torch.ones(tokens // share, share) if attention_mask is None else attention_mask
    # (B, S_r) -> (B * S_r,)
    return mask.reshape(-1).float()


def _wrap(context: SequenceContext, original: Callable[..., Any], owner: str) -> Callable[..., Any]:
    # Filled by the first call: most models never compute this loss.
    tried: list[bool] = []

    def load_balancing_loss_func(
        gate_logits: Any, num_experts: int | None = None, top_k: int = 2, attention_mask: Tensor | None = None
    ) -> Any:
        batch, mesh, place = context.split, context.mesh, context.place
        if place.takes_calls:
            # Exact by its exchange. Without it the trial sees a mean over targets alone.
            return original(gate_logits, num_experts, top_k, attention_mask) * 0
        if batch is None or mesh.sp_group is None or not isinstance(gate_logits, tuple):
            return original(gate_logits, num_experts, top_k, attention_mask)
        if not tried:
            tried.append(_same_formula(original))
        if not tried[0] or num_experts is None:
            raise _unknown(owner)
        layout, share = batch.layout, batch.layout.shares[mesh.sp_rank]
        kept = _kept(gate_logits, attention_mask, batch, share)
        if layout.num_padding:
            # Padding that this package added does not exist in one process.
            positions = torch.arange(share, device=kept.device) + layout.starts[mesh.sp_rank]
            kept = kept * (positions < layout.real_len).repeat(kept.numel() // share)
        sums = balance_sums(gate_logits, num_experts, top_k, kept)
        return balance_loss(sum_over_ranks(sums, mesh.sp_group))

    return eager(functools.wraps(original)(load_balancing_loss_func))


def _unknown(owner: str) -> UlyssesError:
    return UlyssesError(
        f"{owner} with output_router_logits=True",
        f"no auxiliary loss of the router, or the usual one, {FUNCTION}(gate_logits, num_experts, top_k, "
        "attention_mask), whose means over all tokens can be exchanged",
        "set config.output_router_logits = False",
    )


def check_router(model: nn.Module) -> None:
    """Refuses a model with ``output_router_logits=True`` whose auxiliary loss is not the usual one.

    Raises:
        UlyssesError: With the name of the model.
    """
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        functions = [getattr(module, FUNCTION) for module in _modules_of(model)]
        if not functions or not all(_same_formula(function) for function in functions):
            raise _unknown(type(model).__name__)


def _modules_of(model: nn.Module) -> list[Any]:
    modules = [sys.modules.get(kind.__module__) for kind in type(model).__mro__]
    return [module for module in dict.fromkeys(modules) if module is not None and hasattr(module, FUNCTION)]


def install_router(context: SequenceContext, handle: Handle, models: Sequence[nn.Module]) -> None:
    """Patches the auxiliary loss of transformers models to cover all tokens of a batch that is cut.

    Args:
        context: Tells what is split at this moment.
        handle: Takes the undo.
        models: The transformers models.
    """
    # Every modeling file has a function of its own, also those of base classes.
    owners = {module: type(model).__name__ for model in models for module in _modules_of(model)}
    for module, owner in owners.items():
        handle.patch(module, FUNCTION, _wrap(context, getattr(module, FUNCTION), owner))
