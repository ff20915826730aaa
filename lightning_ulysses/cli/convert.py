"""``lightning-ulysses convert``: a checkpoint for any number of processes, any ZeRO stage and any precision."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def convert(args: argparse.Namespace) -> None:
    """Converts a checkpoint and prints what to pass as ``ckpt_path``."""
    from lightning_ulysses.checkpoints import convert as conversion
    from lightning_ulysses.checkpoints.load import find

    found = find(args.checkpoint)
    output = args.output or found.path
    if not found.is_universal:
        conversion.convert(found.path, output)
    print(f"fit(ckpt_path={str(output)!r}) goes on with any number of processes, sp_size, ZeRO stage and precision")


def add_command(commands: Any) -> None:
    """Adds the command to the parser of `main`."""
    text = "convert a checkpoint for any number of processes and any ZeRO stage, as fit(ckpt_path=...) does by itself"
    command = commands.add_parser("convert", help=text, description=text)
    command.add_argument("checkpoint", metavar="CKPT", type=Path, help="a directory that the Trainer saved")
    command.add_argument("--output", metavar="DIR", type=Path, help="another directory than that of the checkpoint")
    command.set_defaults(run=convert)
