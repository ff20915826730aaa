"""Describes what a tokenizer's tokens depend on, for the key of the token cache."""

from __future__ import annotations

import copyreg
import functools
import hashlib
import inspect
import json
import sys
import types
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_ulysses.data.tokenizer import PROBES, TextEncoder

# Modules whose code is not the user's own.
_LIBRARIES = sys.stdlib_module_names - {"__main__"} | {"transformers", "tokenizers", "numpy", "torch"}
# Attributes of transformers' classes that say where a tokenizer came from, or change as it is used.
_NO_SETTINGS = frozenset(
    {"name_or_path", "init_inputs", "init_kwargs", "deprecation_warnings", "vocab_file", "_tokenizer", "_auto_class"}
)
_SPECIAL = ("eos_token_id", "bos_token_id", "chat_template", "split_special_tokens", "all_special_tokens")


def describe_tokenizer(tokenizer: Any) -> list[str]:
    """Everything that the tokens depend on: rules, code, settings, and the tokens of some texts.

    The same before and after the tokenizer is used: caches, counters, truncation and padding are left out.
    """
    encoder = TextEncoder(tokenizer)
    probes = [[encoder.one(text, special) for text in PROBES] for special in (True, False)]
    special = repr([getattr(tokenizer, name, None) for name in _SPECIAL])
    return [
        _name(tokenizer),
        _rules(tokenizer),
        special,
        repr(probes),
        *_own(tokenizer, encoder),
    ]


def _name(tokenizer: Any) -> str:
    kind = tokenizer if inspect.isroutine(tokenizer) else type(tokenizer)
    return str(getattr(kind, "__qualname__", kind))


def _rules(tokenizer: Any) -> str:
    """The rules of a fast tokenizer, or else the vocabulary, if it shows one."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(backend, "to_str"):
        rules = json.loads(backend.to_str())
        # Calling the tokenizer takes these off.
        rules.update(truncation=None, padding=None)
        return json.dumps(rules, sort_keys=True)
    vocabulary = getattr(tokenizer, "get_vocab", None)
    return repr(sorted(map(str, vocabulary().items()))) if callable(vocabulary) else ""


def _own_parts(thing: Any, place: str, seen: set[int], depth: int = 3) -> Iterator[tuple[str, str]]:
    """Where and what: digests of the code of a user's own tokenizer, and of the values that this code uses."""
    if isinstance(thing, functools.partial):
        yield f"{place}()", _hash([thing.args, thing.keywords])
        yield from _own_parts(thing.func, place, seen, depth)
        return
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if not inspect.isroutine(thing):
        for part in type(thing).__mro__:
            if not _is_library(part):
                yield f"{place}:{part.__qualname__}", _source(part)
                yield from _values(place, _members(part), seen, depth)
        yield from _values(place, _attributes(thing), seen, depth)
        return
    owner = getattr(thing, "__self__", None)
    if owner is not None and not inspect.ismodule(owner):
        yield from _values(place, {"self": owner}, seen, depth)
    function = inspect.unwrap(thing)
    function = getattr(function, "__func__", function)
    if not _is_library(function):
        yield place, _source(function)
        yield from _values(place, _used(function), seen, depth)


def _values(place: str, values: dict[str, Any], seen: set[int], depth: int) -> Iterator[tuple[str, str]]:
    for name, value in sorted(values.items()):
        where = f"{place}.{name}"
        is_own = bool(depth) and (inspect.isroutine(value) or not _is_library(type(value)))
        if not (inspect.isroutine(value) or (is_own and _is_plain(value))):
            yield where, _describe(value)
        # Parts one by one: some may be caches.
        if is_own:
            yield from _own_parts(value, where, seen, depth - 1)


def _is_plain(value: Any) -> bool:
    """Whether an object is no more than its attributes."""
    names = ("__reduce_ex__", "__reduce__", "__getstate__")
    return all(getattr(type(value), name, None) is getattr(object, name, None) for name in names)


def _is_library(part: Any) -> bool:
    return str(getattr(part, "__module__", "")).partition(".")[0] in _LIBRARIES


def _members(kind: type) -> dict[str, Any]:
    """The methods of a class, and the values that all of its objects share."""
    return {
        name: value
        for name, value in vars(kind).items()
        if inspect.isfunction(value) or not (name.startswith(("__", "_abc_")) or inspect.isdatadescriptor(value))
    }


def _used(function: Any) -> dict[str, Any]:
    """What a function finds in its closure, its defaults, its module, and in modules that are used there."""
    code = getattr(function, "__code__", None)
    if code is None:
        return {}
    found = {f"default {number}": value for number, value in enumerate(function.__defaults__ or ())}
    found |= function.__kwdefaults__ or {}
    names = _names(code)
    found |= {name: function.__globals__[name] for name in names & function.__globals__.keys()}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        # A cell may be empty still.
        with suppress(ValueError):
            found[name] = cell.cell_contents
    for name, module in [pair for pair in found.items() if inspect.ismodule(pair[1])]:
        del found[name]
        if module.__name__.partition(".")[0] not in _LIBRARIES:
            members = {part: vars(module)[part] for part in names & vars(module).keys()}
            found |= {f"{name}.{part}": value for part, value in members.items() if not inspect.ismodule(value)}
    return found


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(part) for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*inner)


def _source(part: Any) -> str:
    """A digest of the source of the module that a class or function is written in, or else of its own."""
    try:
        file = inspect.getsourcefile(part)
        source = Path(file).read_text(errors="replace") if file and Path(file).is_file() else inspect.getsource(part)
    except (OSError, TypeError):
        code = getattr(part, "__code__", None)
        source = "" if code is None else f"{code.co_code!r}{code.co_names}"
    return hashlib.blake2b(source.encode(errors="replace"), digest_size=16).hexdigest()


def _hash(value: Any) -> str:
    """A digest of a value, the same in every process; empty for what has none."""
    from datasets.fingerprint import Hasher

    try:
        return str(Hasher.hash(value))
    # Whatever pickling raises, such as for open files and locks.
    except Exception:
        return ""


def _own(tokenizer: Any, encoder: TextEncoder) -> list[str]:
    """Code and values of a user's own tokenizer. Those that a call changes are left out, as caches and counters."""
    # The probes came first, so that what is made at the first use is there.
    before = dict(_own_parts(tokenizer, "", set()))
    # A text that was never seen, which a cache must take in.
    encoder.one(f"{uuid.uuid4().hex} {uuid.uuid4()}")
    after = dict(_own_parts(tokenizer, "", set()))
    return [f"{place}={digest}" for place, digest in sorted(after.items()) if before.get(place) == digest]


def _attributes(thing: Any) -> dict[str, Any]:
    """An object's own values, those in slots included; none for an object of a library."""
    if _is_library(type(thing)):
        return {}
    slots = copyreg._slotnames(type(thing))  # type: ignore[attr-defined]
    found = {name: getattr(thing, name) for name in slots if hasattr(thing, name)} | getattr(thing, "__dict__", {})
    return {name: value for name, value in found.items() if name not in _NO_SETTINGS}


def _describe(value: Any) -> str:
    # A tokenizer inside another one: its pickle holds truncation, padding and warnings that were given.
    if hasattr(value, "backend_tokenizer"):
        return _rules(value)
    if inspect.isclass(value):
        return _source(value)
    # Sets have another order in every process.
    return _hash(sorted(map(_hash, value)) if isinstance(value, (set, frozenset)) else value)
