"""The auxiliary loss of a mixture of experts is that of all tokens of a batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from models import VOCAB, count_targets, token_batch
from torch import Tensor

from lightning_ulysses import UlyssesError
from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.interceptors.transformers import attention as huggingface
from lightning_ulysses.interceptors.transformers import router_loss as router
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool


class Mixtral(L.LightningModule):
    """Experts with an auxiliary loss as large as the other one."""

    def __init__(self, by_call: bool = False) -> None:
        super().__init__()
        from transformers import MixtralConfig, MixtralForCausalLM

        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            output_router_logits=not by_call,
            router_aux_loss_coef=1.0,
            initializer_range=0.2,
        )
        config._attn_implementation = "sdpa"
        self.model = MixtralForCausalLM(config)
        self.extra = {"output_router_logits": True} if by_call else {}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch, **self.extra).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def padded(seed: int, labels: str = "uneven") -> dict[str, Tensor]:
    """Two rows, one padded on the left, one on the right."""
    batch = token_batch(seed, 33, 2, labels)
    mask = torch.ones(2, 33, dtype=torch.long)
    mask[0, :5], mask[1, -9:] = 0, 0
    batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    return {**batch, "attention_mask": mask}


# Slices without a target, batches of different numbers of targets, two groups and two micro-batches.
PADDED = [padded(0), padded(1, "first_half"), padded(2, "first_half"), padded(3)]
PLAIN = [token_batch(seed, 33, 2, "uneven") for seed in range(2)]
CASES: dict[str, tuple[Any, list[Any], list[list[Any]], SplitRun]] = {
    "padding, two groups": (Mixtral, PADDED, [PADDED], SplitRun(4, 2, trainer={"accumulate_grad_batches": 2})),
    "stage 3": (Mixtral, PLAIN, [[batch] for batch in PLAIN], SplitRun(3, 3, {"stage": 3})),
    "asked for in the call": (partial(Mixtral, True), PLAIN, [[batch] for batch in PLAIN], SplitRun()),
    "padded by the strategy": (
        Mixtral,
        PLAIN,
        [[batch] for batch in PLAIN],
        SplitRun(strategy={"pad_to_multiple_of": 8}),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_exact(pool: ProcessPool, case: str) -> None:
    make, batches, steps, run = CASES[case]
    reference = fit_single(make, steps, count_targets)
    assert largest(compare(result, reference).largest for result in fit_split(pool, make, batches, run)) <= 1e-5


def without_exchange(rank: int, run: SplitRun) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "install_router", lambda *args: None)
        return fit_rank(rank, Mixtral, PLAIN, run)


def test_a_loss_of_the_slice_alone_is_wrong(pool: ProcessPool) -> None:
    reference = fit_single(Mixtral, [[batch] for batch in PLAIN], count_targets)
    result = pool.run(without_exchange, SplitRun(strategy={"check_model": False}), world_size=2)[0]
    assert compare(result, reference).largest > 1e-4


def test_the_loss_is_that_of_transformers() -> None:
    from transformers.models.mixtral import modeling_mixtral
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    torch.manual_seed(0)
    logits = tuple(torch.randn(10, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    for module in (modeling_mixtral, modeling_qwen3_moe):
        theirs = module.load_balancing_loss_func(logits, 8, 2, mask)
        ours = router.balance_loss(router.balance_sums(logits, 8, 2, mask.flatten().float()))
        assert torch.allclose(ours, theirs, rtol=1e-6)
        for mine, wanted in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits), strict=True):
            assert torch.allclose(mine, wanted, rtol=1e-5, atol=1e-9)


def test_another_formula_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mixtral import modeling_mixtral

    original = modeling_mixtral.load_balancing_loss_func
    model = Mixtral().model
    router.check_router(model)

    def doubled(gate_logits: Any, num_experts: Any = None, top_k: int = 2, attention_mask: Any = None) -> Any:
        return 2 * original(gate_logits, num_experts, top_k, attention_mask)

    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", doubled)
    with pytest.raises(UlyssesError, match="MixtralForCausalLM with output_router_logits=True"):
        router.check_router(model)
    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", lambda gate_logits: 0)
    with pytest.raises(UlyssesError, match="output_router_logits = False"):
        router.check_router(model)
