"""Collects what the package raises and warns of, from its source.

python tests/support/errors_page.py    # writes docs/errors.md
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_ulysses"
PAGE = ROOT / "docs" / "errors.md"
BASE = "UlyssesError"
HOLE = "…"
WARNERS = {"warn", "rank_zero_warn"}

# Headings, with the folders and modules whose messages they collect. Every message needs one.
AREAS = {
    "Fabric": ("fabric.py", "checks/own_loop.py"),
    "Settings": (
        "config.py",
        "strategy.py",
        "exchange",
        "checks/trainer.py",
        "checks/optimizer.py",
        "checks/parameters.py",
        "checks/monitors.py",
    ),
    "Hooks of your module": ("checks/hooks.py", "checks/notices.py", "checks/__init__.py"),
    "The step": ("checks/step.py", "checks/trial", "context.py", "sequence.py", "sequence_parallel.py"),
    "Batches": ("batch", "geometry/documents.py", "geometry/layout.py", "geometry/batch_keys.py"),
    "Attention": ("attention", "geometry/heads.py", "geometry/mask_spec.py", "geometry/shares.py"),
    "Models": ("interceptors", "mixing"),
    "Plans and divided tensors": ("regions", "divided", "geometry/split_plan.py"),
    "Loss": ("loss",),
    "Memory": ("memory",),
    "Data": ("data", "cost"),
    "Checkpoints": ("checkpoints", "export.py"),
    "Monitoring": ("callbacks",),
    "Commands": ("cli", "verification", "diagnosis", "planning", "testing"),
    "Processes": ("upstream", "patching", "notes.py"),
}
# Where each subject is explained.
PAGES = {
    "Fabric": ("Fabric", "fabric.md"),
    "Settings": ("Settings", "index.md#settings"),
    "Hooks of your module": ("Lightning features", "features.md"),
    "The step": ("The trial", "splitting.md#the-trial"),
    "Batches": ("Batches", "batches.md"),
    "Attention": ("How it works", "how-it-works.md"),
    "Models": ("Your model", "your-model.md"),
    "Plans and divided tensors": ("Plans", "splitting.md#plans"),
    "Loss": ("Loss and logging", "loss-and-logging.md"),
    "Memory": ("Memory", "memory.md"),
    "Data": ("Data", "data.md"),
    "Checkpoints": ("Checkpoints", "checkpoints.md"),
    "Monitoring": ("`TokenCountMonitor`", "loss-and-logging.md#tokencountmonitor"),
    "Commands": ("Verify", "verify.md"),
    "Processes": ("Reliability", "reliability.md"),
}


@dataclass(frozen=True)
class Message:
    """What a call raises or warns of; `HOLE` stands for a value of the run."""

    file: str
    kind: str
    parts: tuple[str, ...]

    def __str__(self) -> str:
        if self.kind == "warning":
            return f"{self.parts[0]}"
        got, expected, fix = self.parts
        return f"Got {got}. Expected {expected}. To fix: {fix}."


def trees() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the package by its path below it."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


def classes() -> dict[str, str]:
    """The error classes with the first sentence of their documentation."""
    found, before = {BASE: ""}, 0
    while len(found) > before:
        before = len(found)
        for _, tree in trees():
            for node in ast.walk(tree):
                bases = {getattr(base, "id", "") for base in getattr(node, "bases", [])}
                if isinstance(node, ast.ClassDef) and (node.name == BASE or bases & set(found)):
                    found[node.name] = (ast.get_docstring(node) or "").split("\n")[0]
    return found


def _text(node: ast.expr | None, names: dict[str, ast.expr], depth: int = 0) -> str:
    """A string expression with a hole for what depends on the run; both sides of a condition, parted by a slash."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, names, depth) if isinstance(part, ast.Constant) else HOLE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, names, depth) + _text(node.right, names, depth)
    if isinstance(node, ast.IfExp):
        sides = [_text(side, names, depth) for side in (node.body, node.orelse)]
        return " / ".join(side for side in sides if side)
    if isinstance(node, ast.Name) and node.id in names and depth < 3:
        return _text(names[node.id], names, depth + 1)
    return HOLE


def _assigned(function: ast.AST) -> dict[str, ast.expr]:
    """The names that get a value once in a function."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
    return {name: values[0] for name, values in found.items() if len(values) == 1}


def _calls(tree: ast.AST, names: dict[str, ast.expr]) -> Iterator[tuple[ast.Call, dict[str, ast.expr]]]:
    for node in ast.iter_child_nodes(tree):
        inner = {**names, **_assigned(node)} if isinstance(node, ast.FunctionDef) else names
        if isinstance(node, ast.Call):
            yield node, inner
        yield from _calls(node, inner)


def messages() -> list[Message]:
    """All messages in the order of files and lines."""
    kinds, found = set(classes()), []
    for file, tree in trees():
        module = {name: value for name, value in _assigned(ast.Module(tree.body, [])).items() if name.isupper()}
        for call, names in _calls(tree, module):
            called = getattr(call.func, "id", getattr(call.func, "attr", ""))
            if called in kinds and len(call.args) == 3:
                parts = tuple(" ".join(_text(part, names).split()) for part in call.args)
                found.append(Message(file, called, parts))
            elif called in WARNERS and call.args:
                found.append(Message(file, "warning", (" ".join(_text(call.args[0], names).split()),)))
    return found


def area_of(file: str) -> str:
    """The heading for a file.

    Raises:
        KeyError: If it has none.
    """
    for title, places in AREAS.items():
        if any(file == place or file.startswith(f"{place}/") for place in places):
            return title
    raise KeyError(f"{file}: give it a place in AREAS of tests/support/errors_page.py")


def _items(chosen: list[Message]) -> str:
    # Of some, nothing is left but holes.
    telling = [message for message in chosen if sum(map(str.isalpha, "".join(message.parts))) > 15]
    texts = dict.fromkeys(map(str, telling))
    escaped = [text.replace("*", "\\*").replace("<", "&lt;") for text in texts]
    return "".join(
        textwrap.fill(f"- {text}", 120, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False) + "\n"
        for text in escaped
    )


HEAD = f"""# Errors

An error says what was got, what was expected, and the one thing to change. Search this page for words of the message;
{HOLE} stands for names, shapes and numbers of the run. `python tests/support/errors_page.py` writes it from the source.

```python
from lightning_ulysses import UlyssesError

try:
    trainer.fit(module, data)
except UlyssesError as error:
    print(error.got, error.expected, error.fix, sep="\\n")
    raise
```

A refusal that all ranks agree on is shown once, with the lines of your own program only. `ULYSSES_FULL_TRACEBACK=1`
shows all. By what you see instead: [Symptoms](symptoms.md).

## Classes

| Class | Meaning |
|---|---|
"""


def page() -> str:
    """The text of docs/errors.md."""
    every, known, text = messages(), classes(), HEAD
    text += "".join(f"| `{name}` | {meaning} |\n" for name, meaning in sorted(known.items()))
    for title in AREAS:
        here = [message for message in every if area_of(message.file) == title]
        errors = _items([message for message in here if message.kind != "warning"])
        warned = _items([message for message in here if message.kind == "warning"])
        name, link = PAGES[title]
        text += f"\n## {title}\n\nExplained in [{name}]({link}).\n" if errors or warned else ""
        text += f"\n{errors}" if errors else ""
        text += f"\nWarnings:\n\n{warned}" if warned else ""
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
