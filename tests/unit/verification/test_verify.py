"""``verify_parity`` and ``lightning-ulysses verify``, on modules that are right and wrong in the usual ways."""

from __future__ import annotations

import math
import sys
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from exact import no_weight
from models import HandWritten, LlamaModule, Warmer, pair_batch, token_batch
from nightly import mostly
from torch import Tensor, nn

from lightning_ulysses import UlyssesError
from lightning_ulysses.testing.processes import ProcessPool
from lightning_ulysses.verification import ParityReport, verify_parity


class Convolves(HandWritten):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # (B, S, width) -> (B, width, S) -> (B, S, width)
        hidden = self.embed(x)
        hidden = hidden + self.conv(hidden.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class SelfAttention(nn.Module):
    """Attention as it is written out in tutorials."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        B, S, W = x.shape
        # (B, S, 3 W) -> 3 of (B, H, S, D)
        q, k, v = self.qkv(x).view(B, S, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(W // self.heads)
        place = torch.arange(S)
        scores = scores.masked_fill(place[:, None] < place, -math.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, S, W))


class ByHand(HandWritten):
    """One layer of attention by hand, and two that are intercepted, unless they are left out."""

    def __init__(self, alone: bool = False) -> None:
        super().__init__()
        self.attention = SelfAttention(32, 4)
        if alone:
            self.blocks = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        hidden = hidden + self.attention(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class ShiftsInside(HandWritten):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch["input_ids"])[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def check(pool: ProcessPool, module: Any, batch: Any, **kwargs: Any) -> ParityReport:
    report = verify_parity(module, batch, pool=pool, **{"strategy": {"split": "batch"}, **kwargs})
    print(report)
    return report


@pytest.mark.parametrize("sp_size", mostly([2, 4], [4]))
def test_correct_modules_are_exact(pool: ProcessPool, sp_size: int) -> None:
    report = check(pool, HandWritten(), [pair_batch(1, 33, 2), pair_batch(2, 33, 2, "uneven")], sp_size=sp_size)
    assert report.exact and report.finding is None and len(report.losses) == 2
    assert report.loss_error < 1e-5 and report.gradient_error < 1e-5
    assert len(report.parameter_errors) == len(list(HandWritten().parameters()))
    assert "EXACT" in str(report) and "NOT" not in str(report)


def test_a_transformers_model_is_exact(pool: ProcessPool) -> None:
    """With dropout on and more layers than wanted: both are changed and said, and the caller's module is not."""
    module = LlamaModule(layers=3)
    module.model.config.attention_dropout = 0.1
    for layer in module.model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    report = check(pool, module, token_batch(1, 200, 2, "uneven"), layers=1, max_tokens=33)
    assert report.exact and report.seq_len == 33 and report.is_cut
    assert "EXACT on 33 tokens: " in str(report) and "NOT CHECKED: longer sequences; set max_tokens" in str(report)
    notes = "\n".join(report.notes)
    for part in ("S = 200 to 33 tokens", "model built anew with 1 layers", "dropout on", "attention_dropout=0.1"):
        assert part in notes and part in str(report)
    assert len(module.model.model.layers) == 3 and module.model.config.attention_dropout == 0.1
    assert not any("layers.1." in name for name in report.parameter_errors)


def packed_batch(edges: bool) -> dict[str, Tensor]:
    """Three documents in one row, told apart by ``cu_seqlens`` alone or by their positions."""
    batch = token_batch(1, 33)
    if edges:
        return {**batch, "cu_seqlens": torch.tensor([0, 12, 21, 33])}
    return {**batch, "position_ids": torch.cat([torch.arange(n) for n in (12, 9, 12)])[None]}


@pytest.mark.parametrize("edges", [False, True])
def test_packed_documents_and_checkpointing(pool: ProcessPool, edges: bool) -> None:
    """One process keeps documents apart as well, which transformers does not do with a cache."""
    module = LlamaModule()
    module.model.gradient_checkpointing_enable()
    report = check(pool, module, packed_batch(edges), max_tokens=30)
    assert report.exact and module.model.is_gradient_checkpointing
    assert any("gradient checkpointing" in note for note in report.notes)
    assert any("cu_seqlens" in note for note in report.notes) == edges


def test_a_cut_keeps_the_highest_positions(pool: ProcessPool) -> None:
    """The first 33 tokens alone would show nothing, nor would the last 33."""
    positions = torch.arange(100)[None]
    report = check(pool, Warmer(), {**token_batch(1, 100), "position_ids": positions}, max_tokens=33)
    assert not report.exact and report.loss_error > 1e-2
    low = {**token_batch(1, 60), "position_ids": positions[:, :60]}
    assert check(pool, Warmer(), low, max_tokens=33).exact


def test_a_cut_takes_tokens_with_targets(pool: ProcessPool) -> None:
    batch = token_batch(1, 100)
    batch["labels"][:, :60] = -100
    report = check(pool, LlamaModule(), batch, max_tokens=33)
    assert report.exact and report.losses[0] > 0


WRONG: dict[str, tuple[Any, Any, str, str | None, str, str]] = {
    # module, batch, kind, first module, part of the line, part of the change
    "arange": (
        lambda: HandWritten(positions="arange"),
        pair_batch(1, 33, 2),
        "positions",
        "place",
        "place = torch.arange(x.shape[1], device=x.device)",
        "lightning_ulysses.sequence_positions(x)",
    ),
    "labels shifted inside": (
        ShiftsInside,
        token_batch(1, 33, 2),
        "labels",
        "",
        "self(batch[",
        "batch['shift_labels']",
    ),
    "convolution": (
        Convolves,
        pair_batch(1, 33, 2),
        "mixing",
        "conv",
        "hidden = hidden + self.conv(hidden.transpose(1, 2))",
        "sp_size=1",
    ),
    "softmax of q @ k": (
        ByHand,
        pair_batch(1, 33, 2),
        "attention",
        "attention",
        "scores = q @ k.transpose(-2, -1)",
        "torch.nn.functional.scaled_dot_product_attention",
    ),
    "nothing but that": (
        lambda: ByHand(alone=True),
        pair_batch(1, 33, 2),
        "attention",
        "attention",
        "scores = q @ k.transpose(-2, -1)",
        "torch.nn.functional.scaled_dot_product_attention",
    ),
}


@pytest.mark.parametrize("case", ["arange", "labels shifted inside"])
def test_by_default_they_are_split_inside(pool: ProcessPool, case: str) -> None:
    make, batch, *_ = WRONG[case]
    report = verify_parity(make(), batch, pool=pool)
    assert report.exact and report.finding is None
    assert any("split inside the model" in note for note in report.notes) and "split='batch' explains" in str(report)


@pytest.mark.parametrize("case", mostly(["convolution", "softmax of q @ k", "nothing but that"], ["nothing but that"]))
def test_submodules_that_mix_tokens_are_exact(pool: ProcessPool, case: str) -> None:
    make, batch, *_ = WRONG[case]
    report = check(pool, make(), batch)
    assert report.exact and report.finding is None


# As if no submodule could be given more than its slice.
NO_JOINTS = "lightning_ulysses.checks.trial.trial._TRIES", 0


@pytest.mark.parametrize("case", mostly(WRONG, ["nothing but that"]))
def test_wrong_modules_and_why(pool: ProcessPool, case: str) -> None:
    make, batch, kind, module, line, change = WRONG[case]
    report = check(BrokenPool(pool, *NO_JOINTS), make(), batch)
    finding = report.finding
    assert not report.exact and finding is not None
    assert (finding.kind, finding.module) == (kind, module)
    assert finding.line is not None and line in finding.line and ".py:" in finding.line
    assert change in finding.fix
    for part in ("NOT EXACT", finding.reason, finding.fix, finding.line):
        assert part in str(report)


class Rotary(nn.Module):
    """Turns q and k by their positions, as models with a rotary embedding of their own do."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.heads = nn.Linear(width, 3 * width), heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        angle = torch.arange(x.shape[1])[:, None] / 7.0
        q, k = q * angle.cos(), k * angle.cos()
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Table(nn.Module):
    """A learned table of positions, sliced from 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 64, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[:, : x.shape[1]]


class Recurrent(nn.LSTM):
    def __init__(self, width: int) -> None:
        super().__init__(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class Pools(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(dim=1, keepdim=True)


class Reverses(nn.Module):
    """Looks along the sequence in a way that no list of functions has."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.stack(list(reversed(x.unbind(1))), 1)


class DropsOut(nn.Module):
    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        if self.attention:
            # (B, S, width) -> (B, H, S, D) -> (B, S, width)
            q = x.unflatten(-1, (4, -1)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).transpose(1, 2).flatten(2)
        return x * torch.rand_like(x)


class With(HandWritten):
    """A module in front of a right model."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.part(self.embed(x))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


@pytest.mark.parametrize(
    ("part", "kind", "line"),
    [
        (Rotary(32, 4), "positions", "angle = torch.arange(x.shape[1])"),
        pytest.param(Table(32), "positions", "self.table[:, : x.shape[1]]", marks=pytest.mark.nightly),
        (Reverses(), "unknown", None),
        pytest.param(Recurrent(32), "mixing", "super().forward(x)[0]", marks=pytest.mark.nightly),
        (Pools(), "mixing", "x.mean(dim=1, keepdim=True)"),
        (DropsOut(attention=True), "random", "F.scaled_dot_product_attention("),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_reasons(pool: ProcessPool, part: nn.Module, kind: str, line: str | None) -> None:
    finding = check(BrokenPool(pool, *NO_JOINTS), With(part), pair_batch(1, 33, 2)).finding
    assert finding is not None and finding.module == "part" and finding.class_name == type(part).__name__
    assert finding.kind == kind
    assert line is None or (finding.line is not None and line in finding.line)


def no_cut(*args: Any) -> None:
    return None


def test_what_a_module_draws_is_judged(pool: ProcessPool) -> None:
    noise = nn.Sequential(nn.Dropout(0.2), DropsOut(attention=False))
    report = check(pool, With(noise), pair_batch(1, 33, 2))
    assert report.exact and not any("dropout" in note for note in report.notes)
    # Without joints: dropout that draws for its slice alone would run on the joined sequence.
    broken = BrokenPool(
        BrokenPool(pool, *NO_JOINTS), "lightning_ulysses.interceptors.draw_table.DrawTable.find", no_cut
    )
    finding = check(broken, With(noise), pair_batch(1, 33, 2)).finding
    assert finding is not None and finding.kind == "random"


class Spare(HandWritten):
    """A frozen parameter, one that is not used, dropout without a module, a log, a hook and an optimizer wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)
        self.embed.weight.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(F.dropout(self(x), 0.3, self.training).flatten(0, 1), y.flatten())
        self.log("loss", loss)
        return {"loss": loss, "batch": x}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}}


def test_what_a_module_may_bring_along(pool: ProcessPool) -> None:
    report = check(pool, Spare(), pair_batch(1, 33, 2))
    assert report.exact and report.parameter_errors["unused.weight"] == 0
    assert "embed.weight" not in report.parameter_errors


class BrokenPool(ProcessPool):
    """Replaces something in the workers."""

    def __init__(self, pool: ProcessPool, target: str, replacement: Any) -> None:
        super().__init__(pool.size)
        self.pool, self.target, self.replacement = pool, target, replacement

    def run(self, function: Any, *args: Any, world_size: int) -> list[Any]:
        return self.pool.run(broken, function, args, self.target, self.replacement, world_size=world_size)


def broken(rank: int, function: Any, args: Any, target: str, replacement: Any) -> Any:
    with mock.patch(target, replacement):
        return function(rank, *args)


def test_negative_control(pool: ProcessPool) -> None:
    """A weight that is wrong by the share of targets is found, and no module is blamed."""
    patched = BrokenPool(pool, "lightning_ulysses.loss.weights.token_weight", no_weight)
    batch = pair_batch(2, 33, 2, "uneven")
    assert check(pool, HandWritten(), batch).exact
    report = check(patched, HandWritten(), batch)
    assert not report.exact and report.loss_error > 1e-3 and report.gradient_error > 1e-3
    assert report.finding is not None and report.finding.kind == "targets" and report.finding.module == ""


class FailsOnOneRank(HandWritten):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 1:
            raise ValueError("no such slice")
        return super().training_step(batch, batch_idx)


class Fails(HandWritten):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise ValueError("never works")


def test_failures(pool: ProcessPool) -> None:
    report = check(pool, FailsOnOneRank(), pair_batch(1, 33))
    assert report.finding is not None and report.finding.kind == "failed" and not report.exact
    assert "ValueError: no such slice" in report.finding.reason and not report.split_losses
    heads = check(pool, HandWritten(heads=3, kv_heads=3), pair_batch(1, 33), sp_size=4)
    assert heads.finding is None and heads.exact
    gathered = check(pool, HandWritten(), pair_batch(1, 33), sp_size={"ulysses": 2, "gather": 2})
    assert gathered.exact and gathered.sp_size == 4
    with pytest.raises(UlyssesError, match="ValueError: never works"):
        verify_parity(Fails(), pair_batch(1, 33), pool=pool)
    with pytest.raises(UlyssesError, match="batches with at least one valid label"):
        verify_parity(LlamaModule(), token_batch(1, 33, 1, "none"), pool=pool)


def test_messages(pool: ProcessPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def says(text: str, module: Any, batch: Any = None, **kwargs: Any) -> None:
        with pytest.raises(UlyssesError, match=text):
            verify_parity(module, pair_batch(1, 33) if batch is None else batch, pool=pool, **kwargs)

    says("automatic_optimization=False", HandWritten(manual=True))
    says("holds no transformers model", HandWritten(), layers=1)
    says("sp_size=1", HandWritten(), sp_size=1)
    says("a batch for each step", HandWritten(), sp_size={"ulysses": 2})
    says("2 batches for steps=3", HandWritten(), [pair_batch(1, 33)] * 2, steps=3)
    says(r"strategy with \['stage'\]", HandWritten(), strategy={"stage": 3})
    says("3 tokens per row", HandWritten(), pair_batch(1, 3), sp_size=4)

    class Inside(HandWritten):
        pass

    says("Inside, which cannot be sent to other processes", Inside())
    lambdas = HandWritten()
    lambdas.activation = lambda x: x  # type: ignore[assignment]
    says("HandWritten, which cannot be sent", lambdas)
    monkeypatch.setattr(HandWritten, "__module__", "__main__")
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    says("HandWritten, defined in a notebook or at a prompt", HandWritten())


class Lazy(LlamaModule):
    """Builds its model late, and more of it than would fit."""

    def __init__(self) -> None:
        super().__init__()
        del self.model

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.model = LlamaModule(layers=3).model
            # Other weights in every process, unless they get the same ones.
            generator = torch.Generator()
            generator.seed()
            nn.init.normal_(self.model.lm_head.weight, std=0.1, generator=generator)


def test_a_model_that_is_built_late(pool: ProcessPool) -> None:
    report = check(pool, Lazy(), token_batch(1, 33, 2), layers=2)
    assert report.exact and report.grad_norms[0] > 0.1
    assert any("layers.1." in name for name in report.parameter_errors)
    assert not any("layers.2." in name for name in report.parameter_errors)
