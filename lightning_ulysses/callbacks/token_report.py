"""The report of a run: ``token_report.csv``, a table for the terminal, and ``token_report.png``."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_ulysses.callbacks.token_history import Table
from lightning_ulysses.errors import UlyssesError

if TYPE_CHECKING:
    from rich.table import Table as RichTable

CSV_NAME, PNG_NAME = "token_report.csv", "token_report.png"
COLUMNS = (
    "step",
    "rank",
    "loss",
    "targets",
    "weight",
    "tokens",
    "padding",
    "documents",
    "padding_fraction",
    "imbalance",
    "seconds",
    "tokens_per_sec",
    "mfu",
    "peak_gib",
)
_WHOLE = ("step", "rank", "targets", "tokens", "padding", "documents")
# More ranks than this are drawn as a range from the smallest to the largest value.
_MOST_LINES = 4

_Floats = NDArray[np.float64]


def write_csv(table: Table, path: Path) -> None:
    """Writes one row per step and rank; unknown values stay empty, such as the rank of a row for all ranks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in zip(*(table[name].tolist() for name in COLUMNS), strict=True):
            writer.writerow(
                "" if value != value else int(value) if name in _WHOLE else f"{value:.9g}"
                for name, value in zip(COLUMNS, row, strict=True)
            )


def read_csv(path: Path) -> Table:
    """Reads a file that `write_csv` wrote. Further columns are ignored.

    Returns:
        (rows,) values by column; NaN for an unknown value.

    Raises:
        UlyssesError: If columns are missing, there is no row, or a value is not a number.
    """
    fix = "give the folder of a run with TokenCountMonitor, and leave its file as it was written"
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise UlyssesError(f"{path.name} without the columns {', '.join(missing)}", ", ".join(COLUMNS), fix)
        rows = list(reader)
    if not rows:
        raise UlyssesError(f"{path.name} without a row", "one row for each optimizer step and rank", fix)
    try:
        return {name: np.array([float(row[name] or "nan") for row in rows]) for name in COLUMNS}
    except ValueError as error:
        raise UlyssesError(f"{path.name} with {error}", "numbers in every column", fix) from error


def _of_steps(table: Table, name: str) -> tuple[_Floats, _Floats]:
    """(steps,) the numbers of the steps, and (steps,) a value that all ranks of a step share."""
    steps, first = np.unique(table["step"], return_index=True)
    return steps, table[name][first]


def _middle(values: _Floats) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else float("nan")


def _summary(table: Table) -> str:
    steps, loss = _of_steps(table, "loss")
    values = {name: _of_steps(table, name)[1] for name in ("padding_fraction", "imbalance", "tokens_per_sec", "mfu")}
    parts = [
        f"steps {int(steps[0])} to {int(steps[-1])}",
        f"loss {loss[0]:.4f} to {loss[-1]:.4f}",
        f"padding {100 * table['padding'].sum() / table['tokens'].sum():.2f} % of tokens",
        f"imbalance {values['imbalance'].mean():.3f} on average, {values['imbalance'].max():.3f} at most",
    ]
    if not np.isnan(_middle(values["tokens_per_sec"])):
        parts.append(f"{_middle(values['tokens_per_sec']):,.0f} tokens/s (median)")
    if not np.isnan(_middle(values["mfu"])):
        parts.append(f"MFU {100 * _middle(values['mfu']):.1f} % (median)")
    return "\n".join(parts)


def _short(count: float) -> str:
    """A count for a narrow column: exact up to five digits, rounded above."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= max(size, 1e5):
            return f"{count / size:.1f} {unit}"
    return f"{int(count):,}"


def rich_table(table: Table) -> RichTable:
    """The table for the terminal: a line for each rank, and a caption about all ranks."""
    from rich.box import SIMPLE
    from rich.table import Table as RichTable

    shown = RichTable(title="Tokens by rank", caption=_summary(table), caption_justify="left", box=SIMPLE)
    for name in ("rank", "targets", "weight", "tokens", "padding", "pad %", "documents", "GiB"):
        shown.add_column(name, justify="right", no_wrap=True)
    is_apart = ~np.isnan(table["rank"])
    lines = [(f"{int(rank)}", table["rank"] == rank) for rank in np.unique(table["rank"][is_apart])]
    for line, rows in [("all, earlier", ~is_apart)] * (not is_apart.all()) + lines:
        own = {name: values[rows] for name, values in table.items()}
        sums = {name: float(own[name].sum()) for name in ("targets", "tokens", "padding", "documents")}
        shown.add_row(
            line,
            _short(sums["targets"]),
            f"{100 * own['weight'].mean():.1f} %",
            _short(sums["tokens"]),
            _short(sums["padding"]),
            f"{100 * sums['padding'] / sums['tokens']:.1f}",
            _short(sums["documents"]),
            f"{own['peak_gib'].max():.2f}",
        )
    return shown


def _marks(count: int) -> dict[str, Any]:
    """A line style, with points if there are so few steps that lines alone would hide them."""
    return {"marker": "o", "markersize": 3, "linewidth": 1.2} if count <= 60 else {"linewidth": 1.0}


def _draw_range(axes: Any, steps: _Floats, values: _Floats, label: str, **style: Any) -> None:
    """Draws the mean over ranks, and the range from the smallest to the largest value."""
    different, index = np.unique(steps, return_inverse=True)
    low, high = np.full(len(different), np.inf), np.full(len(different), -np.inf)
    np.minimum.at(low, index, values)
    np.maximum.at(high, index, values)
    axes.fill_between(different, low, high, alpha=0.2, color=style["color"])
    axes.plot(different, np.bincount(index, values) / np.bincount(index), label=f"{label} (mean, range)", **style)


def _draw_ranks(axes: Any, table: Table) -> None:
    is_apart = ~np.isnan(table["rank"])
    table = {name: values[is_apart] for name, values in table.items()}
    real, ranks = table["tokens"] - table["padding"], np.unique(table["rank"])
    if len(ranks) > _MOST_LINES:
        _draw_range(axes, table["step"], real, "tokens", color="tab:blue")
        _draw_range(axes, table["step"], table["targets"], "targets", color="tab:orange", linestyle="--")
    else:
        for number, rank in enumerate(ranks):
            own = table["rank"] == rank
            style: dict[str, Any] = {"color": f"C{number}", "linewidth": 1.2}
            axes.plot(table["step"][own], real[own], label=f"rank {int(rank)}: tokens", **style)
            axes.plot(table["step"][own], table["targets"][own], label="targets", linestyle=":", **style)
    axes.set(title="Tokens and targets of each rank, without padding", ylabel="tokens per step")
    # Targets may outnumber tokens: a collate function may give labels to tokens that a padding mask excludes.
    axes.set_ylim(bottom=0, top=1.1 * max(1.0, float(real.max()), float(table["targets"].max())))
    axes.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)


def _draw_padding(axes: Any, table: Table) -> None:
    steps, fraction = _of_steps(table, "padding_fraction")
    axes.fill_between(steps, 100 * fraction, alpha=0.2, color="tab:green")
    axes.plot(steps, 100 * fraction, color="tab:green", label="padding, all ranks", **_marks(len(steps)))
    axes.set(title="Padding", ylabel="% of the tokens of a step")
    axes.set_ylim(bottom=0, top=max(1.0, 120 * float(fraction.max())))
    axes.legend(fontsize="small")


def draw(table: Table, path: Path) -> None:
    """Draws tokens per rank, padding, imbalance and loss over steps. The title is the name of the folder.

    Raises:
        UlyssesError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UlyssesError(
            "a report without matplotlib", "matplotlib 3.8 or newer", "pip install 'lightning-ulysses[report]'"
        ) from error
    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    (tokens, padding), (balance, loss) = figure.subplots(2, 2, sharex=True)
    _draw_ranks(tokens, table)
    _draw_padding(padding, table)
    steps, values = _of_steps(table, "imbalance")
    balance.plot(steps, values, color="tab:red", label="imbalance", **_marks(len(steps)))
    balance.axhline(1, color="gray", linewidth=0.8, linestyle="--", label="all ranks alike")
    balance.set(title="Imbalance: work of the busiest rank", ylabel="times the mean over ranks")
    balance.legend(fontsize="small")
    loss.plot(*_of_steps(table, "loss"), color="tab:blue", label="train/loss", **_marks(len(steps)))
    loss.set(title="Loss, mean over all targets of the step", ylabel="nats per target")
    loss.legend(fontsize="small")
    for axes in (tokens, padding, balance, loss):
        axes.grid(alpha=0.3)
        axes.set_xlabel("optimizer step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelbottom=True)
    figure.suptitle("/".join(path.resolve().parts[-3:-1]))
    figure.savefig(path, dpi=120)


def leave(table: Table, folder: Path | None, final: bool) -> None:
    """Writes the csv into a folder. With ``final``, also prints the table and draws the figure.

    Args:
        table: See `COLUMNS`.
        folder: The log directory, or None.
        final: Whether training ended normally.
    """
    if folder is not None:
        write_csv(table, folder / CSV_NAME)
    if not final:
        return
    from rich.console import Console

    Console().print(rich_table(table))
    if folder is not None:
        try:
            draw(table, folder / PNG_NAME)
        except UlyssesError as error:
            # A missing matplotlib must not end a run that has trained.
            warnings.warn(str(error), stacklevel=2)
