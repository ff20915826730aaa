"""Finds the submodules that a part is asked for: by name, or by what such submodules are usually called."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_ulysses.errors import UlyssesError

Found = dict[str, nn.Module]
Setting = bool | Sequence[str]

_MLP = re.compile(r"(mlp|ffn|feed_?forward)s?$", re.IGNORECASE)
_NORM = re.compile(r"norm(1d)?$|norm", re.IGNORECASE)
#: Name parts that wrappers for compiling, checkpointing and sharding insert.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def find_mlps(root: nn.Module, setting: Setting) -> Found:
    """Submodules for ``tiled_mlp``: named, or else those whose name or class ends with mlp, ffn or feed_forward."""
    return _find(root, "tiled_mlp", setting, _is_mlp)


def find_norms(root: nn.Module, setting: Setting) -> Found:
    """Submodules for ``tiled_norm``: named, or else those without children whose class has norm in its name."""
    return _find(root, "tiled_norm", setting, _is_norm)


def find_heads(root: nn.Module, setting: Setting) -> Found:
    """Submodules for ``tiled_loss``: named, or else what turns hidden states into logits.

    That is what a transformers model calls its output embeddings, or a linear layer as wide as an embedding is long.
    """
    if setting is True:
        heads = {id(head) for module in root.modules() for head in _output_embeddings(module)}
        if not heads:
            lengths = {each.num_embeddings for each in root.modules() if isinstance(each, nn.Embedding)}
            heads = {id(each) for each in root.modules() if getattr(each, "out_features", None) in lengths and lengths}
        return _find(root, "tiled_loss", setting, lambda name, module: id(module) in heads)
    return _find(root, "tiled_loss", setting, lambda name, module: False)


def _output_embeddings(module: nn.Module) -> list[nn.Module]:
    get = getattr(module, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        head = None
    return [head] if isinstance(head, nn.Module) else []


def _is_mlp(name: str, module: nn.Module) -> bool:
    is_named = _MLP.search(name.rpartition(".")[2]) or _MLP.search(type(module).__name__)
    return bool(is_named) and any(True for _ in module.children()) and not isinstance(module, nn.ModuleList)


def _is_norm(name: str, module: nn.Module) -> bool:
    return _NORM.search(type(module).__name__) is not None and not any(True for _ in module.children())


def find_named(root: nn.Module, part: str, patterns: Sequence[str]) -> Found:
    """Submodules by patterns of names, none of them inside of another one.

    Raises:
        UlyssesError: For a pattern that no name fits; it names the setting ``part``.
    """
    found, names = _find(root, part, patterns, lambda name, module: False), plain_names(root)
    return {name: names[name] for name in found}


def plain_names(root: nn.Module) -> Found:
    """Submodules by their names without those of wrappers; a wrapper stands for what is inside."""
    names: Found = {}
    for name, module in root.named_modules():
        if name:
            names.setdefault(plain(name), module)
    return names


def plain(name: str) -> str:
    """A name without those of wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _find(root: nn.Module, part: str, setting: Setting, is_wanted: Callable[[str, nn.Module], bool]) -> Found:
    if setting is False:
        return {}
    names = {plain(name): module for name, module in root.named_modules() if name}
    if setting is True:
        found = {name: module for name, module in names.items() if is_wanted(name, module)}
        if not found:
            raise _nothing(root, part, "True", names)
    else:
        found = {}
        for pattern in setting:
            # A pattern matches the end of a name, as those of plans do.
            matching = {name: module for name, module in names.items() if _fits(name, pattern)}
            if not matching:
                raise _nothing(root, part, repr(pattern), names, pattern)
            found |= matching
    return {name: module for name, module in found.items() if not _inside(name, found)}


def _fits(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and all(map(fnmatchcase, parts[-len(wanted) :], wanted))


def _inside(name: str, found: Found) -> bool:
    return any(name.startswith(f"{other}.") for other in found)


def _nothing(root: nn.Module, part: str, given: str, names: Found, pattern: str = "") -> UlyssesError:
    near = difflib.get_close_matches(pattern, sorted(names), n=5, cutoff=0.4) if pattern else []
    near += [name for name in sorted(names) if name not in near][: 8 - len(near)]
    return UlyssesError(
        f"{part}={given}, and no such submodule in {type(root).__name__}",
        f"names of submodules, such as {near}",
        f"name the submodules, as {part}=['...']; * stands for one part between dots",
    )
