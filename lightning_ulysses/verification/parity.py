"""``verify_parity``: one process against P, on the user's own module and batch."""

from __future__ import annotations

import dataclasses
import functools
import math
import pickle
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_ulysses.batch.whole import read_batch
from lightning_ulysses.config import are_sizes
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.testing.processes import ProcessPool, RemoteError
from lightning_ulysses.verification.compare import compare_calls, gradient_errors, norm
from lightning_ulysses.verification.optimizer_step import StepRecord, difference, step_single, step_split
from lightning_ulysses.verification.reasons import explain, explain_failure, explain_refusal
from lightning_ulysses.verification.report import Finding, ParityReport
from lightning_ulysses.verification.run import Job, Record, has_parameters, run_single, run_split
from lightning_ulysses.verification.shrink import cut_batch, shrink_module, without_checkpointing

SETTINGS = ("sequence_dims", "loss_weighting", "targets", "ignore_index", "plan", "split")

_INSIDE = (
    "split inside the model (split='blocks'), as training does by default: slices of the batch give another step, "
    "which split='batch' explains"
)


def verify_parity(
    module: pl.LightningModule,
    batch: Any,
    *,
    sp_size: int | dict[str, int] = 2,
    steps: int | None = None,
    strategy: dict[str, Any] | None = None,
    tolerance: float = 1e-4,
    layers: int | None = None,
    max_tokens: int = 4096,
    accelerator: str = "cpu",
    pool: ProcessPool | None = None,
) -> ParityReport:
    """Runs a module in one process and split over P, from the same weights, and compares loss and gradients.

    Both runs are in float32 with dropout of attention off and change no weights, so that every batch is compared on the
    same ones. Two more runs take one step of the module's own optimizer on the same gradients. ``module`` itself stays
    as it is: the processes work on copies.

    Args:
        module: The user's module. Its class has to be importable by other processes.
        batch: A whole batch, or a list of them; B, S and the keys as the dataloader yields them.
        sp_size: P, or its factors, such as ``{"ulysses": 2, "gather": 2}``.
        steps: Batches to compare; all that were given if None.
        strategy: ``sequence_dims``, ``loss_weighting``, ``targets``, ``ignore_index``, ``plan`` and ``split`` of
            `UlyssesDeepSpeedStrategy`; its other arguments do not change what a step computes. Where neither ``plan``
            nor ``split`` is given, a step that is not exact on slices of the batch is split inside the model as well.
        tolerance: The largest relative difference that counts as equal.
        layers: Builds transformers models anew with at most so many layers, from random weights: for a model too large
            for one process. One that ``configure_model`` builds never exists whole.
        max_tokens: Longer batches are cut to so many tokens.
        accelerator: ``"cpu"``, or ``"cuda"`` with P GPUs.
        pool: Processes to use, P at least; started and ended here if None.

    Returns:
        The comparison, with the likely reason where the runs differ; ``print`` shows it.

    Raises:
        UlyssesError: If the module cannot be sent to other processes, optimises by hand, or fails in one process.

    Example:
        >>> report = verify_parity(module, next(iter(loader)), sp_size=2)
        >>> assert report.exact, report
    """
    if not module.automatic_optimization:
        raise UlyssesError(
            f"{type(module).__name__} with automatic_optimization=False",
            "a module that returns its loss, so that nothing else steps between the two runs",
            "set automatic_optimization=True for the comparison and return the loss from training_step",
        )
    settings = dict(strategy or {})
    ranks = math.prod(sp_size.values()) if isinstance(sp_size, dict) else sp_size
    compare = functools.partial(
        _compare,
        module,
        batch,
        sp_size=sp_size,
        steps=steps,
        tolerance=tolerance,
        layers=layers,
        max_tokens=max_tokens,
        accelerator=accelerator,
    )
    # Which takes seconds, and is then done once for all processes.
    imported = [name for name in ("transformers.modeling_utils",) if name in sys.modules]
    with nullcontext(pool) if pool is not None else ProcessPool(ranks, 600.0, imported) as processes:
        if settings.get("plan") is not None or settings.get("split", "auto") != "auto":
            return compare(settings, processes)
        cut: ParityReport | UlyssesError
        try:
            cut = compare({**settings, "split": "batch"}, processes)
        except UlyssesError as error:
            cut = error
        if isinstance(cut, ParityReport) and cut.exact:
            return cut
        try:
            inside = compare({**settings, "split": "blocks"}, processes)
        except UlyssesError:
            inside = None
    if inside is not None and inside.exact:
        return dataclasses.replace(inside, notes=(*inside.notes, _INSIDE))
    if isinstance(cut, UlyssesError):
        raise cut
    return cut


def _compare(
    module: pl.LightningModule,
    batch: Any,
    strategy: dict[str, Any],
    processes: ProcessPool,
    *,
    sp_size: int | dict[str, int],
    steps: int | None,
    tolerance: float,
    layers: int | None,
    max_tokens: int,
    accelerator: str,
) -> ParityReport:
    with tempfile.TemporaryDirectory() as folder:
        job, seq_len, notes = _make_job(folder, batch, sp_size, steps, strategy, layers, max_tokens, accelerator)
        layout = read_batch(job.batches[0], job.rules, job.sp_size).layout
        is_cut = bool(notes)
        notes += _save_module(module, Path(folder) / "module.pt", layers)
        single, ranks = _run(job, processes)
        notes += [note for note in single.notes if note not in notes]
        report = ParityReport(
            sp_size=job.sp_size,
            seq_len=seq_len,
            tolerance=tolerance,
            losses=tuple(single.losses),
            split_losses=tuple(ranks[0].losses),
            grad_norms=tuple(norm(gradients) for gradients in single.gradients),
            split_grad_norms=tuple(norm(gradients) for gradients in ranks[0].gradients),
            parameter_errors=gradient_errors(single.gradients, ranks[0].gradients),
            notes=tuple(notes),
            is_cut=is_cut,
        )
        if report.exact and not any(rank.error for rank in ranks):
            return _compare_step(report, job, processes)
    # A plan tells S only once it has split something.
    shares = next((rank.shares for rank in ranks if rank.shares), layout.shares)
    finding = _find(single, ranks, shares, tolerance, type(module).__name__)
    return dataclasses.replace(report, finding=finding)


def _make_job(
    folder: str,
    batch: Any,
    sp_size: int | dict[str, int],
    steps: int | None,
    strategy: dict[str, Any] | None,
    layers: int | None,
    max_tokens: int,
    accelerator: str,
) -> tuple[Job, int, list[str]]:
    """The job, S of its first batch, and a note where batches were cut."""
    settings = dict(strategy or {})
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise UlyssesError(
            f"strategy with {unknown}",
            f"some of {list(SETTINGS)}, which say how a batch and its loss are read",
            "leave the others out; they do not change what a step computes",
        )
    batches = list(batch) if _is_list(batch) else [batch]
    job = Job(folder, batches[:steps], sp_size, settings, layers, accelerator)
    if (
        not are_sizes(sp_size)
        or job.sp_size < 2
        or not batches
        or (steps is not None and not 0 < steps <= len(batches))
    ):
        raise UlyssesError(
            f"sp_size={sp_size} and {len(batches)} batches for steps={steps}",
            "sp_size of 2 or more, or {'ulysses': U, 'gather': R}, and a batch for each step",
            "change sp_size or steps, or give more batches",
        )
    cuts = [cut_batch(each, job.rules, max_tokens, job.sp_size) for each in job.batches]
    job.batches[:] = [each for each, _, _ in cuts]
    longest = max(before for _, before, _ in cuts)
    notes = [f"batches cut from S = {longest} to {max_tokens} tokens"] if longest > max_tokens else []
    return job, cuts[0][2], notes


def _is_list(batch: Any) -> bool:
    """Whether it is a list of batches; a list of tensors is one batch."""
    return isinstance(batch, Sequence) and not isinstance(batch, (Tensor, str)) and not _holds_tensors(batch)


def _holds_tensors(batch: Sequence[Any]) -> bool:
    return any(isinstance(part, Tensor) for part in batch)


def _save_module(module: pl.LightningModule, path: Path, layers: int | None) -> list[str]:
    main = sys.modules.get("__main__")
    local = sorted({type(part).__qualname__ for part in module.modules() if type(part).__module__ == "__main__"})
    if local and not Path(getattr(main, "__file__", None) or "").is_file():
        raise UlyssesError(
            f"{', '.join(local)}, defined in a notebook or at a prompt",
            "classes that other processes can import",
            "move the class to a file and import it from there",
        )
    copied, notes = without_checkpointing(module)
    try:
        torch.save(copied, path)
        if layers is not None and has_parameters(module):
            # A copy, so that the user's module stays as it is.
            copied = torch.load(path, map_location="cpu", weights_only=False)
            notes += shrink_module(copied, layers)
            torch.save(copied, path)
        elif layers is not None:
            notes.append(f"transformers models built with at most {layers} layers")
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        if isinstance(error, UlyssesError):
            raise
        raise UlyssesError(
            f"{type(module).__name__}, which cannot be sent to other processes: {error}",
            "a module that can be pickled, as lambdas, open files and classes inside functions cannot",
            "move what the message names to the top of a file that can be imported",
        ) from error
    return notes


def _run(job: Job, pool: ProcessPool) -> tuple[Record, list[Record]]:
    single = _in_workers(job, pool, run_single, [None])[0]
    if single.error is not None:
        raise _plain_failure(single.error)
    if not all(math.isfinite(loss) for loss in single.losses):
        raise UlyssesError(
            f"losses {single.losses} in one process",
            "finite losses, which two runs can agree on",
            "give batches with at least one valid label, and weights that do not overflow",
        )
    return single, _in_workers(job, pool, run_split, list(range(job.sp_size)))


def _compare_step(report: ParityReport, job: Job, pool: ProcessPool) -> ParityReport:
    """The report with the step of the module's own optimizer."""
    splits = _in_workers(job, pool, step_split, list(range(job.sp_size)), StepRecord, "-step")
    errors = [split.error for split in splits if split.error is not None]
    refusals = [error for error in errors if isinstance(error, UlyssesError)]
    if refusals:
        finding = Finding("optimizer", f"the strategy refuses it: {refusals[0].got}", refusals[0].fix)
        return dataclasses.replace(report, step_error=math.inf, finding=finding)
    if errors or not splits[0].after:
        return dataclasses.replace(report, step_reason="the split run ended before it")
    single = _in_workers(job, pool, step_single, [None], StepRecord, "-step")[0]
    if single.error is not None or not single.after:
        return dataclasses.replace(report, step_reason="one process ended before it")
    error = difference(single, splits[0])
    if error is None:
        return dataclasses.replace(report, step_reason="the first one moves no weight, as in a warmup from 0")
    if error <= report.tolerance:
        return dataclasses.replace(report, step_error=error, step_reason=None)
    finding = Finding(
        "optimizer",
        "the optimizer does something else with ZeRO's flat pieces than with whole parameters, or a hook changes the "
        "step in one of the two runs",
        "use an optimizer that treats each number by itself, such as torch.optim.AdamW, and clip with "
        "Trainer(gradient_clip_val=...)",
    )
    return dataclasses.replace(report, step_error=error, step_reason=None, finding=finding)


def _in_workers(
    job: Job, pool: ProcessPool, run: Any, ranks: list[Any], record: Any = Record, of: str = ""
) -> list[Any]:
    """The records of ``run``; one that failed says so, one that waited for it is empty."""
    try:
        pool.run(run, job, world_size=len(ranks))
    except TimeoutError as error:
        raise UlyssesError(
            f"worker processes that do not answer: {error}",
            "a step that ends",
            "give smaller batches with max_tokens or fewer layers, or a pool with a longer timeout",
        ) from error
    except (RemoteError, EOFError, OSError) as error:
        if not any(job.path(rank, of).is_file() for rank in ranks):
            raise UlyssesError(
                f"worker processes that cannot start: {error}",
                "processes that can import the module's class, and a script that may be imported",
                "put what your script runs under `if __name__ == '__main__':`, or move the class to another file",
            ) from error
    paths = [job.path(rank, of) for rank in ranks]
    return [torch.load(path, weights_only=False) if path.is_file() else record() for path in paths]


def _plain_failure(error: UlyssesError | str) -> UlyssesError:
    if isinstance(error, UlyssesError):
        return error
    return UlyssesError(
        f"a module that fails in one process, without any split:\n{error}",
        "a module that trains on this batch by itself",
        "change what the traceback names",
    )


def _find(single: Record, ranks: list[Record], shares: tuple[int, ...], tolerance: float, root: str) -> Finding:
    suspects = ranks[-1].suspects
    comparison = compare_calls(single.calls, [rank.calls for rank in ranks], shares, tolerance)
    refusals = [rank.error for rank in ranks if isinstance(rank.error, UlyssesError)]
    if refusals:
        return explain_refusal(refusals[0], comparison, suspects)
    # One rank fails; others may only have lost the connection to it.
    failures = sorted((rank.error for rank in ranks if isinstance(rank.error, str)), key=_is_lost_connection)
    if failures:
        return explain_failure(failures[0])
    return explain(comparison, suspects, root)


def _is_lost_connection(text: str) -> bool:
    return "gloo" in text.lower() or "connection" in text.lower()
