"""``lightning-ulysses COMMAND``: what can be asked without starting a training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_ulysses import __version__
from lightning_ulysses.cli import convert, doctor, plan, verify
from lightning_ulysses.errors import UlyssesError

_TEXT = "Checks, plans and converts for trainings whose sequences are split over processes."
_EPILOG = "`lightning-ulysses COMMAND --help` lists the arguments of a command."


def _find_csv(folder: Path) -> Path:
    from lightning_ulysses.callbacks.token_report import CSV_NAME

    if not folder.is_dir():
        raise UlyssesError(f"{folder}, which is no folder", "the log directory of a run", "check the path")
    if (folder / CSV_NAME).is_file():
        return folder / CSV_NAME
    below = sorted(str(path.parent) for path in folder.rglob(CSV_NAME))
    raise UlyssesError(
        f"{folder} without {CSV_NAME}",
        "the log directory of a run with TokenCountMonitor and a logger",
        f"name one of {below[:8]}" if below else "add TokenCountMonitor to the callbacks of the Trainer",
    )


def report(args: argparse.Namespace) -> None:
    """Prints the table of a run and draws ``token_report.png`` again."""
    from rich.console import Console

    from lightning_ulysses.callbacks.token_report import PNG_NAME, draw, read_csv, rich_table

    path = _find_csv(args.folder)
    table = read_csv(path)
    Console().print(rich_table(table))
    draw(table, path.with_name(PNG_NAME))
    print(path.with_name(PNG_NAME))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-ulysses", description=_TEXT, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    text = "print the tokens of a run by rank and draw them again, from its token_report.csv"
    command = commands.add_parser("report", help=text, description=text)
    command.add_argument("folder", metavar="DIR", type=Path, help="the run's log directory")
    command.set_defaults(run=report)
    verify.add_command(commands)
    convert.add_command(commands)
    doctor.add_command(commands)
    plan.add_command(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Used instead of the arguments of the process.

    Returns:
        The exit status: 0, or 1 after an error message.
    """
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except UlyssesError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
