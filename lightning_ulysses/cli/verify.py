"""``lightning-ulysses verify``: compares one process with P, on the module and data of a LightningCLI config."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ulysses.errors import UlyssesError

if TYPE_CHECKING:
    import lightning.pytorch as pl

_TEXT = "run the module of a config in one process and split over several, and compare loss and gradients"
_EPILOG = (
    "Exit status: 0 if the two agree, 1 if they differ, 2 if they could not be compared. Of the config, `model`, "
    "`data`, `seed_everything` and the strategy's settings for reading a batch are used; the Trainer is not made."
)


def add_command(commands: Any) -> None:
    """Adds ``verify`` to the commands of a parser."""
    command = commands.add_parser("verify", help=_TEXT, description=_TEXT, epilog=_EPILOG)
    add = command.add_argument
    add("--config", metavar="YAML", type=Path, required=True, help="a config of LightningCLI")
    add("--model", metavar="CLASS", help="class path of the module, where `model` in the config has no class_path")
    add("--data", metavar="CLASS", help="the same for `data`")
    sizes = 'processes that share a sequence (default: 2), or their factors: \'{"ulysses": 2, "gather": 2}\''
    add("--sp_size", metavar="P", type=json.loads, default=2, help=sizes)
    add("--steps", metavar="N", type=int, default=1, help="batches to compare (default: 1)")
    add("--layers", metavar="N", type=int, help="build transformers models with N layers, for one too large to compare")
    add("--max_tokens", metavar="S", type=int, default=4096, help="cut longer batches to S tokens (default: 4096)")
    add("--tolerance", type=float, default=1e-4, help="relative difference that counts as equal (default: 1e-4)")
    add("--accelerator", choices=("cpu", "cuda"), default="cpu", help="cuda needs P GPUs (default: cpu)")
    add("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=verify)


def verify(args: argparse.Namespace) -> None:
    """Prints the comparison and ends the process with its exit status."""
    import traceback

    from lightning_ulysses.progress import progress
    from lightning_ulysses.verification import verify_parity

    try:
        # Whatever user code prints must not mix with the report, above all not with its JSON.
        with redirect_stdout(sys.stderr), progress(f"Comparing one process with {args.sp_size}"):
            module, batches, settings = load_config(args)
            report = verify_parity(
                module,
                batches,
                sp_size=args.sp_size,
                strategy=settings,
                tolerance=args.tolerance,
                layers=args.layers,
                max_tokens=args.max_tokens,
                accelerator=args.accelerator,
            )
    except UlyssesError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except Exception:
        # An uncaught exception would exit with 1, which means that the two runs differ.
        traceback.print_exc()
        raise SystemExit(2) from None
    print(json.dumps(report.to_dict()) if args.json else report)
    if not report.exact:
        raise SystemExit(1)


def load_config(args: argparse.Namespace) -> tuple[pl.LightningModule, list[Any], dict[str, Any]]:
    """The module, the first batches and the strategy's settings of a config.

    Raises:
        UlyssesError: If the config cannot be read, or names no class.
    """
    import torch
    import yaml  # type: ignore[import-untyped]

    if not args.config.is_file():
        raise UlyssesError(f"{args.config}, which is no file", "a config of LightningCLI", "check the path")
    try:
        config = yaml.safe_load(args.config.read_text())
    except yaml.YAMLError as error:
        raise UlyssesError(f"{args.config}: {error}", "a YAML file", "correct it") from error
    if not isinstance(config, dict) or ("model" not in config and args.model is None):
        raise UlyssesError(f"{args.config} without model", "a config of LightningCLI", "name its class under `model`")
    # Behind everything else: a file of the user's must not take the place of a library.
    sys.path += [str(Path.cwd()), str(args.config.resolve().parent)]
    seed = config.get("seed_everything")
    torch.manual_seed(seed if isinstance(seed, int) and not isinstance(seed, bool) else 0)
    module, data = _instantiate(config, args)
    return module, _batches(module, data, args.steps), _settings(config)


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the strategy that say how to read a batch and its loss."""
    from lightning_ulysses.verification.parity import SETTINGS

    strategy = (config.get("trainer") or {}).get("strategy")
    given = strategy.get("init_args") or {} if isinstance(strategy, dict) else {}
    return {key: value for key, value in given.items() if key in SETTINGS}


def _instantiate(config: dict[str, Any], args: argparse.Namespace) -> tuple[pl.LightningModule, Any]:
    import lightning.pytorch as pl
    from jsonargparse import ArgumentError
    from lightning.pytorch.cli import LightningArgumentParser

    parser = LightningArgumentParser(exit_on_error=False)
    wanted = {}
    for key, name, base in (("model", args.model, pl.LightningModule), ("data", args.data, pl.LightningDataModule)):
        if key in config or name is not None:
            wanted[key] = _with_class(key, config.get(key), name, args.config)
            parser.add_lightning_class_args(base, key, subclass_mode=True)
    try:
        # jsonargparse 4.49 renamed this method.
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        made = instantiate(parser.parse_object(wanted))
    except (ArgumentError, argparse.ArgumentError) as error:
        raise UlyssesError(
            f"{args.config}, from which module or data cannot be made: {error}",
            "a config that your own program accepts, whose classes can be imported from here",
            "correct the entry, or start this from the folder of your program",
        ) from error
    return made["model"], made.get("data")


def _with_class(key: str, entry: Any, name: str | None, path: Path) -> dict[str, Any]:
    """The entry of a config with a ``class_path``."""
    if isinstance(entry, str):
        entry = {"class_path": entry}
    entry = dict(entry or {})
    if "class_path" in entry:
        return entry if name is None else {**entry, "class_path": name}
    if name is None:
        raise UlyssesError(
            f"{path}, in which `{key}` has no class_path",
            "to know its class, which your program hands to LightningCLI",
            f"add --{key} your_file.YourClass to the command",
        )
    return {"class_path": name, "init_args": entry}


def _batches(module: pl.LightningModule, data: Any, steps: int) -> list[Any]:
    """The first batches that training would use."""
    source: Any = module if data is None else data
    source.prepare_data()
    source.setup("fit")
    batches = list(islice(iter(source.train_dataloader()), max(steps, 0)))
    if len(batches) < max(steps, 1):
        raise UlyssesError(
            f"{len(batches)} batches from the train dataloader for steps={steps}",
            "at least one, and as many as are to be compared",
            "lower --steps, or give more data",
        )
    return batches
