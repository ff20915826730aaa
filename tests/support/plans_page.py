"""Writes docs/plans.md and its pictures: what `lightning-ulysses plan` says of two runs."""

from __future__ import annotations

import contextlib
import io
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

from documents import ROOT

from lightning_ulysses.cli.main import main

PAGE = ROOT / "docs/plans.md"


@dataclass(frozen=True)
class Run:
    """A plan of the page.

    Attributes:
        title: Of its section.
        text: What it is about.
        arguments: Of the command, without the picture.
        picture: Its name below ``docs/img``.
        reading: How to read the answer.
    """

    title: str
    text: str
    arguments: str
    picture: str
    reading: str


RUNS = (
    Run(
        "One GPU",
        "An 8B model on one GPU of 80 GiB, in a machine with 512 GiB. Parameters, gradients and optimizer alone\n"
        "take more than the GPU has, so that the plan must put something on the host.",
        "plan --model examples/shapes/llama_8b.json --gpus 1 --gpus_per_node 1 --host_memory 512GiB --seq_len 128K",
        "plan-one-gpu.svg",
        "- `o` behind the stage means that the optimizer is on the host, `p` that parameters are.\n"
        "- In the picture, what does not depend on S is at the bottom, and what grows with it above. The dashed\n"
        "  line is the memory of the GPU. Where the top crosses it is the longest\n"
        "  sequence, unless the host is full before.\n",
    ),
    Run(
        "1,024 GPUs",
        "A 70B model on 1,024 GPUs in machines of eight, with sequences of a million tokens.",
        "plan --model examples/shapes/llama_70b.json --gpus 1024 --host_memory 2TiB --seq_len 1M",
        "plan-1024-gpus.svg",
        "- Groups of P ranks stay inside a machine as long as one of its divisors fits, since exchanges between\n"
        "  machines are slower. All other GPUs form groups that train on other sequences, and\n"
        "  ZeRO shards over all of them.\n"
        "- Each row of the table is the best that was found for its P. A smaller P sends less, and keeps longer\n"
        "  slices.\n"
        "- Host memory counts for each machine: eight ranks keep the inputs of their blocks there.\n",
    ),
)

HEAD = """# Plans worked through

What `lightning-ulysses plan` says of two runs, written by `python tests/support/plans_page.py`. How it is found, and
what it does not know: [Planning](planning.md).
"""


def answer(run: Run, picture: Path) -> str:
    """What the command of a run prints; it writes the picture."""
    printed = io.StringIO()
    arguments = [str(ROOT / part) if part.startswith("examples/") else part for part in shlex.split(run.arguments)]
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*arguments, "--svg", str(picture)])
    return printed.getvalue()


def page(pictures: Path) -> str:
    """The text of docs/plans.md. Pictures are written to a folder."""
    text = HEAD
    for run in RUNS:
        said = answer(run, pictures / run.picture)
        text += f"\n## {run.title}\n\n{run.text}\n\n```sh\n"
        text += f"lightning-ulysses {run.arguments} --svg {run.picture}\n```\n\n```text\n{said.rstrip()}\n```\n\n"
        text += f"![Memory of one GPU by cause over S](img/{run.picture})\n\n{run.reading}"
    return text


def written() -> tuple[str, dict[str, str]]:
    """The page and its pictures as they would be written now."""
    with tempfile.TemporaryDirectory() as folder:
        text = page(Path(folder))
        return text, {path.name: path.read_text() for path in Path(folder).glob("*.svg")}


if __name__ == "__main__":
    found, images = written()
    PAGE.write_text(found, encoding="utf-8")
    for name, image in images.items():
        (ROOT / "docs/img" / name).write_text(image, encoding="utf-8")
