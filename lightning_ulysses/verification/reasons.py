"""The likely reason of a difference, and what to change, in words."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.verification.compare import Comparison
from lightning_ulysses.verification.record import Suspect
from lightning_ulysses.verification.report import Finding

_REASONS = {
    "attention": (
        "attention is not intercepted: scores written out by hand see only the keys of this rank's slice",
        "call torch.nn.functional.scaled_dot_product_attention by its full name in place of softmax(q @ k) @ v",
    ),
    "positions": (
        "positions restart at 0 on every rank",
        "use lightning_ulysses.sequence_positions(x) in place of torch.arange(x.shape[1]), also to index a table; "
        "to leave the model as it is, have it split behind its positions by plan=... in the strategy",
    ),
    "mixing": (
        "a layer mixes tokens along the sequence outside attention, and sees only this rank's slice",
        "leave that layer out, or train this module without splitting (sp_size=1)",
    ),
    "labels": (
        "labels are shifted inside the step: the label of a slice's last token lies on the next rank",
        "use batch['shift_labels'], which is shifted before the cut, and keep all logits",
    ),
    "random": (
        "dropout of attention, or other random numbers that are not those that one process would draw",
        "set the probability to 0 for this comparison; in training such a difference is only another draw",
    ),
    "targets": (
        "every output agrees and the loss does not: it is no mean over the targets by which ranks are weighted",
        "return the mean over the valid targets, name their tensor with targets=... in the strategy, or set "
        "loss_weighting='none' if it is no token mean",
    ),
    "unknown": (
        "an operation of its own that looks along the sequence, or counts from where this rank's slice begins",
        "compute positions from lightning_ulysses.sequence_positions(x); what mixes tokens has to be "
        "torch.nn.functional.scaled_dot_product_attention",
    ),
}
# A causal mask written by hand calls arange too, so attention comes before positions.
_ORDER = ("attention", "mixing", "positions", "random")


def _within(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def explain(comparison: Comparison, suspects: Sequence[Suspect], root: str) -> Finding:
    """Explains why two complete runs differ.

    Args:
        comparison: The comparison of all modules.
        suspects: Calls that depend on where a slice begins or ends, as one rank made them.
        root: The class of the LightningModule.
    """
    first, culprit = comparison.first, comparison.culprit
    if first is None:
        # All modules agree, so the step computes the loss in a wrong way.
        labels = [suspect for suspect in suspects if suspect.kind == "labels"]
        return _finding("labels" if labels else "targets", "", root, labels)
    if first.inputs_differ and first.restarts:
        lines = [suspect for suspect in suspects if suspect.kind == "positions"]
        return _finding("positions", first.name, first.class_name, lines)
    where = culprit.name if culprit is not None else ""
    class_name = culprit.class_name if culprit is not None else root
    clean = comparison.clean()
    inside = [
        suspect
        for suspect in suspects
        if _within(suspect.module, where) and (suspect.module == where or suspect.module not in clean)
    ]
    for kind in _ORDER:
        lines = [suspect for suspect in inside if suspect.kind == kind]
        if lines:
            # Calls that the module makes itself come before those of its submodules.
            lines.sort(key=lambda suspect: suspect.module != where)
            return _finding(kind, where, class_name, lines)
    if culprit is not None and not culprit.is_own:
        return _finding("mixing", where, class_name, [])
    return _finding("unknown", where, class_name, [])


def _finding(kind: str, module: str, class_name: str, lines: Sequence[Suspect]) -> Finding:
    reason, fix = _REASONS[kind]
    return Finding(kind, reason, fix, module, class_name, lines[0].line if lines else None)


def explain_refusal(error: UlyssesError, comparison: Comparison, suspects: Sequence[Suspect]) -> Finding:
    """The strategy's own message, with the module and the line that it is about, if they are known.

    Args:
        error: The error of the strategy.
        comparison: The comparison of the modules that ran before it.
        suspects: As in `explain`.
    """
    kind = "refused"
    if "without a single attention call" in error.got:
        kind = "attention"
    elif "shift_labels" in error.fix:
        kind = "labels"
    lines = [suspect for suspect in suspects if suspect.kind == kind]
    reason = f"{_REASONS[kind][0]} (got {error.got})" if kind in _REASONS else f"got {error.got}"
    culprit = comparison.culprit
    return Finding(
        kind,
        reason,
        error.fix,
        culprit.name if culprit is not None else None,
        culprit.class_name if culprit is not None else None,
        lines[0].line if lines else None,
    )


def explain_failure(text: str) -> Finding:
    """Reports an exception that does not come from this package."""
    lines = text.strip().splitlines()
    return Finding(
        "failed",
        f"the split run failed although the plain one did not: {lines[-1]}",
        "see the traceback below; each process holds a slice of the sequence only\n" + text.strip(),
    )
