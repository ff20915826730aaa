"""The report of a run: csv, table, picture and command line."""

from __future__ import annotations

import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from lightning_ulysses import UlyssesError
from lightning_ulysses.callbacks.token_history import Table, TokenHistory
from lightning_ulysses.callbacks.token_ledger import FIELDS, StepLedger
from lightning_ulysses.callbacks.token_report import COLUMNS, CSV_NAME, PNG_NAME, draw, leave, read_csv, write_csv
from lightning_ulysses.cli.main import main
from lightning_ulysses.cost.flops import ModelOperations
from lightning_ulysses.exchange.mesh import SequenceMesh


def ledger(world_size: int = 2, by_targets: bool = True) -> StepLedger:
    mesh = SequenceMesh(0, world_size, 1, 0, world_size, 0)
    return StepLedger(mesh, torch.device("cpu"), -100, ModelOperations(6.0, 2.0), by_targets)


def counts(ranks: int, step: int = 0, **fields: float) -> torch.Tensor:
    """(W, fields): rank r holds 100 tokens of which 10 r are padding."""
    values = {"tokens": 100.0, "documents": 2.0, "pairs": 50.0, "peak_bytes": 2.0**30, **fields}
    rows = []
    for rank in range(ranks):
        own = {"loss": 4.0 / (step + 1) / ranks, "targets": 20.0 * rank + step, "padding": 10.0 * rank}
        own["work"] = 100.0 + 50.0 * rank
        rows.append([{**own, **values}[name] for name in FIELDS])
    return torch.tensor(rows, dtype=torch.float64)


def history(steps: int = 4, ranks: int = 2, first: int = 1) -> TokenHistory:
    made = TokenHistory()
    for step in range(first, first + steps):
        made.add(step, float("nan") if step == 1 else 0.5, counts(ranks, step))
    return made


def table(steps: int = 4, ranks: int = 2) -> Table:
    return history(steps, ranks).table(ledger(ranks), 1e3)


def test_columns_are_what_they_say() -> None:
    found = table(2)
    assert set(found) == set(COLUMNS)
    wanted = {
        "step": [1, 1, 2, 2],
        "rank": [0, 1, 0, 1],
        "loss": [2, 2, 4 / 3, 4 / 3],
        "targets": [1, 21, 2, 22],
        "weight": [1 / 22, 21 / 22, 2 / 24, 22 / 24],
        "padding": [0, 10, 0, 10],
        "padding_fraction": [0.05] * 4,
        "imbalance": [150 / 125] * 4,
        "peak_gib": [1] * 4,
    }
    for name, values in wanted.items():
        assert found[name] == pytest.approx(np.array(values)), name
    assert np.isnan(found["tokens_per_sec"][:2]).all() and found["tokens_per_sec"][2] == 190 / 0.5
    assert found["mfu"][2] == pytest.approx((6 * 190 + 2 * 100) / (0.5 * 2 * 1e3))
    assert history(1).table(ledger(by_targets=False), None)["weight"].tolist() == [0.5, 0.5]
    assert np.isnan(history(3).table(ledger(), None)["mfu"]).all()


def test_csv_there_and_back(tmp_path: Path) -> None:
    write_csv(table(), tmp_path / "new" / CSV_NAME)
    lines = (tmp_path / "new" / CSV_NAME).read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS) and len(lines) == 1 + 4 * 2
    assert lines[1].startswith("1,0,2,1,") and ",," in lines[1]
    found = read_csv(tmp_path / "new" / CSV_NAME)
    for name, values in table().items():
        np.testing.assert_allclose(found[name], values, rtol=1e-8, err_msg=name)


def test_history_survives_its_state_and_another_world() -> None:
    kept = history(3)
    kept.flush()
    kept.add(4, 0.5, counts(4, 4))
    again = TokenHistory.from_state(kept.state_dict())
    assert again.steps == [1, 2, 3, 4] and [len(each) for each in again.counts] == [2, 2, 2, 4]
    assert all(torch.equal(a, b) for a, b in zip(again.counts, kept.counts, strict=True))
    assert len(again.table(ledger(), None)["step"]) == 10
    again.rewind(2)
    assert again.steps == [1, 2] and len(again.counts) == len(again.seconds) == 2
    empty = TokenHistory.from_state(TokenHistory().state_dict())
    assert empty.steps == [] and empty.counts == []


def test_ranks_of_steps_long_past_are_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory and checkpoints grow with the steps, and no longer with steps times ranks."""
    whole = history(40, 16).table(ledger(16), 1e3)
    monkeypatch.setattr("lightning_ulysses.callbacks.token_history._APART", 8)
    made = history(0)
    for step in range(1, 41):
        made.add(step, float("nan") if step == 1 else 0.5, counts(16, step))
        made.flush()
    assert 8 <= len(made.counts) < 10 and len(made.counts) + len(made.sums) == 40
    again = TokenHistory.from_state(made.state_dict())
    found = again.table(ledger(16), 1e3)
    assert len(found["step"]) == len(made.sums) + 16 * len(made.counts)
    for step in range(1, 41):
        before, after = ({name: values[t["step"] == step] for name, values in t.items()} for t in (whole, found))
        for name in ("loss", "padding_fraction", "imbalance", "seconds", "tokens_per_sec", "mfu"):
            np.testing.assert_allclose(after[name][0], before[name][0], rtol=1e-12, err_msg=name)
        for name in ("targets", "tokens", "padding", "documents", "weight"):
            np.testing.assert_allclose(after[name].sum(), before[name].sum(), rtol=1e-12, err_msg=name)
        assert after["peak_gib"].max() == before["peak_gib"].max()
    leave(found, tmp_path, final=True)
    np.testing.assert_array_equal(read_csv(tmp_path / CSV_NAME)["rank"], found["rank"])
    again.rewind(10)
    assert len(again.sums) == 10 and not again.counts and len(again.steps) == 10


@pytest.mark.parametrize(("steps", "ranks"), [(4, 2), (1, 1), (100, 16)])
def test_report_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int, ranks: int
) -> None:
    leave(table(steps, ranks), tmp_path, final=True)
    first = imread(tmp_path / PNG_NAME)
    assert first.shape[:2] == (960, 1440) and first.std() > 0.05
    (tmp_path / PNG_NAME).unlink()
    printed = capsys.readouterr().out
    assert main(["report", str(tmp_path)]) == 0
    again = capsys.readouterr().out
    assert np.array_equal(imread(tmp_path / PNG_NAME), first)
    # Apart from rounding in the csv and the path of the picture, the same table.
    assert printed.strip().splitlines()[:-1] == again.strip().splitlines()[: len(printed.strip().splitlines()) - 1]
    for part in ("rank", "targets", "padding", "imbalance", f"steps 1 to {steps}"):
        assert part in printed


def drawn(made: Table, path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The panels by the first words of their titles."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    draw(made, path / PNG_NAME)
    return {axes.get_title().partition(":")[0]: axes for axes in figures[0].axes}


@pytest.mark.parametrize("ranks", [2, 16])
@pytest.mark.parametrize("factor", [0.5, 10.0])
def test_the_work_of_each_rank_is_a_bar_of_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, factor: float
) -> None:
    """No part hides another one, also where labels outnumber the tokens that a mask keeps."""
    made = table(ranks=ranks)
    made["padding"] = np.minimum(made["padding"], 50)
    made["targets"] = factor * (made["tokens"] - made["padding"])
    axes = drawn(made, tmp_path, monkeypatch)["Work of each rank"]
    bars = [patch.get_bbox() for patch in axes.patches]
    ends = [
        max((bar.x1 for bar in bars if abs((bar.y0 + bar.y1) / 2 - rank) < 0.1), default=0.0) for rank in range(ranks)
    ]
    assert ends == pytest.approx([100.0] * ranks)
    for rank in range(ranks):
        own = sorted((bar.x0, bar.x1) for bar in bars if abs((bar.y0 + bar.y1) / 2 - rank) < 0.1)
        assert all(left[1] == pytest.approx(right[0]) for left, right in pairwise(own))
    assert axes.get_xlim()[0] == 0 and 100 < axes.get_xlim()[1] < 120


def test_panels_show_loss_speed_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = table(steps=40)
    panels = drawn(made, tmp_path, monkeypatch)
    assert set(panels) == {"Loss", "Tokens per second", "Peak memory of a rank", "Work of each rank"}
    each, mean = panels["Loss"].lines
    _, loss = np.unique(made["step"], return_index=True)
    np.testing.assert_allclose(each.get_ydata(), made["loss"][loss])
    assert mean.get_ydata()[-1] == pytest.approx(made["loss"][loss][-10:].mean())
    assert mean.get_ydata()[1] == pytest.approx(made["loss"][loss][:2].mean())
    assert (
        "380" in panels["Tokens per second"].get_title() and "1.00 GiB" in panels["Peak memory of a rank"].get_title()
    )
    # Nothing was timed.
    made["tokens_per_sec"][:] = np.nan
    assert "not measured" in drawn(made, tmp_path, monkeypatch)["Tokens per second"].get_title()


def test_nothing_is_drawn_before_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(table(), tmp_path, final=False)
    assert [path.name for path in tmp_path.iterdir()] == [CSV_NAME]
    assert capsys.readouterr().out == ""


def test_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(folder: Path, *parts: str) -> None:
        assert main(["report", str(folder)]) == 1
        message = capsys.readouterr().err
        assert all(part in message for part in parts), message

    says(tmp_path / "nowhere", "nowhere, which is no folder", "check the path")
    says(tmp_path, "without token_report.csv", "add TokenCountMonitor to the callbacks")
    run = tmp_path / "version_0"
    write_csv(table(), run / CSV_NAME)
    says(tmp_path, "without token_report.csv", "name one of", "version_0")
    text = (run / CSV_NAME).read_text()
    (run / CSV_NAME).write_text("step,loss\n1,2\n")
    says(run, "without the columns rank, targets", "leave its file as it was written")
    (run / CSV_NAME).write_text(text.splitlines()[0] + "\n")
    says(run, "token_report.csv without a row")
    (run / CSV_NAME).write_text(text.replace("\n1,0,2,", "\n1,0,two,"))
    says(run, "could not convert string to float: 'two'", "numbers in every column")
    with pytest.raises(SystemExit):
        main(["report"])
    assert "DIR" in capsys.readouterr().err


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UlyssesError, match=r"lightning-ulysses\[report\]"):
        draw(table(), tmp_path / PNG_NAME)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        leave(table(), tmp_path, final=True)
    assert any("lightning-ulysses[report]" in str(warning.message) for warning in caught)
    assert read_csv(tmp_path / CSV_NAME)["step"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
