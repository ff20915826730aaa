"""A call of one of these functions in one form: which arguments carry tokens, heads, groups, or nothing of a rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from lightning_ulysses.context import LocalBatch
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.mixing.table import INDEX, STATES, Mixer


def by_heads(tensor: Tensor, dims: str) -> Tensor:
    """A tensor whose dimensions are ``dims`` as (B, heads, S, D); heads and D are 1 where it has none."""
    order = [dims.index("b"), *(dims.index(c) for c in dims if c in "gh"), dims.index("s")]
    order += [place for place in range(len(dims)) if place not in order]
    # (...) -> (B, S), (B, heads, S), (B, S, D) or (B, heads, S, D)
    tensor = tensor.permute(order)
    if not set(dims) & set("gh"):
        tensor = tensor.unsqueeze(1)
    return tensor if tensor.dim() == 4 else tensor.unsqueeze(3)


def as_given(part: Tensor, dims: str) -> Tensor:
    """The opposite of `by_heads`: (B, heads, S, D) -> dimensions ``dims``."""
    kinds = {"b": 0, "g": 1, "h": 1, "s": 2}
    order = [kinds.get(letter, 3) for letter in dims]
    for place in (3, 1):
        if place not in order:
            part = part.squeeze(place)
            order = [each - (each > place) for each in order]
    return part.permute(order)


@dataclass(frozen=True)
class MixerCall:
    """The arguments of a call.

    Attributes:
        name: The function's.
        mixer: What its arguments carry.
        original: The function.
        args: By position.
        kwargs: By name.
    """

    name: str
    mixer: Mixer
    original: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def what(self) -> str:
        """How messages call it."""
        return f"{self.name} call"

    @cached_property
    def given(self) -> dict[str, Tensor]:
        """The operands that are tensors, by the first of their names."""
        positional = zip(self.mixer.operands[: self.mixer.by_position], self.args, strict=False)
        found = {operand.names[0]: value for operand, value in positional}
        for name, value in self.kwargs.items():
            operand = self.mixer.operand(name)
            if operand is not None:
                found[operand.names[0]] = value
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    @cached_property
    def dims(self) -> dict[str, str]:
        """The letters of the dimensions of each of them; none of a shape that is not known."""
        found = {}
        for name, tensor in self.given.items():
            operand = self.mixer.operand(name)
            form = None if operand is None else operand.dims(tensor.dim())
            if form is not None:
                found[name] = form
        return found

    @cached_property
    def operands(self) -> dict[str, Tensor]:
        """Those that carry tokens, each (B, heads, S_r, D), by their names."""
        return {name: by_heads(self.given[name], dims) for name, dims in self.dims.items() if "s" in dims}

    @property
    def lengths(self) -> tuple[int, int]:
        """The tokens that ask and those that are seen, which are the same."""
        length = self.operands[self.mixer.like].shape[2]
        return length, length

    def check(self, batch: LocalBatch) -> None:
        """Raises `UlyssesError` if the call cannot be exchanged."""
        states = [name for name in STATES if _is_set(self.kwargs.get(name))]
        if states:
            raise UlyssesError(
                f"{self.name} with {', '.join(states)}",
                "a call over the whole sequence, whose state comes from no other call and goes into none",
                "pass use_cache=False to the model, or leave the cache out",
            )
        if self.kwargs.get("head_first"):
            raise UlyssesError(
                f"{self.name} with head_first=True", "tensors of shape (B, S, H, D)", "leave head_first out"
            )
        shapes = [f"{name} of shape {tuple(t.shape)}" for name, t in self.given.items() if name not in self.dims]
        extra = [*self.args[self.mixer.by_position :], *(v for k, v in self.kwargs.items() if not self._knows(k))]
        if not self.mixer.looks_back:
            shapes += [f"a further tensor of shape {tuple(t.shape)}" for t in extra if _is_number(t)]
        if shapes:
            raise UlyssesError(
                f"{self.name} with {', '.join(shapes)}",
                "arguments of which it is known which dimension carries heads",
                "train this model without sequence parallelism (sp_size=1)",
            )

    def _knows(self, name: str) -> bool:
        return self.mixer.operand(name) is not None or name == INDEX

    def form(self) -> Any:
        """An empty tensor in the shape of this rank's result, as the function returns it."""
        empty = self.given[self.mixer.like].detach()
        # A new object: what comes of it is compared by shape alone.
        return self.write(empty.new_empty(empty.shape))

    def write(self, out: Tensor) -> Any:
        """What the function returns for an output."""
        return (out, None) if self.mixer.is_pair else out

    def run(self, values: Mapping[str, Any]) -> Tensor:
        """Calls the function with other values in the place of some operands, and returns its output."""
        args, kwargs = list(self.args), dict(self.kwargs)
        places = {operand.names[0]: place for place, operand in enumerate(self.mixer.operands)}
        for name, value in values.items():
            operand = self.mixer.operand(name)
            names = (name,) if operand is None else operand.names
            by_name = next((each for each in names if each in kwargs), None)
            if by_name is not None:
                kwargs[by_name] = value
            else:
                args[places[name]] = value
        out = self.original(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


def _is_set(value: Any) -> bool:
    return value is not None and value is not False


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
