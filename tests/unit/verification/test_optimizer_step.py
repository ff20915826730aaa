"""``verify_parity`` compares a step of the module's own optimizer, and says where it did not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import HandWritten, pair_batch

from lightning_ulysses.testing.processes import ProcessPool
from lightning_ulysses.verification import ParityReport, verify_parity


class Steps(HandWritten):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def configure_optimizers(self) -> Any:
        if self.how == "adafactor":
            return torch.optim.Adafactor(self.parameters(), lr=0.1)
        decayed = [p for p in self.parameters() if p.dim() > 1]
        groups = [
            {"params": decayed, "weight_decay": 0.1},
            {"params": [p for p in self.parameters() if p.dim() < 2], "lr": 0.01},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.02)
        if self.how == "warmup":
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 10, 1.0))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        return optimizer


class Doubles(Steps):
    """A step that is another one wherever gradients are not those of one process."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.trainer.world_size > 1:
            for group in optimizer.param_groups:
                group["lr"] *= 2


def report_of(module: Any, pool: ProcessPool) -> ParityReport:
    return verify_parity(module, pair_batch(1, 32, 2, "uneven"), pool=pool)


def test_the_step_of_an_optimizer_is_compared(pool: ProcessPool) -> None:
    report = report_of(Steps("adamw"), pool)
    assert report.exact and report.step_error is not None and report.step_error < 1e-5
    assert "a step of the optimizer differs by" in str(report) and "NOT CHECKED" not in str(report)


def test_a_step_that_moves_nothing_is_not_checked(pool: ProcessPool) -> None:
    report = report_of(Steps("warmup"), pool)
    assert report.exact and report.step_error is None
    assert "NOT CHECKED: the optimizer's step; the first one moves no weight" in str(report)


@pytest.mark.parametrize("module", [Steps("adafactor"), Doubles("adamw")])
def test_another_step_is_not_exact(pool: ProcessPool, module: Any) -> None:
    report = report_of(module, pool)
    assert not report.exact and report.finding is not None and report.finding.kind == "optimizer"
    assert "NOT EXACT" in str(report) and "something else with ZeRO's flat pieces" in str(report)
