"""``lightning-ulysses doctor``: whether this machine is ready, and what to mend if it is not."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from typing import Any

from lightning_ulysses.errors import UlyssesError

_TEXT = "look at packages, kernels, memory and links of this machine, and run a short exchange and a step on it"
_EPILOG = "Exit status: 0 if nothing has to be mended, 1 otherwise, 2 if the arguments do not fit."


def add_command(commands: Any) -> None:
    """Adds ``doctor`` to the commands of a parser."""
    command = commands.add_parser("doctor", help=_TEXT, description=_TEXT, epilog=_EPILOG)
    add = command.add_argument
    add("--heads", metavar="H", type=int, default=32, help="query heads of the model (default: 32)")
    add("--kv_heads", metavar="H", type=int, default=8, help="key/value heads (default: 8)")
    add("--head_dim", metavar="D", type=int, default=128, help="head size (default: 128)")
    add("--dtype", default="bfloat16", help="dtype of attention (default: bfloat16)")
    add("--sp_size", metavar="P", type=int, default=8, help="processes that share a sequence (default: 8)")
    add("--no_run", action="store_true", help="start no processes")
    add("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=doctor)


def doctor(args: argparse.Namespace) -> None:
    """Prints what was found, and ends the process with its exit status."""
    import json

    from lightning_ulysses.diagnosis import examine
    from lightning_ulysses.diagnosis.examination import Shapes
    from lightning_ulysses.progress import progress

    shapes = Shapes(args.heads, args.kv_heads, args.head_dim, args.dtype, args.sp_size)
    try:
        # Packages print when they are imported, which must not mix with JSON.
        with redirect_stdout(sys.stderr), progress("Looking at this machine"):
            found = examine(shapes, runs=not args.no_run)
    except UlyssesError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    is_ready = all(finding.mend is None for finding in found)
    if args.json:
        print(json.dumps({"ready": is_ready, "findings": [finding.to_dict() for finding in found]}))
    else:
        print("\n".join(map(str, found)))
        print("Ready." if is_ready else f"{sum(finding.mend is not None for finding in found)} things to mend.")
    if not is_ready:
        raise SystemExit(1)
