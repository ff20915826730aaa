"""Positions that are more than a count from 0: they jump ahead, restart, or reach beyond what a model was made for."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from exact import BOUND, fit_broken
from models import VOCAB, LlamaModule, count_targets, token_batch
from torch import Tensor

from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

# Below it, numbers are those of short sequences; a trial's excerpt is shorter.
LIMIT = 64
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}


class Cached(LlamaModule):
    """Like every transformers model as it is made; in one process, a cache keeps it from looking for documents."""

    def __init__(self, is_cached: bool) -> None:
        super().__init__()
        self.model.config.use_cache = is_cached


class Inner(Cached):
    """Calls the model inside of the model, and says itself that there is no cache."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
        return torch.nn.functional.cross_entropy(self.model.lm_head(hidden).flatten(0, 1), batch["labels"].flatten())


def jumping(padding: int | None) -> dict[str, Tensor]:
    """Two rows whose positions jump ahead at other places, with a mask that leaves so many tokens out."""
    batch = token_batch(3, 33, 2)
    rows = (16, 100), (5, 50)
    places = [torch.cat([torch.arange(end), torch.arange(begin, begin + 33 - end)]) for end, begin in rows]
    batch["position_ids"] = torch.stack(places)
    if padding is not None:
        batch["attention_mask"] = torch.ones(2, 33, dtype=torch.long)
        batch["attention_mask"][0, :padding] = 0
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def count_labels(batch: Any) -> float:
    return float((batch["labels"] != -100).sum())


JUMPS: dict[str, tuple[Any, int | None, Any]] = {
    "mask of ones": (partial(Cached, False), 0, count_targets),
    "padding": (partial(Cached, True), 3, count_targets),
    "cache": (partial(Cached, True), None, count_targets),
    "no cache": (partial(Cached, False), None, count_targets),
    "no cache inside": (partial(Inner, True), None, count_labels),
}


@pytest.mark.parametrize("case", JUMPS)
def test_jumps_ahead_mean_what_they_mean_in_one_process(pool: ProcessPool, case: str) -> None:
    make, padding, count = JUMPS[case]
    batch = jumping(padding)
    wanted = fit_single(make, [[batch]], count)
    for result in fit_split(pool, make, [batch], SplitRun()):
        assert compare(result, wanted).largest <= BOUND, compare(result, wanted)


def never_cached(*args: Any) -> bool:
    return False


def test_jumps_as_documents_are_another_step(pool: ProcessPool) -> None:
    batch, make = jumping(None), partial(Cached, True)
    wanted = fit_single(make, [[batch]], count_targets)
    mechanism = "lightning_ulysses.interceptors.transformers.model_inputs._is_cached"
    for result in pool.run(fit_broken, make, [batch], SplitRun(), mechanism, never_cached, world_size=2):
        assert compare(result, wanted).step > 1e-2


class Scaled(LlamaModule):
    """A model whose numbers depend on the highest position, or on a position far from 0."""

    def __init__(self, family: str) -> None:
        import transformers

        super().__init__(layers=1, lr=0.1)
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            # Large weights: attention that is nearly uniform hides positions.
            "initializer_range": 0.2,
        }
        factors = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [3.0, 5.0, 8.0, 20.0], "rope_theta": 1e4}
        long = {"rope_type": "longrope", **factors, "original_max_position_embeddings": LIMIT}
        settings: dict[str, Any] = {
            "Phi3": {**sizes, "rope_parameters": long, "original_max_position_embeddings": LIMIT, "pad_token_id": 0},
            "Phimoe": {
                **sizes,
                "rope_parameters": {**long, "short_mscale": 1.1, "long_mscale": 1.4},
                "num_local_experts": 2,
                "router_aux_loss_coef": 0.0,
                "router_jitter_noise": 0.0,
                "input_jitter_noise": 0.0,
            },
            "Llama": {**sizes, "max_position_embeddings": LIMIT, "rope_parameters": DYNAMIC},
            "Llama4": {
                **sizes,
                "intermediate_size_mlp": 48,
                "head_dim": 8,
                "num_local_experts": 2,
                "no_rope_layers": [1, 0],
                "attention_chunk_size": 64,
                "floor_scale": LIMIT,
                "attn_scale": 1.0,
            },
        }
        name = "Llama4Text" if family == "Llama4" else family
        config = getattr(transformers, f"{name}Config")(**settings[family])
        config._attn_implementation = "sdpa"
        self.model = getattr(transformers, f"{family}ForCausalLM")(config)


@pytest.mark.parametrize("family", ["Phi3", "Phimoe", "Llama", "Llama4"])
def test_numbers_of_the_highest_position(pool: ProcessPool, family: str) -> None:
    """The first batch is below the limit, and an excerpt of the second one as well."""
    batches = [token_batch(seed, seq_len) for seed, seq_len in ((1, 33), (2, 99), (3, 40))]
    make = partial(Scaled, family)
    wanted = fit_single(make, [[batch] for batch in batches], count_targets)
    for result in fit_split(pool, make, batches, SplitRun()):
        assert compare(result, wanted).largest <= BOUND, compare(result, wanted)


class Stretched(torch.nn.Module):
    """Rotary embeddings of a user's own: positions are spread over the range that the model was made for."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        places = position_ids.float() * (LIMIT / (position_ids.max() + 1))
        # (B, S_r) -> (B, S_r, D)
        angles = places[..., None] * 0.1 ** torch.arange(4).repeat(2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class OwnRotary(LlamaModule):
    def __init__(self) -> None:
        super().__init__()
        self.model.model.rotary_emb = Stretched()


def test_padding_and_documents_do_not_count_as_the_highest_position(pool: ProcessPool) -> None:
    """With what this package adds, positions would reach beyond the limit."""
    batch = token_batch(1, 63, 2)
    packed = {**batch, "position_ids": torch.cat([torch.arange(33), torch.arange(30)])[None].repeat(2, 1)}
    packed["labels"] = batch["labels"].clone().index_fill_(1, torch.tensor([33]), -100)
    for make, plain, data in ((partial(Scaled, "Phi3"),) * 2 + (batch,), (OwnRotary, uncached, packed)):
        wanted = fit_single(plain, [[data]], count_targets)
        for result in fit_split(pool, make, [data], SplitRun(strategy={"pad_to_multiple_of": 40})):
            assert compare(result, wanted).largest <= BOUND, compare(result, wanted)


def uncached() -> Any:
    """In one process, transformers sees documents only where there is no cache."""
    module = OwnRotary()
    module.model.config.use_cache = False
    return module


def nothing(*args: Any) -> None:
    return None


@pytest.mark.parametrize(
    ("family", "mechanism"),
    [("Phi3", "highest_position._tried"), ("Llama4", "transformers.attention.install_temperature")],
)
def test_numbers_of_a_slice_are_another_step(pool: ProcessPool, family: str, mechanism: str) -> None:
    """No trial sees it: its excerpt is below the limit."""
    make, batch = partial(Scaled, family), token_batch(2, 99)
    wanted = fit_single(make, [[batch]], count_targets)
    target = f"lightning_ulysses.interceptors.{mechanism}"
    for result in pool.run(fit_broken, make, [batch], SplitRun(), target, nothing, world_size=2):
        assert compare(result, wanted).step > 1e-3
