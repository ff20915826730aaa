"""Several models in one LightningModule, of which only one may be trained."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import BOUND, fit_broken
from models import VOCAB, HandWritten, LlamaModule, count_targets, token_batch
from nightly import mostly
from torch import Tensor

from lightning_ulysses import UlyssesError
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

BATCHES = [token_batch(seed, 33, 2, "uneven") for seed in range(2)]
ACCUMULATE: dict[str, Any] = {"accumulate_grad_batches": 2}


def build(kind: str, heads: int) -> Any:
    """A transformers model of another kind and with other head counts than the student's."""
    from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

    torch.manual_seed(11)
    if kind == "gpt2":
        return AutoModelForCausalLM.from_config(
            GPT2Config(vocab_size=VOCAB, n_embd=8 * heads, n_layer=1, n_head=heads, n_positions=256),
            attn_implementation="sdpa",
        )
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=8 * heads,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=8,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


class Distilled(LlamaModule):
    """A student that learns from labels and from a frozen teacher, called on the same batch.

    Args:
        teacher: What kind of model teaches.
        where: When it is built: in ``__init__``, in ``configure_model``, or in ``__init__`` but out of the module's
            sight.
    """

    def __init__(self, teacher: str = "qwen3", where: str = "init", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind, self.where = teacher, where
        self.teacher: Any = None
        if where == "init":
            self.load()
        elif where == "hidden":
            self.hidden = [build(teacher, 6).eval().requires_grad_(False)]

    def load(self) -> None:
        self.teacher = HandWritten(heads=6, kv_heads=2) if self.kind == "by hand" else build(self.kind, 6)
        self.teacher.eval().requires_grad_(False)

    def configure_model(self) -> None:
        if self.teacher is None and self.where == "configure_model":
            self.load()

    def taught(self, batch: dict[str, Tensor]) -> Tensor:
        teacher = self.hidden[0] if self.where == "hidden" else self.teacher
        with torch.no_grad():
            teacher.eval()
            out = teacher(batch["input_ids"])
        return out if isinstance(out, Tensor) else out.logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        out = self.model(input_ids=batch["input_ids"], labels=batch["labels"])
        wanted = self.taught(batch).log_softmax(-1)
        each = F.kl_div(out.logits.log_softmax(-1), wanted, log_target=True, reduction="none").sum(-1)
        if "shift_labels" in batch:
            keep = batch["shift_labels"] != -100
        else:
            keep = F.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
        return out.loss + (each * keep).sum() / keep.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=self.lr)


@pytest.mark.parametrize(
    ("teacher", "where", "stage"),
    [
        pytest.param("qwen3", "init", 2, marks=pytest.mark.nightly),
        ("qwen3", "init", 3),
        ("gpt2", "configure_model", 2),
        pytest.param("gpt2", "configure_model", 3, marks=pytest.mark.nightly),
        ("by hand", "init", 3),
    ],
)
def test_distillation(pool: ProcessPool, teacher: str, where: str, stage: int) -> None:
    make = partial(Distilled, teacher, where)
    results = fit_split(pool, make, BATCHES, SplitRun(2, 2, {"stage": stage}, ACCUMULATE))
    # Under ZeRO-3, transformers draws other weights in configure_model than elsewhere.
    reference = fit_single(partial(started_from, teacher, results[0].before), [BATCHES], count_targets)
    plain = fit_single(LlamaModule, [BATCHES], count_targets)
    assert abs(reference.losses[0] - plain.losses[0]) > 0.01
    for result in results:
        assert compare(result, reference).largest <= BOUND, compare(result, reference)
        frozen = [name for name in result.before if name.startswith("teacher.")]
        assert frozen and all(torch.equal(result.before[name], result.after[name]) for name in frozen)


def started_from(teacher: str, weights: dict[str, Tensor]) -> Distilled:
    module = Distilled(teacher)
    assert module.load_state_dict(weights, strict=False).unexpected_keys == []
    return module


def no_positions(*args: Any) -> Tensor:
    return torch.arange(args[1].shape[1])[None]


def test_without_its_positions_the_teacher_is_wrong(pool: ProcessPool) -> None:
    reference = fit_single(Distilled, [BATCHES[:1]], count_targets)
    target = "lightning_ulysses.interceptors.transformers.model_inputs._positions"
    run = SplitRun(strategy={"check_model": False})
    for result in pool.run(fit_broken, Distilled, BATCHES[:1], run, target, no_positions, world_size=2):
        assert compare(result, reference).largest > 100 * BOUND


class Preferred(LlamaModule):
    """Two models that are both trained, on one loss, with other head counts."""

    def __init__(self) -> None:
        super().__init__(heads=4, kv_heads=1)
        self.second = build("qwen3", 3)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss + 0.5 * self.second(**batch).loss


@pytest.mark.parametrize("stage", mostly([2, 3], [2]))
def test_two_that_are_trained(pool: ProcessPool, stage: int) -> None:
    reference = fit_single(Preferred, [BATCHES], count_targets)
    for result in fit_split(pool, Preferred, BATCHES, SplitRun(2, 2, {"stage": stage}, ACCUMULATE)):
        assert compare(result, reference).largest <= BOUND


def refusal(rank: int, make: Any, run: SplitRun) -> str:
    with pytest.raises(UlyssesError) as caught:
        fit_rank(rank, make, BATCHES[:1], run)
    return str(caught.value)


def test_a_model_out_of_sight_is_refused(pool: ProcessPool) -> None:
    """Kept in a list, it is no submodule, and nothing would supply its positions."""
    for text in pool.run(refusal, partial(Distilled, "qwen3", "hidden"), SplitRun(), world_size=2):
        assert "Qwen3Attention" in text and "attribute of the LightningModule" in text


def test_fewer_heads_in_the_second_than_processes(pool: ProcessPool) -> None:
    run = SplitRun(4, 4, trainer=ACCUMULATE)
    reference = fit_single(Preferred, [BATCHES], count_targets)
    for result in fit_split(pool, Preferred, BATCHES, run):
        assert compare(result, reference).largest <= BOUND
