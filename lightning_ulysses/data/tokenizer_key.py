"""Describes what a tokenizer's tokens depend on, for the key of the token cache."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import uuid
from pathlib import Path
from typing import Any

from lightning_ulysses.data.tokenizer import PROBES, TextEncoder

_LIBRARIES = ("transformers", "tokenizers", "builtins", "functools", "abc", "typing", "collections")
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
        _code(tokenizer),
        *_settings(tokenizer, encoder),
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


def _code(thing: Any, depth: int = 3) -> str:
    """A digest of the modules that a user's own tokenizer is written in, and of the values that its functions hold."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(thing, functools.partial):
        return _code(thing.func, depth) + _hash([thing.args, thing.keywords])
    function = inspect.unwrap(thing) if inspect.isroutine(thing) else None
    function = getattr(function, "__func__", function)
    for part in [function] if function is not None else list(type(thing).__mro__):
        if str(getattr(part, "__module__", "")).partition(".")[0] in _LIBRARIES:
            continue
        digest.update(_source(part).encode())
    if function is not None:
        held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_filled(cell)]
        for value in [*held, *(getattr(function, "__defaults__", None) or ()), getattr(thing, "__self__", None)]:
            is_own = depth > 0 and inspect.isroutine(value)
            digest.update((_code(value, depth - 1) if is_own else _describe(value)).encode())
    return digest.hexdigest()


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _source(part: Any) -> str:
    """The source of the module that a class or function is written in, or else its own."""
    try:
        file = inspect.getsourcefile(part)
        if file and Path(file).is_file():
            return Path(file).read_text(errors="replace")
        return inspect.getsource(part)
    except (OSError, TypeError):
        code = getattr(part, "__code__", None)
        return "" if code is None else f"{code.co_code!r}{code.co_names}"


def _hash(value: Any) -> str:
    """A digest of a value, the same in every process; empty for what has none."""
    from datasets.fingerprint import Hasher

    try:
        return str(Hasher.hash(value))
    # Whatever pickling raises, such as for open files and locks.
    except Exception:
        return ""


def _settings(tokenizer: Any, encoder: TextEncoder) -> list[str]:
    """The attributes of a user's own tokenizer that a call does not change; others are caches or counters."""
    if str(type(tokenizer).__module__).partition(".")[0] in _LIBRARIES or not hasattr(tokenizer, "__dict__"):
        return []
    # The probes came first, so that what is made at the first use is there.
    before = _attributes(tokenizer)
    # A text that was never seen, which a cache must take in.
    encoder.one(f"{uuid.uuid4().hex} {uuid.uuid4()}")
    after = _attributes(tokenizer)
    return [f"{key}={value}" for key, value in sorted(after.items()) if before.get(key) == value]


def _attributes(tokenizer: Any) -> dict[str, str]:
    return {key: _describe(value) for key, value in vars(tokenizer).items() if key not in _NO_SETTINGS}


def _describe(value: Any) -> str:
    # A tokenizer inside another one: its pickle holds truncation, padding and warnings that were given.
    return _rules(value) if hasattr(value, "backend_tokenizer") else _hash(value)
