"""Finds the submodules and inputs that the patterns of a plan name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.split_plan import Dims, SequencePlan

# Name parts that wrappers for compiling, checkpointing and sharding insert. A plan does not write them.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}

Parts = tuple[str, ...]


def clean_name(name: str) -> str:
    """The name of a submodule as plans write it."""
    return ".".join(part for part in name.split(".") if part and part not in _WRAPPERS)


def submodules(root: nn.Module) -> dict[Parts, nn.Module]:
    """Every submodule by the parts of its name. A wrapped module takes the place of its wrapper."""
    found: dict[Parts, nn.Module] = {}
    for name, module in root.named_modules():
        # The wrapped module has the same parts and comes later, so it overwrites the wrapper: it declares the inputs.
        clean = clean_name(name)
        found[tuple(clean.split(".")) if clean else ()] = module
    return found


def _fits(parts: Parts, pattern: Parts) -> bool:
    return len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern))


class Matcher:
    """Resolves the patterns of a plan. All of them are relative to the same models.

    Args:
        root: The user's LightningModule.
        plan: The plan.

    Raises:
        UlyssesError: If a pattern of ``split`` matches no submodule.
    """

    def __init__(self, root: nn.Module, plan: SequencePlan) -> None:
        self._root = root
        self._plan = plan
        self._submodules = submodules(root)
        # The first pattern finds the model. In a plan for several models, any pattern may.
        patterns = plan.split or plan.joints
        first = list(patterns) if plan.is_family else list(patterns)[:1]
        self._prefixes: set[Parts] = {()} if plan.is_absolute else self._find_prefixes(first)
        if not self._prefixes:
            raise self.nothing("split" if plan.split else "whole or halo", first)

    def _find_prefixes(self, patterns: Iterable[str]) -> set[Parts]:
        prefixes = set()
        for pattern in (tuple(pattern.split(".")) for pattern in patterns):
            for parts in self._submodules:
                # The pattern matches the end of the name. The part of the name before it is the model.
                if len(parts) >= len(pattern) and _fits(parts[-len(pattern) :], pattern):
                    prefixes.add(parts[: -len(pattern)])
        # Drops models inside a block of another model, which would be split twice.
        return {each for each in prefixes if not any(each != other and self._inside(each, other) for other in prefixes)}

    def _inside(self, inner: Parts, outer: Parts) -> bool:
        """Whether a model lies inside a submodule that is split as part of another model."""
        rest = inner[len(outer) :]
        # A block's name, or the beginning of a name inside the block.
        patterns = [tuple(pattern.split(".")) for pattern in self._plan.split]
        return inner[: len(outer)] == outer and any(_fits(rest[: len(pattern)], pattern) for pattern in patterns)

    def find(self, key: str, pattern: str) -> list[tuple[str, nn.Module]]:
        """The submodules that a pattern matches, with their names.

        Raises:
            UlyssesError: If there are none.
        """
        wanted = tuple(pattern.split("."))
        found = [
            (".".join(parts), module)
            for parts, module in self._submodules.items()
            for prefix in self._prefixes
            if parts[: len(prefix)] == prefix and _fits(parts[len(prefix) :], wanted)
        ]
        if not found and not self._plan.is_family:
            raise self.nothing(key, [pattern])
        return found

    def nothing(self, key: str, patterns: list[str]) -> UlyssesError:
        """The error for patterns that match no submodule. It suggests similar names."""
        names = {".".join(parts) for parts in self._submodules if parts}
        near: list[str] = []
        for pattern in patterns:
            # Similar names, then names with the same last part, else the top-level submodules.
            near += difflib.get_close_matches(pattern, sorted(names), n=5, cutoff=0.4)
        last = patterns[0].split(".")[-1]
        near += [name for name in sorted(names) if last != "*" and name.split(".")[-1] == last]
        near = list(dict.fromkeys(near)) or sorted(name for name in names if "." not in name)
        return UlyssesError(
            f"a plan whose {key} names {' or '.join(map(repr, patterns))}, which {type(self._root).__name__} lacks",
            f"submodules, such as {near[:8]}",
            f"change the name under {key}; * stands for one part between dots",
        )


class Inputs:
    """Gets and replaces the inputs of a submodule that a plan names.

    Args:
        name: Name of the submodule.
        module: The submodule.
        dims: The inputs, by parameter name or position, with the dimension of each.
        is_family: Whether inputs that the submodule lacks are ignored.
        where: The part of the plan that names them.

    Raises:
        UlyssesError: If it has no such input.
    """

    def __init__(self, name: str, module: nn.Module, dims: Dims, is_family: bool, where: str = "split") -> None:
        parameters = inspect.signature(module.forward).parameters.values()
        # With **kwargs any name may be an input, with *args any position.
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        names = [*self._positional, *(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)]
        many = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        self.dims: dict[str, int | None] = {}
        for key, dim in dims.items():
            known = (int(key) < len(self._positional) or many) if key.isdigit() else key in names or takes_any
            if known:
                # Positions become names where possible, since a caller may pass the input either way.
                by_name = key.isdigit() and int(key) < len(self._positional)
                self.dims[self._positional[int(key)] if by_name else key] = dim
            elif not is_family:
                raise UlyssesError(
                    f"a plan whose {where} names the input {key!r} of {name} ({type(module).__name__})",
                    f"one of its inputs, {names}",
                    f"change the name under {where}[{name!r}]",
                )

    def get(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs that are present in a call and not None."""
        found = {}
        for key in self.dims:
            index = self._index(key)
            value = args[index] if index is not None and index < len(args) else kwargs.get(key)
            if value is not None:
                found[key] = value
        return found

    def put(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], new: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with some inputs replaced."""
        changed, keywords = list(args), dict(kwargs)
        for key, value in new.items():
            index = self._index(key)
            if index is not None and index < len(args):
                changed[index] = value
            else:
                keywords[key] = value
        return tuple(changed), keywords

    def _index(self, key: str) -> int | None:
        return int(key) if key.isdigit() else self._positional.index(key) if key in self._positional else None
