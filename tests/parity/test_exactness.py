"""One optimizer step on N processes is the step of one process."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from exact import BOUND, check, fit_broken, no_shift, no_weight
from models import HandWritten, count_targets, hand_written, llama, pair_batch, token_batch
from nightly import mostly

from lightning_ulysses.loss.weights import StepWeights
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

CASES: dict[str, tuple[Any, list[Any], SplitRun]] = {
    "keywords": (llama(call="keywords"), [token_batch(1, 33, 2)], SplitRun()),
    "inputs as labels": (
        llama(call="inputs"),
        [{"input_ids": token_batch(s, 33)["input_ids"]} for s in range(2)],
        SplitRun(trainer={"accumulate_grad_batches": 2}),
    ),
    "sliding window": (llama(window=5), [token_batch(1, 33)], SplitRun()),
    "heads 10/5 on 4": (llama(heads=10, kv_heads=5), [token_batch(1, 19)], SplitRun(4, 4)),
    "all masked but one": (llama(), [token_batch(1, 32, 1, "none"), token_batch(2)], SplitRun(4, 2)),
    "hand-written": (hand_written(), [pair_batch(s, 33, 2, "uneven") for s in range(2)], SplitRun(4, 2)),
    "explicit attention": (
        hand_written(attention="explicit", heads=3, kv_heads=3),
        [pair_batch(1, 33)],
        SplitRun(3, 3),
    ),
    "grouped heads": (hand_written(heads=8, kv_heads=2), [pair_batch(1, 32)], SplitRun(4, 4)),
    "bidirectional": (hand_written(attention="full"), [pair_batch(1, 33)], SplitRun()),
    "masked mean": (hand_written(loss="masked"), [pair_batch(1, 33, 2, "first_half")], SplitRun()),
    "manual": (hand_written(manual=True), [pair_batch(s, 33, 1, "uneven") for s in range(2)], SplitRun(4, 2)),
    "manual, zero 3": (hand_written(manual=True), [pair_batch(1, 33)], SplitRun(strategy={"stage": 3})),
    "checkpointing": (hand_written(checkpointing=True), [pair_batch(1, 33)], SplitRun(strategy={"stage": 3})),
    "mapping": (hand_written(), [token_batch(s, 33, 1, "uneven") for s in range(2)], SplitRun(4, 2)),
    "reduce_scatter off": (llama(), [token_batch(1, 33)], SplitRun(strategy={"stage": 3, "reduce_scatter": False})),
    "zero 3, dp x sp": (llama(), [token_batch(s, 33, 1, "uneven") for s in range(2)], SplitRun(4, 2, {"stage": 3})),
    "padded to a multiple": (
        llama(),
        [token_batch(1, 33, 2, "uneven")],
        SplitRun(strategy={"pad_to_multiple_of": 16}),
    ),
    "padded, bidirectional": (
        hand_written(attention="full"),
        [pair_batch(1, 33)],
        SplitRun(strategy={"pad_to_multiple_of": 16}),
    ),
    "padded, bidirectional, not split": (
        hand_written(attention="full"),
        [pair_batch(1, 33), pair_batch(2, 33)],
        SplitRun(2, 1, {"pad_to_multiple_of": 16}),
    ),
    "offloaded optimizer": (llama(), [token_batch(1, 33)], SplitRun(strategy={"offload_optimizer": True})),
    "offloaded parameters": (
        llama(),
        [token_batch(1, 33)],
        SplitRun(strategy={"stage": 3, "offload_optimizer": True, "offload_parameters": True}),
    ),
}


# Other tests prove each of their settings.
SELDOM = ("grouped heads", "manual, zero 3", "checkpointing", "zero 3, dp x sp")


@pytest.mark.parametrize("case", mostly(CASES, SELDOM))
def test_case(pool: ProcessPool, case: str) -> None:
    make, batches, run = CASES[case]
    if "mapping" in case:
        wanted = [{**batch, "shift_labels": shifted(batch["labels"])} for batch in batches]
        reference = fit_single(make, [wanted], count_targets)
        for result in fit_split(pool, make, batches, run):
            assert compare(result, reference).largest <= BOUND
        return
    check(pool, make, batches, run)


def shifted(labels: torch.Tensor) -> torch.Tensor:
    return F.pad(labels[:, 1:], (0, 1), value=-100)


@pytest.mark.parametrize("stage", mostly([2, 3], [3]))
def test_incomplete_window_and_clipping_over_two_epochs(pool: ProcessPool, stage: int) -> None:
    make = llama(lr=0.1)
    batches = [token_batch(seed, 33, 1, "uneven") for seed in range(5)]
    run = SplitRun(2, 2, {"stage": stage}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05, "max_epochs": 2})
    steps = [batches[:3], batches[3:], batches[:3], batches[3:]]
    reference = fit_single(make, steps, count_targets, clip=0.05)
    assert min(reference.grad_norms) > 0.05
    for result in fit_split(pool, make, batches, run):
        assert compare(result, reference).largest <= BOUND


def fit_half(rank: int, make: Any, batches: list[Any], run: SplitRun) -> Any:
    """`fit_rank` on a CPU that is said to compute in float16, which torch does for it, slowly."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    with mock.patch.object(CPU_Accelerator, "is_fp16_supported", return_value=True):
        return fit_rank(rank, make, batches, run)


@pytest.mark.parametrize(
    ("precision", "stage"),
    mostly([("bf16-true", 3), ("bf16-mixed", 2), ("16-mixed", 2), ("16-mixed", 3), ("16-true", 2)], [("16-mixed", 3)]),
)
def test_lower_precision_is_close(pool: ProcessPool, precision: str, stage: int) -> None:
    """Half precision on two processes is about as far from fp32 as half precision on one."""
    make = llama(lr=0.5)
    batches = [token_batch(seed, 33, 1, "uneven") for seed in range(2)]
    # The loss scale of float16 must leave neither the gradient nor its norm nor what is clipped.
    trainer = {"precision": precision, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    reference = fit_single(make, [batches], count_targets, clip=0.5)
    assert reference.grad_norms[0] > 1.0
    alone, split = (
        compare(
            pool.run(fit_half, make, batches, SplitRun(P, P, {"stage": stage}, trainer), world_size=P)[0], reference
        )
        for P in (1, 2)
    )
    assert split.step <= 2 * alone.step + 1e-3
    assert split.loss <= 2 * alone.loss + 1e-3
    assert split.grad_norm <= 2 * alone.grad_norm + 1e-3
    assert alone.largest < 0.05


def test_packed_documents_do_not_see_each_other(pool: ProcessPool) -> None:
    lengths = [7, 12, 1, 13]
    tokens = token_batch(3, sum(lengths))["input_ids"]
    documents = [{"input_ids": part, "labels": part} for part in tokens.split(lengths, dim=1)]
    packed = {
        "input_ids": tokens,
        "labels": tokens,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    for implementation in ("sdpa", "flash_attention_2"):
        reference = fit_single(llama(), [documents], count_targets)
        result = fit_split(pool, llama(implementation=implementation), [packed], SplitRun())[0]
        assert compare(result, reference).largest <= BOUND
    leaking = fit_single(llama(), [[{"input_ids": tokens, "labels": tokens}]], count_targets)
    assert compare(result, leaking).step > 0.01


@pytest.mark.parametrize(
    ("side", "positions"),
    [
        *(("right", None), ("left", None), ("holes", None)),
        *(("left", "counted"), ("left", "filled"), ("right", "filled"), ("holes", "counted")),
    ],
)
def test_padding_mask(pool: ProcessPool, side: str, positions: str | None) -> None:
    batch = token_batch(4, 33, 3)
    mask = torch.ones_like(batch["input_ids"])
    for row, amount in enumerate((0, 9, 20)):
        if side == "right":
            mask[row, 33 - amount :] = 0
        elif side == "left":
            mask[row, :amount] = 0
        else:
            mask[row, 5 : 5 + amount] = 0
    batch["attention_mask"] = mask
    if side == "left":
        batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    if positions is not None:
        batch["position_ids"] = mask.cumsum(-1) - 1
    if positions == "filled":
        batch["position_ids"] = batch["position_ids"].masked_fill(mask == 0, 1)
    check(pool, llama(), [batch], SplitRun())


def test_documents_with_padding_between_them(pool: ProcessPool) -> None:
    lengths, gaps = [7, 12, 1], [3, 4, 2, 3]
    tokens = token_batch(3, sum(lengths) + sum(gaps))["input_ids"]
    mask, positions = torch.zeros_like(tokens), torch.ones_like(tokens)
    documents, begin = [], 0
    for gap, length in zip(gaps, lengths, strict=False):
        own = slice(begin + gap, begin + gap + length)
        mask[:, own], positions[:, own] = 1, torch.arange(length)
        documents.append(tokens[:, own])
        begin = own.stop
    labels = tokens.masked_fill(mask == 0, -100)
    # Of a document behind padding, the first token is a target of the padding before it.
    labels[:, gaps[0]] = -100
    packed = {"input_ids": tokens, "labels": labels, "attention_mask": mask, "position_ids": positions}
    reference = fit_single(llama(), [[{"input_ids": part, "labels": part} for part in documents]], count_targets)
    for result in fit_split(pool, llama(), [packed], SplitRun()):
        assert compare(result, reference).largest <= BOUND


def test_regression_targets(pool: ProcessPool) -> None:
    batches = [(pair_batch(s, 33)[0], torch.randn(1, 33, generator=torch.Generator().manual_seed(s))) for s in range(2)]
    check(pool, hand_written(loss="mse", lr=0.1), batches, SplitRun(4, 2))


def test_loss_mask(pool: ProcessPool) -> None:
    batches = []
    for seed in range(2):
        x, y = pair_batch(seed, 33)
        batches.append(
            {"input_ids": x, "shift_labels": y, "loss_mask": (torch.arange(33) % (2 + seed) == 0).long()[None]}
        )
    check(pool, hand_written(loss="loss_mask"), batches, SplitRun(4, 2))


def test_pre_shifted_labels_are_weighted_by_what_the_loss_used(pool: ProcessPool) -> None:
    """A module that uses ``labels`` as they are has one target more per row than ``shift_labels``."""
    x, y = pair_batch(1, 33)
    batches = [{"input_ids": x, "labels": y}]
    make = partial(AsTheyAre, 1.0)
    reference = fit_single(make, [batches], lambda batch: float((batch["labels"] != -100).sum()))
    assert compare(fit_split(pool, make, batches, SplitRun())[0], reference).largest <= BOUND


class AsTheyAre(HandWritten):
    """Uses ``labels`` without a shift, the convention of many hand-written datasets."""

    def __init__(self, lr: float) -> None:
        super().__init__(lr=lr)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


class MeanOfSlices(HandWritten):
    """The mean over equal slices of each one's own mean, however many targets it has."""

    def _loss(self, batch: Any) -> torch.Tensor:
        # (B, S, V) -> 2 of (B, S / 2, V)
        slices = zip(self(batch[0]).chunk(2, dim=1), batch[1].chunk(2, dim=1), strict=True)
        return torch.stack([F.cross_entropy(logits.flatten(0, 1), y.flatten()) for logits, y in slices]).mean()


@pytest.mark.parametrize(("run", "make"), [(SplitRun(2, 1), hand_written()), (SplitRun(4, 2), MeanOfSlices)])
def test_loss_weighting_none_averages_over_ranks(pool: ProcessPool, run: SplitRun, make: Any) -> None:
    batches = [pair_batch(s, 32, 1, "uneven") for s in range(2)]
    run = replace(run, strategy={"loss_weighting": "none"})
    reference = fit_single(make, [batches], lambda batch: 1.0)
    result = fit_split(pool, hand_written(), batches, run)[0]
    assert compare(result, reference).largest <= BOUND
    by_targets = fit_single(hand_written(), [batches], count_targets)
    assert compare(result, by_targets).step > 1e-3


def plain_positions(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
    return torch.arange(x.shape[dim])


CONTROLS: dict[str, tuple[str, Any, Any, dict[str, Any]]] = {
    "weight": ("lightning_ulysses.loss.weights.token_weight", no_weight, llama(), {}),
    "label shift": (
        "lightning_ulysses.interceptors.transformers.model_inputs.shifted_labels",
        no_shift,
        llama(call="keywords"),
        {"targets": "shift_labels", "check_model": False},
    ),
    "positions": ("lightning_ulysses.sequence_positions", plain_positions, hand_written(), {"check_model": False}),
}


@pytest.mark.parametrize("mechanism", CONTROLS)
def test_negative_control(pool: ProcessPool, mechanism: str) -> None:
    """Without the mechanism the comparison goes red, so the comparison can fail."""
    target, replacement, make, strategy = CONTROLS[mechanism]
    tuples = make.func is HandWritten
    batches = [pair_batch(2, 33, 1, "uneven") if tuples else token_batch(2, 33, 1, "uneven")]
    reference = fit_single(make, [batches], count_targets)
    run = SplitRun(strategy=strategy)
    assert compare(fit_split(pool, make, batches, run)[0], reference).largest <= BOUND
    broken = pool.run(fit_broken, make, batches, run, target, replacement, world_size=2)[0]
    assert compare(broken, reference).largest > 100 * BOUND


class WithoutFactor(StepWeights):
    """Leaves Lightning's division by the number of micro-batches in place."""

    def apply(self, loss: torch.Tensor, live: Any, micro_batches: int, automatic: bool) -> torch.Tensor:
        return super().apply(loss / micro_batches, live, micro_batches, automatic)


class WithoutLookAhead(StepWeights):
    """Normalises each micro-batch by its own targets."""

    def begin(self, counts: Any, plans: Any) -> None:
        super().begin(counts, plans)
        assert self._window is not None
        self._window.totals = {name: value * self._window.size for name, value in self._over_replicas(counts).items()}


@pytest.mark.parametrize("broken", [WithoutFactor, WithoutLookAhead])
def test_negative_control_of_accumulation(pool: ProcessPool, broken: type[StepWeights]) -> None:
    batches = [token_batch(seed, 33, 1, "uneven") for seed in range(3)]
    run = SplitRun(trainer={"accumulate_grad_batches": 3})
    reference = fit_single(llama(), [batches], count_targets)
    assert compare(fit_split(pool, llama(), batches, run)[0], reference).largest <= BOUND
    target = "lightning_ulysses.sequence_parallel.StepWeights"
    result = pool.run(fit_broken, llama(), batches, run, target, broken, world_size=2)[0]
    assert compare(result, reference).largest > 100 * BOUND
