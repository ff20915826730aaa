"""What is refused once processes run: raised on every rank, so that none waits for another."""

from __future__ import annotations

import math
from functools import partial
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from models import VOCAB, Block, HandWritten, LlamaModule, llama, pair_batch, token_batch
from torch import Tensor, nn

from lightning_ulysses import UlyssesError
from lightning_ulysses.testing import SplitRun, fit_rank
from lightning_ulysses.testing.processes import ProcessPool, RemoteError


class ByHand(HandWritten):
    """Attention that nothing intercepts."""

    def __init__(self) -> None:
        super().__init__()

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(-1) @ v

        for block in self.blocks:
            assert isinstance(block, Block)
            block.attend = attend  # type: ignore[method-assign]


class LocalMask(HandWritten):
    def forward(self, x: Tensor) -> Tensor:
        q = self.embed(x).unsqueeze(1)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return self.head(F.scaled_dot_product_attention(q, q, q, attn_mask=mask).squeeze(1))


class ShiftsInside(HandWritten):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch["input_ids"])[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())


class TwoBackwards(HandWritten):
    def __init__(self) -> None:
        super().__init__(manual=True)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(2):
            self.manual_backward(self._loss(batch))


class TwoBatches(HandWritten):
    """Manual optimisation that steps only every second batch."""

    def __init__(self) -> None:
        super().__init__(manual=True)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self._loss(batch))
        if batch_idx % 2:
            optimizer: Any = self.optimizers()
            optimizer.step()


class TakesIterator(HandWritten):
    def training_step(self, dataloader_iter: Any) -> Any:
        raise NotImplementedError


class LateLabels(LlamaModule):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "labels": batch["labels"].masked_fill(batch["input_ids"] < 20, -100)}


class OwnLabels(LlamaModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch["input_ids"], labels=(batch["input_ids"] + 1) % VOCAB).loss


class OtherForward(LlamaModule):
    """Runs the model on data of its own inside the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.model(input_ids=torch.ones(1, 8, dtype=torch.int64))
        return super().training_step(batch, batch_idx)


class Wrapper(L.LightningModule):
    """Holds a transformers model that is refused before any step."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model = self._make(kind)

    @staticmethod
    def _make(kind: str) -> nn.Module:
        import transformers

        sizes = {"vocab_size": VOCAB, "num_attention_heads": 2, "num_hidden_layers": 1}
        if kind == "doge":
            small = {"hidden_size": 8, "intermediate_size": 8, "num_key_value_heads": 2}
            return transformers.DogeForCausalLM(transformers.DogeConfig(**sizes, **small, output_router_logits=True))
        config = transformers.BartConfig(
            vocab_size=VOCAB,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
        )
        return transformers.BartForConditionalGeneration(config)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(world: int = 2, sp: int = 2, strategy: dict[str, Any] | None = None, **trainer: Any) -> SplitRun:
    return SplitRun(world, sp, {"split": "batch", **(strategy or {})}, trainer)


TOKENS, PAIRS = [token_batch(1, 33, 2), token_batch(2, 33, 2)], [pair_batch(1, 33, 2), pair_batch(2, 33, 2)]
CASES: dict[str, tuple[Any, list[Any], SplitRun, tuple[str, ...]]] = {
    "sp_size": (llama(), TOKENS, run(4, 3), ("sp_size=3", "world of 4 processes", "[1, 2, 4]")),
    "product": (llama(), TOKENS, run(4, 2, {"dp_shard_size": 1}), ("= 2", "world size, 4", "dp_shard_size=2")),
    "short": (llama(), [token_batch(1, 3)], run(4, 4), ("3 tokens per row for sp_size=4",)),
    "batch": (
        llama(),
        [{"tokens": TOKENS[0]["input_ids"]}],
        run(),
        ("'tokens': (2, 33) int64", "sequence_dims={'tokens': 1}"),
    ),
    "4-D mask": (
        llama(),
        [{**TOKENS[0], "attention_mask": torch.ones(2, 1, 33, 33)}],
        run(),
        ("batch['attention_mask'] of shape (2, 1, 33, 33)", "only locally"),
    ),
    "local mask": (LocalMask, PAIRS, run(), ("attention mask of shape (17, 17) inside a step", "is_causal=True")),
    "by hand, not checked": (
        ByHand,
        PAIRS,
        run(strategy={"check_model": False}),
        ("training_step of ByHand", "without a single attention call", "scaled_dot_product_attention", "sp_size=1"),
    ),
    "value clipping": (
        llama(),
        TOKENS,
        run(gradient_clip_val=1.0, gradient_clip_algorithm="value"),
        ("gradient_clip_algorithm='value'", "'norm'"),
    ),
    "eager": (
        llama(implementation="eager"),
        TOKENS,
        run(),
        ("LlamaForCausalLM", "attn_implementation='eager'", "attn_implementation='sdpa'"),
    ),
    "encoder-decoder": (
        partial(Wrapper, "bart"),
        TOKENS,
        run(),
        ("encoder.embed_positions", "split='auto'", "'cross'"),
    ),
    "router": (partial(Wrapper, "doge"), TOKENS, run(), ("DogeForCausalLM", "output_router_logits=True")),
    "labels of its own": (
        OwnLabels,
        TOKENS,
        run(),
        ("labels of shape (2, 17)", "neither batch['labels'] nor batch['input_ids']", "collate function"),
    ),
    "shifts inside": (
        ShiftsInside,
        TOKENS,
        run(),
        ("no mean over tokens", "use batch['shift_labels']"),
    ),
    "two backwards": (TwoBackwards, PAIRS, run(), ("2 backward passes", "add the losses before backward")),
    "two batches": (TwoBatches, PAIRS, run(), ("2 backward passes", "automatic optimization to accumulate")),
    "iterator": (TakesIterator, PAIRS, run(), ("TakesIterator.training_step(dataloader_iter)",)),
    "late labels": (
        LateLabels,
        TOKENS,
        run(accumulate_grad_batches=2),
        ("when the dataloader yielded it", "'labels': 66.0", "on_before_batch_transfer"),
    ),
    "another forward": (
        OtherForward,
        TOKENS,
        run(),
        ("the queries of attention call 0", "'model.model.layers.0", "sp_size=1"),
    ),
    "another forward, not checked": (
        OtherForward,
        TOKENS,
        run(strategy={"check_model": False}),
        ("over 8 tokens", "of the batch's 33", "unsharded()"),
    ),
    "targets": (llama(), TOKENS, run(strategy={"targets": "label"}), ("targets='label'", "'shift_labels'")),
}


def refused(rank: int, make: Any, batches: list[Any], settings: SplitRun) -> UlyssesError:
    with pytest.raises(UlyssesError) as caught:
        fit_rank(rank, make, batches, settings)
    return caught.value


def assert_refused(errors: list[UlyssesError], parts: tuple[str, ...]) -> None:
    assert all(isinstance(error, UlyssesError) for error in errors)
    # Other ranks may name another share of the sequence.
    assert [part for part in parts if part not in str(errors[0])] == [], errors[0]


@pytest.mark.parametrize("case", CASES)
def test_every_rank_refuses(pool: ProcessPool, case: str) -> None:
    make, batches, settings, parts = CASES[case]
    assert_refused(pool.run(refused, make, batches, settings, world_size=settings.world_size), parts)


def refused_apart(rank: int, lengths: tuple[int, int]) -> UlyssesError:
    """Each rank reads a dataset of its own, as without a sampler that knows about groups."""
    return refused(rank, LlamaModule, [token_batch(rank, lengths[rank])], run())


@pytest.mark.parametrize("lengths", [(33, 33), (33, 32)])
def test_different_batches_in_one_group(pool: ProcessPool, lengths: tuple[int, int]) -> None:
    errors = pool.run(refused_apart, lengths, world_size=2)
    parts = ("different batches", f"sequence lengths {list(lengths)}", "use_distributed_sampler", "num_replicas")
    assert_refused(errors, parts)


def refused_in_one_group(rank: int) -> UlyssesError:
    """Ranks 0 and 1 agree, ranks 2 and 3 do not."""
    batches = [token_batch(0, 33), token_batch(1 if rank < 3 else 2, 32)]
    return refused(rank, LlamaModule, batches, run(4, 2))


def test_different_batches_in_another_group(pool: ProcessPool) -> None:
    assert_refused(pool.run(refused_in_one_group, world_size=4), ("different batches", "sequence lengths [32, 32]"))


def refused_half_precision(rank: int) -> UlyssesError:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    with mock.patch.object(CPU_Accelerator, "is_fp16_supported", return_value=None):
        return refused(rank, LlamaModule, TOKENS, run(precision="16-mixed"))


def test_half_precision_that_the_device_has_not(pool: ProcessPool) -> None:
    """DeepSpeed would say so, but not what to do."""
    errors = pool.run(refused_half_precision, world_size=2)
    assert_refused(errors, ("precision='16-mixed' on a cpu device", "precision='bf16-mixed'"))


def fail_on_rank_1(rank: int) -> int:
    if rank == 1:
        raise UlyssesError("a", "b", "c")
    return rank


def test_an_error_of_one_rank_comes_back_as_it_was(pool: ProcessPool) -> None:
    with pytest.raises(RemoteError, match="rank 1:") as caught:
        pool.run(fail_on_rank_1, world_size=2)
    assert caught.value.rank == 1 and type(caught.value.cause) is UlyssesError
    assert str(caught.value.cause) == "Got a. Expected b. To fix: c."


def test_without_a_split_nothing_of_this_matters(pool: ProcessPool) -> None:
    for make, batches in ((ByHand, PAIRS), (llama(implementation="eager"), TOKENS), (LocalMask, PAIRS)):
        pool.run(fit_rank, make, batches, run(2, 1), world_size=2)
