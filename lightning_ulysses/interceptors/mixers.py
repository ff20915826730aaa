"""Intercepts functions in which tokens meet outside of attention: scans, linear attention and causal convolutions.

transformers makes one of each for every model, which calls the kernel of `fla`, `mamba_ssm` or `causal_conv1d` where
that is installed. Models look them up by name in their own file. Libraries import the kernels early. So functions are
found by their names, in whatever module they are, and replaced wherever they are held.

Source: transformers ``integrations/hub_kernels.py``, ``use_kernel_func_from_hub_with_fallback``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lightning_ulysses.context import SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.mixing.call import MixerCall
from lightning_ulysses.mixing.route import route
from lightning_ulysses.mixing.table import FUSED, TABLE, Fused, Mixer
from lightning_ulysses.patching.early_bound import Function, imported

_MASK = "create_recurrent_attention_mask"


def _functions() -> Iterator[tuple[str, Function, str]]:
    """Functions that may be taken over in imported modules, each once, with the name of the module."""
    met: set[int] = set()
    names = (*TABLE, *FUSED, _MASK)
    for file, module in imported():
        held = vars(module)
        # Few modules hold any.
        for name in names if not held.keys().isdisjoint(names) else ():
            found = held.get(name)
            if callable(found) and id(found) not in met:
                met.add(id(found))
                yield name, found, file


def _exchanged(context: SequenceContext, name: str, mixer: Mixer, original: Callable[..., Any]) -> Callable[..., Any]:
    @context.takes_over(original)
    def mixes(*args: Any, **kwargs: Any) -> Any:
        return route(context, MixerCall(name, mixer, original, args, kwargs))

    return mixes


def _taken_apart(
    context: SequenceContext, name: str, fused: Fused, original: Callable[..., Any], file: str
) -> Callable[..., Any]:
    # A function of transformers that has no kernel returns None, and its caller computes the parts one by one.
    has_parts = file.partition(".")[0] in ("transformers", "transformers_modules")

    @context.takes_over(original)
    def nothing(*args: Any, **kwargs: Any) -> Any:
        if context.split is None and not context.place.takes_calls:
            return original(*args, **kwargs)
        if has_parts:
            return None
        raise UlyssesError(
            f"{name}, which convolves and scans in one kernel",
            "a convolution and a scan that are called one by one",
            f"set {fused.switch} in the module that calls it",
        )

    return nothing


def _masked(context: SequenceContext, original: Callable[..., Any]) -> Callable[..., Any]:
    # transformers takes a single token for one that is being generated, which is no padding.
    @context.takes_over(original)
    def mask(*args: Any, **kwargs: Any) -> Any:
        tokens, padding = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        if context.split is not None and tokens is not None and padding is not None and tokens.shape[1] == 1:
            return padding
        return original(*args, **kwargs)

    return mask


def install(context: SequenceContext, early: dict[Function, Function]) -> None:
    """Adds replacements of the functions of `mixing.table`. Does nothing if P = 1.

    Args:
        context: Tells what is split at this moment.
        early: Takes the replacement of each function.
    """
    for name, found, file in _functions() if context.mesh.sp_size > 1 else ():
        if name in TABLE:
            early[found] = _exchanged(context, name, TABLE[name], found)
        elif name in FUSED:
            early[found] = _taken_apart(context, name, FUSED[name], found, file)
        else:
            early[found] = _masked(context, found)
