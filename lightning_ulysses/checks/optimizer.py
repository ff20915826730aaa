"""Checks that an optimizer updates each element by itself: ZeRO hands it flat pieces of all weights."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ulysses.errors import UlyssesError

# Known to be elementwise, by the name of the class: torch's own, and those of DeepSpeed and bitsandbytes.
_ELEMENTWISE = {
    *("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD", "Lion"),
    *("FusedAdam", "DeepSpeedCPUAdam", "DeepSpeedCPUAdagrad", "DeepSpeedCPULion", "FusedLion"),
}
_STEPS = 3
# Relative L2 difference of a step that rounding does not reach.
_TOLERANCE = 1e-4


def check_elementwise(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Refuses an optimizer whose step of a weight depends on the shape of its parameter, or on other weights.

    It is tried with its own settings on two small parameters, whole and as one flat piece.

    Args:
        optimizer: As the module returned it.
        device: Where it will step.

    Raises:
        UlyssesError: With the class of the optimizer.
    """
    kind = type(optimizer)
    if kind.__name__ in _ELEMENTWISE and kind.__module__.split(".")[0] in ("torch", "deepspeed"):
        return
    expected = "one that updates each weight by its own gradient: ZeRO hands it flat pieces of all weights"
    fix = "use torch.optim.AdamW, SGD or another elementwise optimizer"
    try:
        flat = _steps(optimizer, device, flat=True)
    except Exception as failure:
        got = f"the optimizer {kind.__name__}, which fails at a step on a flat piece of the weights ({failure!r})"
        raise UlyssesError(got, expected, fix) from failure
    try:
        whole = _steps(optimizer, device, flat=False)
        distance = float((whole - flat).norm() / whole.norm().clamp_min(1e-30))
    except Exception as failure:
        warnings.warn(
            f"{kind.__name__} could not be tried on two small parameters ({failure!r}). ZeRO hands it flat pieces of "
            "all weights: a step that is not elementwise is not that of one process.",
            stacklevel=2,
        )
        return
    if not distance <= _TOLERANCE:
        raise UlyssesError(
            f"the optimizer {kind.__name__}, whose step on a flat piece of the weights differs by {distance:.2g} from "
            "that on whole parameters",
            expected,
            fix,
        )


def _steps(optimizer: torch.optim.Optimizer, device: torch.device, flat: bool) -> Tensor:
    """What a few steps of a copy change in two parameters of 12 and 5 elements, (17,)."""
    random = torch.Generator().manual_seed(0)
    numbers = torch.randn(_STEPS + 1, 17, generator=random).to(device)
    start, gradients = numbers[0], numbers[1:]
    # Settings as they are, without the user's parameters and their state.
    trial = copy.copy(optimizer)
    vars(trial).update(param_groups=[], state=defaultdict(dict))
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    parameters = [nn.Parameter(start.clone())] if flat else [nn.Parameter(p.clone()) for p in _parts(start)]
    vars(trial)["param_groups"] = [{**copy.deepcopy(group), "params": parameters}]
    for gradient in gradients:
        for parameter, part in zip(parameters, [gradient] if flat else _parts(gradient), strict=True):
            parameter.grad = part.clone()
        trial.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters]) - start


def _parts(numbers: Tensor) -> list[Tensor]:
    # (17,) -> (3, 4) and (5,)
    return [numbers[:12].view(3, 4), numbers[12:]]


def only_one(optimizers: Sequence[Any], schedulers: Sequence[Any]) -> tuple[Any, Any]:
    """The only optimizer of a module, and its scheduler or None.

    Raises:
        UlyssesError: If the module has no optimizer, or several.
    """
    if len(optimizers) != 1 or len(schedulers) > 1:
        raise UlyssesError(
            f"{len(optimizers)} optimizers and {len(schedulers)} schedulers from configure_optimizers",
            "one optimizer, and at most one scheduler: ZeRO shards the state of a single one",
            "return one optimizer; parameters with settings of their own go into groups of it",
        )
    return optimizers[0], schedulers[0] if schedulers else None


def clipping_error(algorithm: Any) -> UlyssesError:
    """For gradients that are clipped by value."""
    return UlyssesError(
        f"clip_gradients(gradient_clip_algorithm={str(getattr(algorithm, 'value', algorithm))!r})",
        "clipping by norm, the only kind that DeepSpeed does",
        "pass gradient_clip_algorithm='norm'",
    )
