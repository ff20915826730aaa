"""``lightning-ulysses plan``: what fits before a GPU is there, how fast it is, and the YAML for it."""

from __future__ import annotations

import argparse
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ulysses.errors import UlyssesError

if TYPE_CHECKING:
    from lightning_ulysses.planning.plan import Fixed

_TEXT = "tell which sp_size, ZeRO stage and memory parts fit a machine, and the longest sequence"
_EPILOG = (
    "K and M are 1,024 and 1,048,576 tokens; KiB to TiB are powers of 1,024 bytes, KB to TB of 1,000. Exit status: 0 "
    "if something fits, 1 otherwise, 2 if the arguments do not fit. Measurements are kept in the user's cache."
)
_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_DECIMAL = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def size(text: str) -> int:
    """Bytes, such as ``80GiB`` or ``1TB``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 80GiB")
    number, unit, binary = found.groups()
    table = _SIZES if binary or not unit else _DECIMAL
    return int(float(number) * table[unit.upper()])


def length(text: str) -> int:
    """Tokens, such as ``1M`` or ``131072``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KM]?)", text.strip(), re.IGNORECASE)
    if found is None or float(found.group(1)) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens such as 1M")
    return int(float(found.group(1)) * _SIZES[found.group(2).upper()])


def rate(text: str) -> float:
    """A number of operations or bytes in a second, such as ``400e12``."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return number


def count(text: str) -> int:
    """A number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return number


def add_command(commands: Any) -> None:
    """Adds ``plan`` to the commands of a parser."""
    command = commands.add_parser("plan", help=_TEXT, description=_TEXT, epilog=_EPILOG)
    add = command.add_argument
    add("--model", metavar="MODEL", required=True, help="config.json, a folder with one, or module.path:Class")
    add("--gpus", metavar="N", type=count, default=8, help="GPUs of the run (default: 8)")
    add("--gpus_per_node", metavar="N", type=count, default=8, help="GPUs of one machine (default: 8)")
    add("--gpu_memory", metavar="SIZE", type=size, default="80GiB", help="of one GPU (default: 80GiB)")
    add("--host_memory", metavar="SIZE", type=size, default="1TiB", help="of one machine (default: 1TiB)")
    add("--seq_len", metavar="S", type=length, default="128K", help="tokens of a sequence (default: 128K)")
    add("--config", metavar="YAML", type=Path, help="a config of LightningCLI, whose settings of the strategy stay")
    add("--flops", metavar="F", type=rate, default=400e12, help="operations a GPU does in a second (default: 400e12)")
    add("--node_link", metavar="B", type=rate, default=200e9, help="bytes a GPU sends in a second inside its machine")
    add("--network", metavar="B", type=rate, default=40e9, help="bytes a GPU sends in a second to other machines")
    add("--reserve", metavar="SIZE", type=size, default="3GiB", help="for CUDA, NCCL and gaps (default: 3GiB)")
    add("--json", action="store_true", help="print one JSON object")
    add("--html", metavar="FILE", type=Path, help="write a page with memory by cause over S")
    add("--svg", metavar="FILE", type=Path, help="write the picture alone")
    add("--png", metavar="FILE", type=Path, help="write the picture alone; needs the extra report")
    add("--no_cache", action="store_true", help="measure anew")
    command.set_defaults(run=plan)


def plan(args: argparse.Namespace) -> None:
    """Prints the plan, and ends the process with its exit status."""
    import gc
    import json

    from lightning_ulysses.planning.costs import Machine
    from lightning_ulysses.planning.models import find_model
    from lightning_ulysses.planning.plan import make_plan
    from lightning_ulysses.planning.render import numbers, text_of
    from lightning_ulysses.planning.store import Measurements, folder
    from lightning_ulysses.progress import progress

    # What was imported stays: collections need not look at it.
    gc.freeze()
    machine = Machine(
        args.gpus,
        args.gpus_per_node,
        args.gpu_memory,
        args.host_memory,
        args.flops,
        args.node_link,
        args.network,
        reserve=args.reserve,
    )
    try:
        # Packages print when they are imported, which must not mix with JSON.
        with redirect_stdout(sys.stderr), progress("Planning", unit="measurements") as advance:
            measurements = Measurements(find_model(args.model), None if args.no_cache else folder(), advance)
            found = make_plan(measurements, machine, args.seq_len, _fixed(args.config))
            if args.html or args.svg or args.png:
                _draw(args, measurements, found)
    except UlyssesError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(json.dumps(numbers(found)) if args.json else text_of(found))
    if found.best.limit is not None:
        raise SystemExit(1)


def _draw(args: argparse.Namespace, measurements: Any, found: Any) -> None:
    from lightning_ulysses.planning import picture

    at = picture.causes_at(measurements, found)
    if args.html is not None:
        args.html.write_text(picture.html(found, at))
    if args.svg is not None:
        args.svg.write_text(picture.svg(found, at))
    if args.png is not None:
        try:
            picture.write_png(found, at, args.png)
        except ImportError as error:
            raise UlyssesError(
                f"--png, and {error}", "matplotlib", "pip install 'lightning-ulysses[report]', or use --svg"
            ) from None


def _fixed(path: Path | None) -> Fixed | None:
    """What the strategy of a config has decided.

    Raises:
        UlyssesError: If the config cannot be read.
    """
    from lightning_ulysses.planning.plan import Fixed

    if path is None:
        return None
    import yaml  # type: ignore[import-untyped]

    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UlyssesError(f"--config {path}: {error}", "a config of LightningCLI", "check the file") from None
    strategy = ((config or {}).get("trainer") or {}).get("strategy")
    given = (strategy.get("init_args") or {}) if isinstance(strategy, dict) else {}
    names = ("sp_size", "stage", "offload_optimizer", "offload_parameters", "memory")
    return Fixed(**{name: given[name] for name in names if given.get(name) not in (None, "auto")})
