"""Hybrids of attention with scans, linear attention and convolutions: one step on several processes and on one."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from exact import fit_broken
from hybrids import HYBRIDS
from models import token_batch
from nightly import sampled
from scans import halved, kernels_in
from torch import Tensor
from zoo import BOUND, ZOO, Specimen, shifted, targets_of

from lightning_ulysses.mixing.table import TABLE
from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

EXACT = [f"{each['family']}ForCausalLM" for each in HYBRIDS if each.get("exact", True)]
LENGTH = 34


def plain_batch(seed: int) -> dict[str, Tensor]:
    return token_batch(seed, LENGTH, 2, "uneven")


def padded_batch(seed: int) -> dict[str, Tensor]:
    """One row padded behind, one in front."""
    batch = plain_batch(seed)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, LENGTH - 9 :] = 0
    mask[1, :5] = 0
    return {**batch, "attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}


def packed_batch(seed: int) -> dict[str, Any]:
    """One row of documents, told in all ways that kernels ask for."""
    lengths = [11, 3, 14, 6]
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    batch = token_batch(seed, LENGTH, 1, "uneven")
    # No token is predicted from another document.
    batch["labels"][:, edges[:-1]] = -100
    return {
        **batch,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "seq_idx": numbers[None].int(),
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


class WithKernels(Specimen):
    """As if the kernels were installed, which alone tell documents apart."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        # As in the strategy's steps; stand-ins know no states.
        self.model.config.use_cache = False
        self.file = type(self.model).__module__
        self.stack = ExitStack()

    def setup(self, stage: str) -> None:
        self.stack.enter_context(kernels_in(self.file))

    def teardown(self, stage: str) -> None:
        self.stack.close()


def differences(pool: ProcessPool, make: Any, name: str, batches: list[Any], run: SplitRun) -> list[Any]:
    reference = fit_single(make, [[shifted(batch) for batch in batches]], partial(targets_of, name))
    assert reference.step().norm() > 1e-4
    return [compare(result, reference) for result in fit_split(pool, make, batches, run)]


def check(pool: ProcessPool, make: Any, name: str, batches: list[Any], run: SplitRun) -> None:
    for difference in differences(pool, make, name, batches, run):
        assert difference.largest <= BOUND, difference


@pytest.mark.parametrize("name", sampled(EXACT, 8, ["BambaForCausalLM"]))
def test_on_four_processes(pool: ProcessPool, name: str) -> None:
    """No number of heads but some is a multiple of four."""
    run = SplitRun(world_size=4, sp_size=4, trainer={"accumulate_grad_batches": 2})
    check(pool, partial(Specimen, name), name, [plain_batch(0), plain_batch(1)], run)


@pytest.mark.parametrize("name", sampled(EXACT, 20, ["InklingForCausalLM"]))
def test_two_groups_of_two(pool: ProcessPool, name: str) -> None:
    run = SplitRun(world_size=4, sp_size=2, strategy={"stage": 3})
    check(pool, partial(Specimen, name), name, [plain_batch(0), plain_batch(1)], run)


@pytest.mark.parametrize("name", sampled(EXACT, 10))
def test_padding(pool: ProcessPool, name: str) -> None:
    run = SplitRun(trainer={"accumulate_grad_batches": 2})
    check(pool, partial(Specimen, name), name, [padded_batch(0), padded_batch(1)], run)


# Of the others, some take no numbers of documents, and Mamba's scan in transformers never gets them. Granite's
# attention does not see the positions with which SDPA tells documents apart in one process.
PACKED = [
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "OlmoHybridForCausalLM",
    "BambaForCausalLM",
    "NemotronHForCausalLM",
    "Lfm2ForCausalLM",
]


@pytest.mark.parametrize("name", sampled(PACKED, 3))
def test_documents(pool: ProcessPool, name: str) -> None:
    """With stand-ins for kernels: without them, transformers refuses documents in one process too."""
    make, batches = partial(WithKernels, name), [packed_batch(0), packed_batch(1)]
    module = make()
    with kernels_in(module.file):
        reference = fit_single(make, [[shifted(batch) for batch in batches]], partial(targets_of, name))
        # They are told apart: without their edges it is another step.
        leaking = [{key: batch[key] for key in ("input_ids", "labels", "position_ids")} for batch in batches]
        other = fit_single(make, [[shifted(batch) for batch in leaking]], partial(targets_of, name))
    assert compare(other, reference).step > 1e-3
    for result in fit_split(pool, make, batches, SplitRun(trainer={"accumulate_grad_batches": 2})):
        assert compare(result, reference).largest <= BOUND, compare(result, reference)


@pytest.mark.parametrize("name", EXACT)
def test_tokens_of_other_slices_matter(name: str) -> None:
    """What the other tests compare: in one process, each function on halves of the sequence makes another step."""
    module, batch = Specimen(name), plain_batch(0)
    module.model.config.use_cache = False
    file = sys.modules[type(module.model).__module__]

    def gradient() -> Tensor:
        module.zero_grad()
        module.training_step(batch, 0).backward()
        # Each (...) -> (elements,)
        return torch.cat([parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None])

    wanted = gradient()
    # Functions for one token at a time belong to generation.
    functions = [each for each in TABLE if hasattr(file, each) and "recurrent" not in each]
    assert "causal_conv1d_fn" in functions
    for function in functions:
        with mock.patch.object(file, function, halved(function, getattr(file, function))):
            assert (gradient() - wanted).norm() > 1e-2 * wanted.norm(), function


def alone(part: Tensor, dim: int, fetch: Any) -> Tensor:
    """The slice without the tokens before it: zeros in their place, as at the beginning of a sequence."""
    begin, end = fetch.wanted[fetch.rank]
    missing = end - begin - part.shape[dim]
    zeros = part.new_zeros([missing if d == dim else size for d, size in enumerate(part.shape)])
    return torch.cat([zeros, part], dim=dim)


def unexchanged(call: Any, batch: Any, context: Any) -> Tensor:
    """The scan of a slice by itself."""
    with context.plain():
        return call.run({})


CONTROLS = [
    ("Qwen3NextForCausalLM", "lightning_ulysses.mixing.exchange._scanned", unexchanged),
    ("BambaForCausalLM", "lightning_ulysses.mixing.exchange._scanned", unexchanged),
    ("Lfm2ForCausalLM", "lightning_ulysses.mixing.exchange.fetched", alone),
]


@pytest.mark.parametrize(("name", "target", "broken"), CONTROLS)
def test_without_the_exchange_it_is_another_step(pool: ProcessPool, name: str, target: str, broken: Any) -> None:
    make, batches = partial(Specimen, name), [plain_batch(0)]
    reference = fit_single(make, [[shifted(batch) for batch in batches]], partial(targets_of, name))
    for result in pool.run(fit_broken, make, batches, SplitRun(), target, broken, world_size=2):
        assert compare(result, reference).largest > 1e-2


class FewHeads(Specimen):
    """A state space of two heads, on four processes."""

    def __init__(self) -> None:
        super().__init__("Mamba2ForCausalLM")
        config = self.model.config
        config.num_heads, config.head_dim, config.n_groups = 2, 32, 1
        torch.manual_seed(0)
        self.model = type(self.model)(config)


def test_more_processes_than_heads(pool: ProcessPool) -> None:
    """Some ranks have nothing to scan, and the step is the same."""
    run = SplitRun(world_size=4, sp_size=4)
    check(pool, FewHeads, "Mamba2ForCausalLM", [plain_batch(0)], run)


class Checkpointed(Specimen):
    """Repeats the forward of each layer in the backward."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.model.gradient_checkpointing_enable()


def test_checkpointed_layers(pool: ProcessPool) -> None:
    name = "Qwen3NextForCausalLM"
    check(pool, partial(Checkpointed, name), name, [plain_batch(0)], SplitRun())


def test_rows_of_the_zoo_are_here() -> None:
    assert set(EXACT) | set(PACKED) <= set(ZOO) and set(PACKED) <= set(EXACT)
