"""Submodules on the joined sequence, or with a halo, in packed and padded rows: one step is the step of one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import meeting
import pytest
import torch
from exact import BOUND, fit_broken
from models import HandWritten, LlamaModule, count_targets, token_batch
from nightly import mostly
from torch import Tensor, nn

import lightning_ulysses
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

LENGTHS = (9, 1, 14, 9)


class Extended(LlamaModule):
    """A transformers model with one more layer behind each MLP."""

    def __init__(self, make: Any = None, **kwargs: Any) -> None:
        super().__init__(**{"lr": 0.3, **kwargs})
        torch.manual_seed(5)
        for layer in self.model.model.layers if make is not None else ():
            layer.mlp = nn.Sequential(layer.mlp, make(32))
        # With a cache, transformers attends across documents.
        self.model.config.use_cache = False


class Masked(LlamaModule):
    """BERT, whose tokens see both sides."""

    def __init__(self) -> None:
        super().__init__(lr=0.3)
        from transformers import BertConfig, BertForMaskedLM

        torch.manual_seed(6)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.model = BertForMaskedLM(BertConfig(vocab_size=61, **sizes, **drops))


class Packs(HandWritten):
    """Documents told by ``cu_seqlens``."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Within() for _ in range(2)])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tokens, edges = batch["input_ids"], batch["cu_seqlens"]
        hidden = self.embed(tokens) + self.place(lightning_ulysses.sequence_positions(tokens))
        for block in self.blocks:
            hidden = block(hidden, edges)
        return nn.functional.cross_entropy(self.head(hidden).transpose(1, 2), batch["shift_labels"])


class Within(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.cells = nn.Linear(32, 96), nn.Linear(32, 32), nn.GRU(32, 32, batch_first=True)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        # (B, S, 3 * H * D) -> (B, S, 3, H, D) -> (3, B, H, S, D)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        out = lightning_ulysses.ulysses_attention(q, k, v, is_causal=True, cu_seqlens=edges)
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        return x + self.cells(x)[0]


def packed(seed: int) -> dict[str, Tensor]:
    """Two rows of documents, by positions that restart."""
    batch = token_batch(seed, sum(LENGTHS), 2, "uneven")
    rows = [torch.cat([torch.arange(length) for length in lengths]) for lengths in (LENGTHS, LENGTHS[::-1])]
    positions = torch.stack(rows)
    return {**batch, "position_ids": positions, "labels": batch["labels"].masked_fill(positions == 0, -100)}


def padded(seed: int) -> dict[str, Tensor]:
    """A row with padding at its left, and one at its right."""
    batch = token_batch(seed, 33, 2, "uneven")
    mask = torch.ones_like(batch["labels"])
    mask[0, :5] = mask[1, 20:] = 0
    return {**batch, "attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}


def edges(seed: int) -> dict[str, Tensor]:
    """A row of documents, by where they begin."""
    batch = token_batch(seed, sum(LENGTHS), 1, "uneven")
    begins = torch.tensor([0, *LENGTHS]).cumsum(0)
    labels = batch["labels"].clone()
    labels[:, begins[:-1]] = -100
    return {**batch, "labels": labels, "cu_seqlens": begins.int()}


def count_all(batch: dict[str, Tensor]) -> float:
    return float((batch["labels"] != -100).sum())


ATTENTION = {"whole": {"model.layers.*.self_attn": {"hidden_states": 1, "position_embeddings": 1}}}
LAYERS = {"whole": {"model.layers.*": {"hidden_states": 1, "position_embeddings": 1}}}
MODEL = {"whole": {"model.model": {"input_ids": 1, "position_ids": 1}}}
BERT = {"whole": {"bert.encoder.layer.*.attention": {"hidden_states": 1}}}
LONGER = {"pad_to_multiple_of": 8}
TWICE = {"accumulate_grad_batches": 2}
CASES: dict[str, tuple[Any, Any, dict[str, Any], int]] = {
    "packed, GRU": (partial(Extended, meeting.Recurrent), packed, {}, 2),
    "packed, convolution": (partial(Extended, meeting.CausalConv), packed, {}, 4),
    "packed, attention": (Extended, packed, {"plan": ATTENTION}, 2),
    "packed, attention, longer": (Extended, packed, {"plan": ATTENTION, **LONGER}, 4),
    "packed, layers, longer": (Extended, packed, {"plan": LAYERS, **LONGER}, 2),
    "packed, model, longer": (Extended, packed, {"plan": MODEL, **LONGER}, 2),
    "padded, GRU": (partial(Extended, meeting.Recurrent), padded, LONGER, 2),
    "padded, convolution": (partial(Extended, meeting.CausalConv), padded, {}, 4),
    "padded, attention, longer": (Extended, padded, {"plan": ATTENTION, **LONGER}, 2),
    "padded, both sides, longer": (Masked, padded, {"plan": BERT, **LONGER}, 2),
    "edges, GRU": (Packs, edges, LONGER, 2),
    "edges, layers": (Packs, edges, {"plan": {"whole": {"blocks.*": {"x": 1}}}, **LONGER}, 2),
}


# What is joined, and how rows are told apart, each have other cases.
SELDOM = ("packed, attention, longer", "packed, model, longer", "padded, convolution", "edges, layers")


@pytest.mark.parametrize("case", mostly(CASES, SELDOM))
def test_one_step(pool: ProcessPool, case: str) -> None:
    make, batch, strategy, ranks = CASES[case]
    batches = [batch(seed) for seed in (1, 2)]
    if make is Packs:
        batches = [
            {**each, "shift_labels": nn.functional.pad(each["labels"][:, 1:], (0, 1), value=-100)} for each in batches
        ]
    reference = fit_single(make, [batches], count_all if make is Masked else count_targets)
    assert reference.step().norm() > 1e-3
    for result in fit_split(pool, make, batches, SplitRun(ranks, ranks, strategy, TWICE)):
        assert compare(result, reference).largest <= BOUND, compare(result, reference)


def as_it_is(self: MaskSpec, real_len: int) -> MaskSpec:
    return self


@pytest.mark.parametrize("case", ["padded, both sides, longer"])
def test_control(pool: ProcessPool, case: str) -> None:
    """Padding of this package that a joined submodule does not get, and its mask is said to have."""
    make, batch, strategy, _ = CASES[case]
    batches = [batch(1)]
    reference = fit_single(make, [batches], count_all)
    run = SplitRun(2, 2, {**strategy, "check_model": False})
    target = "lightning_ulysses.geometry.mask_spec.MaskSpec.unpadded"
    for result in pool.run(fit_broken, make, batches, run, target, as_it_is, world_size=2):
        assert compare(result, reference).step > 1e-3
