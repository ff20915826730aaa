"""The result of a comparison, as values, lines and JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from lightning_ulysses.geometry.distance import largest

_WORST = 5


def relative(value: float, wanted: float) -> float:
    """|value - wanted| / |wanted|; NaN if either is NaN."""
    return abs(value - wanted) / max(abs(wanted), 1e-12)


@dataclass(frozen=True)
class Finding:
    """Why two runs differ.

    Attributes:
        kind: ``"positions"``, ``"labels"``, ``"mixing"``, ``"attention"``, ``"random"``, ``"targets"``, ``"refused"``,
            ``"failed"``, ``"optimizer"`` or ``"unknown"``.
        reason: The likely reason, in words.
        fix: What to change.
        module: The module where the difference arises, "" for the LightningModule itself; None if it is not known.
        class_name: Its class.
        line: The line of code, as ``file:number: text``, if one was found.
    """

    kind: str
    reason: str
    fix: str
    module: str | None = None
    class_name: str | None = None
    line: str | None = None


# What a model computes from positions may change at a length that was not reached.
_UNCHECKED = "NOT CHECKED: longer sequences; set max_tokens (--max_tokens) to the length of the batch"


@dataclass(frozen=True)
class ParityReport:
    """One process compared with P, on the same weights and batches.

    Attributes:
        sp_size: P.
        seq_len: S of the first batch.
        tolerance: The largest relative difference that counts as equal.
        losses: Loss of each batch in one process.
        split_losses: The same on P processes; empty if that run was refused.
        grad_norms: 2-norm of the gradient of each batch in one process.
        split_grad_norms: The same on P processes.
        parameter_errors: For each parameter the relative L2 difference of its gradient, the largest over all batches. A
            gradient below 1 % of the whole norm is compared with that 1 %, since rounding alone moves it.
        finding: Why the runs differ; None if they do not.
        notes: What was changed for the comparison.
        is_cut: Whether batches are longer than what was compared of them.
        step_error: The relative L2 difference of a step of the module's optimizer; None if it was not compared.
        step_reason: Why it was not.
    """

    sp_size: int
    seq_len: int
    tolerance: float
    losses: tuple[float, ...]
    split_losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    split_grad_norms: tuple[float, ...]
    parameter_errors: dict[str, float] = field(default_factory=dict)
    finding: Finding | None = None
    notes: tuple[str, ...] = ()
    is_cut: bool = False
    step_error: float | None = None
    step_reason: str | None = "loss and gradients come first"

    @property
    def loss_error(self) -> float:
        """The largest relative difference of a loss; infinite if there is no loss to compare."""
        return largest(relative(value, wanted) for value, wanted in zip(self.split_losses, self.losses, strict=False))

    @property
    def grad_norm_error(self) -> float:
        """The largest relative difference of a gradient norm; infinite if there is no norm to compare."""
        pairs = zip(self.split_grad_norms, self.grad_norms, strict=False)
        return largest(relative(value, wanted) for value, wanted in pairs)

    @property
    def gradient_error(self) -> float:
        """The largest of `parameter_errors`; infinite if there is none."""
        return largest(self.parameter_errors.values())

    @property
    def exact(self) -> bool:
        """Whether loss, gradient norm, every parameter's gradient and the optimizer's step agree."""
        complete = len(self.split_losses) == len(self.losses)
        errors = (self.loss_error, self.grad_norm_error, self.gradient_error, self.step_error or 0.0)
        return complete and largest(errors) <= self.tolerance

    def worst(self, count: int = _WORST) -> list[tuple[str, float]]:
        """The parameters whose gradients differ most, the worst first."""
        return sorted(self.parameter_errors.items(), key=lambda item: -item[1] if item[1] == item[1] else -math.inf)[
            :count
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has. Values that are not finite become None."""

        def number(value: float) -> float | None:
            return value if math.isfinite(value) else None

        finding = self.finding
        return {
            "exact": self.exact,
            "sp_size": self.sp_size,
            "seq_len": self.seq_len,
            "tolerance": self.tolerance,
            "loss": {
                "single": [number(value) for value in self.losses],
                "split": [number(value) for value in self.split_losses],
                "relative_error": number(self.loss_error),
            },
            "grad_norm": {
                "single": [number(value) for value in self.grad_norms],
                "split": [number(value) for value in self.split_grad_norms],
                "relative_error": number(self.grad_norm_error),
            },
            "parameters": {name: number(error) for name, error in self.parameter_errors.items()},
            "finding": None if finding is None else dict(vars(finding)),
            "notes": list(self.notes),
            "is_cut": self.is_cut,
            "optimizer_step": {
                "relative_error": None if self.step_error is None else number(self.step_error),
                "not_checked": self.step_reason,
            },
        }

    def _rows(self) -> list[tuple[str, str, str, str]]:
        rows = [("", "one process", f"{self.sp_size} processes", "relative difference")]
        named = (("loss", self.losses, self.split_losses), ("grad norm", self.grad_norms, self.split_grad_norms))
        for label, single, split in named:
            for index, value in enumerate(single):
                name = f"{label}, batch {index + 1}" if len(single) > 1 else label
                other = split[index] if index < len(split) else None
                shown = ("-", "-") if other is None else (f"{other:.7g}", f"{relative(other, value):.1e}")
                rows.append((name, f"{value:.7g}", *shown))
        return rows

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            f"{row[0]:<{widths[0]}}  " + "  ".join(f"{row[i]:>{widths[i]}}" for i in range(1, 4)).rstrip()
            for row in rows
        ]
        if self.parameter_errors:
            lines += ["", f"gradients of {len(self.parameter_errors)} parameters, those that differ most:"]
            lines += [f"  {error:.1e}  {name}" for name, error in self.worst()]
        if self.step_error is not None:
            lines += ["", f"a step of the optimizer differs by {self.step_error:.1e}"]
        lines += ["", *(f"note: {note}" for note in self.notes)] if self.notes else [""]
        if self.exact:
            where = f" on {self.seq_len} tokens" if self.is_cut else ""
            lines.append(f"EXACT{where}: every difference is at most {self.tolerance:g}")
            unchecked = [_UNCHECKED] if self.is_cut else []
            if self.step_error is None:
                unchecked.append(f"NOT CHECKED: the optimizer's step; {self.step_reason}")
            return "\n".join([*lines, *unchecked])
        return "\n".join([*lines, *self._explain()])

    def _explain(self) -> list[str]:
        finding = self.finding
        assert finding is not None
        refused = not self.split_losses
        lines = [
            "NOT EXACT: the split run stopped" if refused else f"NOT EXACT: a difference exceeds {self.tolerance:g}"
        ]
        if finding.module is not None:
            name = finding.module or "the LightningModule itself"
            lines.append(f"  first difference  {name} ({finding.class_name})")
        lines.append(f"  likely reason     {finding.reason}")
        if finding.line:
            lines.append(f"  line              {finding.line}")
        lines.append(f"  change            {finding.fix}")
        return lines
