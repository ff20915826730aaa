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
# Steps of a running mean.
_AVERAGED = 10

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


def _draw_loss(axes: Any, table: Table) -> None:
    steps, loss = _of_steps(table, "loss")
    many = len(steps) > 3 * _AVERAGED
    axes.plot(steps, loss, color="tab:blue", alpha=0.35 if many else 1.0, label="each step", **_marks(len(steps)))
    if many:
        # The mean of the steps so far, of the last ones at most.
        sums = np.concatenate([[0.0], np.nancumsum(loss)])
        last = np.arange(1, len(loss) + 1)
        first = np.maximum(last - _AVERAGED, 0)
        mean = (sums[last] - sums[first]) / (last - first)
        axes.plot(steps, mean, color="tab:blue", linewidth=2, label=f"mean of {_AVERAGED} steps")
        axes.legend(fontsize="small")
    axes.set(title=f"Loss: {loss[0]:.4g} at first, {loss[-1]:.4g} at last", ylabel="nats per target")


def _draw_speed(axes: Any, table: Table) -> None:
    steps, speed = _of_steps(table, "tokens_per_sec")
    axes.plot(steps, speed, color="tab:green", **_marks(len(steps)))
    median = _middle(speed)
    known = not np.isnan(median)
    axes.set(title=f"Tokens per second: {median:,.0f} in the median" if known else "Tokens per second: not measured")
    # The first step waits for caches and compilers.
    axes.set_ylim(bottom=0, top=1.3 * float(np.nanpercentile(speed, 95)) if known else 1)
    axes.set_ylabel("all ranks, padding included")


def _draw_memory(axes: Any, table: Table) -> None:
    steps, index = np.unique(table["step"], return_inverse=True)
    low, high = np.full(len(steps), np.inf), np.full(len(steps), -np.inf)
    np.minimum.at(low, index, table["peak_gib"])
    np.maximum.at(high, index, table["peak_gib"])
    axes.fill_between(steps, low, high, alpha=0.25, color="tab:purple", label="from the rank with the least")
    axes.plot(steps, high, color="tab:purple", label="the rank with the most", **_marks(len(steps)))
    axes.set(title=f"Peak memory of a rank: {high.max():.2f} GiB at most", ylabel="GiB")
    axes.set_ylim(bottom=0, top=1.2 * max(float(high.max()), 1e-3))
    axes.legend(fontsize="small", loc="lower right")


def _draw_work(axes: Any, table: Table) -> None:
    is_apart = ~np.isnan(table["rank"])
    own = {name: values[is_apart] for name, values in table.items()}
    ranks, index = np.unique(own["rank"], return_inverse=True)
    left = np.zeros(len(ranks))
    steps = max(len(np.unique(own["step"])), 1)
    # Parts of a bar, of which none hides another one.
    parts = {
        "targets": np.minimum(own["targets"], own["tokens"] - own["padding"]),
        "other tokens": np.maximum(own["tokens"] - own["padding"] - own["targets"], 0),
        "padding": own["padding"],
    }
    for (name, values), color in zip(parts.items(), ("tab:blue", "tab:cyan", "lightgray"), strict=True):
        width = np.bincount(index, values, len(ranks)) / steps
        if width.any():
            axes.barh(ranks, width, left=left, color=color, label=name, height=0.8)
        left += width
    worst = float(_of_steps(table, "imbalance")[1].mean())
    axes.set(title=f"Work of each rank: the busiest has {worst:.2f} times the mean", xlabel="tokens per step")
    axes.set(ylabel="rank", ylim=(ranks[-1] + 0.6, ranks[0] - 0.6), xlim=(0, 1.05 * max(float(left.max()), 1.0)))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)


def draw(table: Table, path: Path) -> None:
    """Draws loss, tokens per second and memory over steps, and the work of each rank. The title is the folder's name.

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
    (loss, speed), (memory, work) = figure.subplots(2, 2)
    _draw_loss(loss, table)
    _draw_speed(speed, table)
    _draw_memory(memory, table)
    _draw_work(work, table)
    for axes in (loss, speed, memory):
        axes.set_xlabel("optimizer step")
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (loss, speed, memory, work):
        axes.grid(alpha=0.3)
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
