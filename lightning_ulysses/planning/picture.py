"""The memory of a plan by cause over S, as SVG, as a page of HTML, or as PNG."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

from lightning_ulysses.config import read_memory
from lightning_ulysses.planning.costs import Groups
from lightning_ulysses.planning.plan import Plan, scene_of
from lightning_ulysses.planning.render import amount, text_of, tokens
from lightning_ulysses.planning.store import Measurements

# From Okabe and Ito, told apart with any sight.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999", "#000000")
_WIDTH, _HEIGHT, _LEFT, _TOP = 640, 300, 60, 20

#: Bytes of one GPU by cause, of a length.
At = Callable[[int], dict[str, int]]


def causes_at(measurements: Measurements, plan: Plan) -> At:
    """Bytes of one GPU by cause over S, for the best choice, on the line through the peaks at S and at 2 S."""
    best, seq_len, blocks = plan.best, plan.seq_len, plan.facts.blocks
    memory = read_memory(best.parts)
    here, there = (
        measurements.rehearsal(scene_of(length, Groups(best.sp_size // best.gather, best.gather), memory)).by_cause(
            blocks
        )
        for length in (seq_len, 2 * seq_len)
    )
    rest = {cause: number for cause, number in best.gpu.items() if not cause.startswith("activations")}

    def at(length: int) -> dict[str, int]:
        part = (length - seq_len) / seq_len
        grown = {
            f"activations: {cause}": here.get(cause, 0) + part * (there.get(cause, 0) - here.get(cause, 0))
            for cause in (*here, *there)
        }
        return rest | {cause: max(int(number), 0) for cause, number in grown.items()}

    return at


def lengths(plan: Plan, number: int = 16) -> list[int]:
    """The lengths of the picture: up to a little more than what fits."""
    top = max(plan.best.longest_seq_len, plan.seq_len)
    return [max(top * 5 // 4 * place // number, 1) for place in range(number + 1)]


def causes_of(plan: Plan, at: At) -> tuple[list[int], dict[str, list[float]]]:
    """Lengths, and for each cause its bytes at each of them, those that grow least first."""
    every = lengths(plan)
    rows = [at(length) for length in every]
    names = list(dict.fromkeys(name for row in rows for name in row))
    found = {name: [float(max(row.get(name, 0), 0)) for row in rows] for name in names}
    return every, dict(sorted(found.items(), key=lambda each: each[1][-1] - each[1][0]))


def svg(plan: Plan, at: At) -> str:
    """The picture."""
    every, causes = causes_of(plan, at)
    limit = plan.machine.gpu_memory
    tallest = max(limit * 1.15, max(map(sum, zip(*causes.values(), strict=True))))

    def place(length: float, size: float) -> str:
        x = _LEFT + _WIDTH * length / every[-1]
        return f"{x:.1f},{_TOP + _HEIGHT * (1 - size / tallest):.1f}"

    below, shapes, legend = [0.0] * len(every), [], []
    for number, (name, sizes) in enumerate(causes.items()):
        above = [low + size for low, size in zip(below, sizes, strict=True)]
        colour = _COLOURS[number % len(_COLOURS)]
        edge = [place(length, size) for length, size in zip(every, above, strict=True)]
        back = [place(length, size) for length, size in zip(every[::-1], below[::-1], strict=True)]
        shapes.append(f'<polygon fill="{colour}" points="{" ".join([*edge, *back])}"/>')
        row = _TOP + 14 * number
        legend.append(f'<rect x="{_LEFT + _WIDTH + 12}" y="{row}" width="10" height="10" fill="{colour}"/>')
        legend.append(f'<text x="{_LEFT + _WIDTH + 28}" y="{row + 9}">{escape(name)}</text>')
        below = above
    begin, end = place(0, limit).split(","), place(every[-1], limit).split(",")
    marks = [
        f'<line x1="{begin[0]}" y1="{begin[1]}" x2="{end[0]}" y2="{end[1]}" stroke="#c00" stroke-dasharray="5 3"/>',
        f'<text x="{_LEFT + 4}" y="{float(begin[1]) - 4:.1f}" fill="#c00">{amount(limit)}</text>',
    ]
    for part in range(5):
        length, size = every[-1] * part // 4, tallest * part / 4
        x, y = place(length, size).split(",")
        marks.append(f'<text x="{x}" y="{_TOP + _HEIGHT + 16}" text-anchor="middle">{tokens(length)}</text>')
        marks.append(f'<text x="{_LEFT - 6}" y="{y}" text-anchor="end">{size / 2**30:.0f} GiB</text>')
    title = f"{plan.facts.name}: memory of one GPU over S, {plan.machine.gpus} GPUs, sp_size={plan.best.sp_size}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 320}" height="{_TOP + _HEIGHT + 40}" '
            'font-family="sans-serif" font-size="11">',
            '<rect width="100%" height="100%" fill="#fff"/>',
            f'<text x="{_LEFT}" y="13" font-weight="bold">{escape(title)}</text>',
            *shapes,
            *marks,
            *legend,
            "</svg>",
        ]
    )


def html(plan: Plan, at: At) -> str:
    """A page with the picture and the text of a plan."""
    return (
        f"<!doctype html><meta charset='utf-8'><title>{escape(plan.facts.name)}</title>\n{svg(plan, at)}\n"
        f"<pre>{escape(text_of(plan))}</pre>\n"
    )


def write_png(plan: Plan, at: At, path: Path) -> None:
    """Draws the picture with matplotlib.

    Raises:
        ImportError: If it is not installed (the extra ``report``).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    every, causes = causes_of(plan, at)
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    sizes = [[size / 2**30 for size in row] for row in causes.values()]
    colours = [_COLOURS[number % len(_COLOURS)] for number in range(len(causes))]
    axes.stackplot([length / 2**10 for length in every], sizes, labels=list(causes), colors=colours)
    axes.axhline(plan.machine.gpu_memory / 2**30, color="#cc0000", linestyle="--")
    axes.set(xlabel="S, thousands of tokens (1024)", ylabel="GiB on one GPU", title=plan.facts.name)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(path)
