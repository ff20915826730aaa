"""Tokens pooled on the way to the loss are refused by the module's name; what looks like it and is not, is exact."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from models import VOCAB, Block
from torch import Tensor, nn

from lightning_ulysses import UlyssesError, sequence_positions
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

WIDTH, ROWS, SEQ_LEN, CLASSES = 32, 3, 33, 5
# No cross entropy over tokens tells here how many targets there are.
MEAN_OF_RANKS = SplitRun(strategy={"sequence_dims": {"labels": None}, "loss_weighting": "none", "split": "batch"})
BY_TOKEN = SplitRun(strategy={"split": "batch"})


def row_batch(seed: int) -> dict[str, Tensor]:
    """One label for each row."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(1, VOCAB, (ROWS, SEQ_LEN), generator=generator),
        "labels": torch.randint(0, CLASSES, (ROWS,), generator=generator),
    }


def token_batch(seed: int) -> dict[str, Tensor]:
    """A label for some of the tokens, to be taken as they are."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCAB, (ROWS, SEQ_LEN), generator=generator)
    labels = torch.randint(0, CLASSES, (ROWS, SEQ_LEN), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.4] = -100
    return {"input_ids": tokens, "shift_labels": labels}


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.block = Block(WIDTH, 4, 4, "causal")

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.embed(x) + self.place(sequence_positions(x)))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, CLASSES)

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        return self.linear(h if context is None else h + context[:, None])


def mean(h: Tensor) -> Tensor:
    return h.mean(1)


def first(h: Tensor) -> Tensor:
    return h[:, 0]


def last(h: Tensor) -> Tensor:
    return h[:, -1]


class Pooled(nn.Module):
    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.body, self.head, self.pool = Body(), Head(), pool

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.body(x)))


class Module(L.LightningModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Inside(Module):
    """A submodule pools."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Pooled(pool)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch["input_ids"]), batch["labels"])


class Between(Module):
    """The step pools, between two submodules."""

    def __init__(self, pool: Any, loss: str = "function") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.pool, self.loss = Body(), Head(), pool, loss
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        h = self.body(batch["input_ids"])
        if self.loss == "module":
            return self.criterion(self.pool(self.head(h)), batch["labels"])
        if self.loss == "context":
            return self.head(h, self.pool(h)).square().mean()
        return F.cross_entropy(self.head(self.pool(h)), batch["labels"])


class Transformers(Module):
    """A classifier of transformers, with the loss in the step or in the model."""

    def __init__(self, family: str, inside: bool = False) -> None:
        super().__init__()
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            pad_token_id=0,
            num_labels=CLASSES,
        )
        config._attn_implementation = "sdpa"
        self.model, self.inside = getattr(transformers, f"{family}ForSequenceClassification")(config), inside

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.inside:
            return self.model(**batch).loss
        return F.cross_entropy(self.model(input_ids=batch["input_ids"]).logits, batch["labels"])


REFUSED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "BERT": (partial(Transformers, "Bert"), ("no mean over tokens", "'model.bert.pooler.dense' (Linear)")),
    "Llama": (partial(Transformers, "Llama"), ("no mean over tokens", "'model' (LlamaForSequenceClassification)")),
    "labels in the model": (partial(Transformers, "Bert", True), ("labels of shape (3,)", "sp_size=1")),
    "mean": (partial(Inside, mean), ("no mean over tokens", "'net.head.linear' (Linear)")),
    "first": (partial(Inside, first), ("no mean over tokens", "'net.head.linear' (Linear)")),
    "last": (partial(Inside, last), ("no mean over tokens", "'net.head.linear' (Linear)")),
    "mean in the step": (partial(Between, mean), ("no mean over tokens", "'head.linear' (Linear)")),
    "first in the step": (partial(Between, first), ("no mean over tokens", "'head.linear' (Linear)")),
    "loss module": (partial(Between, mean, "module"), ("no mean over tokens",)),
    "beside the tokens": (partial(Between, mean, "context"), ("'head.linear' (Linear)",)),
}


def refused(rank: int, make: Any, run: SplitRun) -> UlyssesError:
    with pytest.raises(UlyssesError) as caught:
        fit_rank(rank, make, [row_batch(seed) for seed in range(2)], run)
    return caught.value


@pytest.mark.parametrize("case", REFUSED)
def test_every_rank_refuses_a_pooling(pool: ProcessPool, case: str) -> None:
    make, parts = REFUSED[case]
    for error in pool.run(refused, make, MEAN_OF_RANKS, world_size=2):
        assert [part for part in parts if part not in str(error)] == [], error


@pytest.mark.nightly
def test_zero_3_and_two_groups(pool: ProcessPool) -> None:
    run = SplitRun(4, 2, {**MEAN_OF_RANKS.strategy, "stage": 3})
    for make, name in ((partial(Inside, mean), "'net.head.linear'"), (partial(Between, mean), "'head.linear'")):
        for error in pool.run(refused, make, run, world_size=4):
            assert name in str(error)


def test_the_same_without_the_check_trains_wrongly(pool: ProcessPool) -> None:
    make, batches = partial(Inside, mean), [row_batch(seed) for seed in range(2)]
    reference = fit_single(make, [[batch] for batch in batches], lambda batch: 1.0)
    run = SplitRun(strategy={**MEAN_OF_RANKS.strategy, "check_model": False})
    assert compare(fit_split(pool, make, batches, run)[0], reference).step > 1e-3


class Unused(Module):
    """An encoder with a pooler that nothing uses; what it gives is logged."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        torch.manual_seed(0)
        sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 4}
        drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(vocab_size=VOCAB, num_hidden_layers=1, **sizes, **drop)
        config._attn_implementation = "sdpa"
        self.model, self.head = transformers.BertModel(config), Head()
        for parameter in self.model.pooler.parameters():
            parameter.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.model(input_ids=batch["input_ids"])
        # Another gradient than the loss's does not matter.
        self.pooled = self.head(out.pooler_output).mean().detach()
        logits = self.head(out.last_hidden_state)
        return F.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())


class Routed(Module):
    """Experts that get the tokens of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = Body(), Head()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        h = self.body(batch["input_ids"])
        chosen, out = self.router(h).argmax(-1), torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            out = out.index_put((chosen == number).nonzero(as_tuple=True), expert(h[chosen == number]))
        return F.cross_entropy(self.head(h + out).flatten(0, 1), batch["shift_labels"].flatten())


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 3), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, h: Tensor) -> Tensor:
        chosen, out = self.router(h).argmax(-1), torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            out = out.index_put((chosen == number).nonzero(as_tuple=True), expert(h[chosen == number]))
        return h + out


class Mixture(Module):
    """The same inside of one submodule."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(Body(), Experts(), Head())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch["input_ids"]).flatten(0, 1), batch["shift_labels"].flatten())


class Chosen(Module):
    """The head sees those tokens only that have a label, a few at a time."""

    def __init__(self, chunks: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.chunks = Body(), Head(), chunks

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        h, labels = self.body(batch["input_ids"]), batch["shift_labels"]
        if not self.chunks:
            kept = labels != -100
            return F.cross_entropy(self.head(h[kept]), labels[kept])
        # One token at a time: (B, 1, W) as a pooling gives.
        logits = torch.cat([self.head(part) for part in h.split(1, dim=1)], dim=1)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


EXACT: dict[str, Any] = {
    "unused pooler": Unused,
    "experts in the step": Routed,
    "experts": Mixture,
    "chosen tokens": partial(Chosen, False),
    "chunks": partial(Chosen, True),
}


@pytest.mark.parametrize("case", EXACT)
def test_what_is_no_pooling_is_exact(pool: ProcessPool, case: str) -> None:
    make, batch = EXACT[case], token_batch(0)
    reference = fit_single(make, [[batch]], lambda batch: float((batch["shift_labels"] != -100).sum()))
    assert compare(fit_split(pool, make, [batch], BY_TOKEN)[0], reference).largest <= 1e-5
