"""Checks of a step that runs: attention was intercepted, a plan took effect, no gradient was taken inside."""

from __future__ import annotations

from lightning_ulysses.attention.route import AttentionTally
from lightning_ulysses.context import SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.regions.notes import JointTally, RegionTally


def check_joined(context: SequenceContext, step: str, module: str) -> None:
    """Refuses a plan whose region is still open at the end of a step: it was never joined."""
    if context.is_joined and context.place.region is not None:
        raise UlyssesError(
            f"a {step} of {module} that ended before it reached a submodule that the plan joins",
            "a call of one behind each split",
            "name a submodule under join that the step calls, or drop join and name the model's inputs under whole",
        )


def check_backward(context: SequenceContext) -> None:
    """Refuses a gradient that crosses slices inside of a step: of the sequence, each rank has its part alone."""
    if context.place.batch is None or context.place.is_backward:
        return
    raise UlyssesError(
        "a gradient that is taken inside of the step, through attention or a submodule that is split",
        "one backward, of the step's loss, since what the step itself reads would be the gradient of other losses",
        "call self.manual_backward(loss), or fabric.backward(loss), where it is that of the loss; where the step reads "
        "gradients, as those of torch.autograd.grad, set sp_size=1 in the strategy",
    )


def check_intercepted(context: SequenceContext, step: str, module: str, suspensions: int) -> bool:
    """Refuses a model if none of its attention calls was intercepted: they would attend within slices only.

    Args:
        context: The context at the end of the step.
        step: The name of the step that ran.
        module: The name of the user's class.
        suspensions: `SequenceContext.suspensions` before the step. A step that only generates is unsharded on purpose.

    Returns:
        Whether later steps need no check. With a plan, every step is checked.

    Raises:
        UlyssesError: If no attention call of any step so far was intercepted, or the plan did not split or join.
    """
    was_hidden = context.suspensions != suspensions
    if context.plan is not None and not context.notes.of(RegionTally).begun and not was_hidden:
        raise UlyssesError(
            f"a {step} of {module} that reached none of the submodules that the plan splits",
            "a step that calls at least one of them",
            "name a submodule under split that the step calls (its forward by way of the module itself, not .forward)",
        )
    check_joined(context, step, module)
    # Counted over all steps so far, and over attention to a memory as well.
    calls = context.notes.of(AttentionTally).calls + context.notes.of(JointTally).calls
    if context.mesh.sp_size > 1 and not calls and not was_hidden and not context.is_proven:
        raise UlyssesError(
            f"a {step} of {module} without a single attention call intercepted",
            "calls of torch.nn.functional.scaled_dot_product_attention, of transformers' attention functions, or of "
            "lightning_ulysses.ulysses_attention; anything else would stay within this rank's slice",
            "call torch.nn.functional.scaled_dot_product_attention by its full name, or set sp_size=1",
        )
    return context.plan is None and (context.mesh.sp_size == 1 or bool(calls))
