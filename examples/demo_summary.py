"""Prints what a run did, and checks its first step against one process."""

import copy
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
from stdlib_text import Batch, StdlibText

LAST_STEPS = 10


def plot_losses(losses: Mapping[int, float], title: str, path: Path) -> None:
    """Draw the loss of every step and its running mean.

    Args:
        losses: The loss of each optimizer step, by the step's number.
        title: Title of the figure.
        path: Where to write the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, values = list(losses), list(losses.values())
    running = [mean(values[max(0, end - LAST_STEPS) : end]) for end in range(1, len(values) + 1)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, values, color="tab:blue", alpha=0.35, linewidth=1, label="each step")
    axes.plot(steps, running, color="tab:blue", linewidth=2, label=f"mean of the last {LAST_STEPS} steps")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per byte)", title=title, xmargin=0)
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(path)


@torch.no_grad()
def one_process_loss(model: torch.nn.Module, batch: Batch) -> float:
    """Compute the loss of a whole batch as a program without any parallelism would.

    Args:
        model: A causal language model of transformers.
        batch: A packed batch, (B, S) tensors.

    Returns:
        The mean over all targets.
    """
    device = next(model.parameters()).device
    # With a cache, transformers does not see that positions restart where a document begins.
    return float(model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False).loss)


class DemoSummary(pl.Callback):
    """Ends a run with a summary and a loss curve. Compares the first step with one process on the whole batch.

    Place it after the callback that logs the loss.

    Args:
        monitor: Name of the logged training loss.
    """

    def __init__(self, monitor: str = "train/loss") -> None:
        self.monitor = monitor
        self.losses: dict[int, float] = {}
        self.tokens: list[int] = []
        self.untrained: torch.nn.Module | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the model before it is trained and before the strategy changes it."""
        if stage == "fit":
            pl_module.configure_model()
        if stage == "fit" and trainer.is_global_zero:
            self.untrained = copy.deepcopy(pl_module.get_submodule("model"))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Gather from every process how many tokens of the first batch it got."""
        if not self.tokens:
            everyone: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, batch["input_ids"].numel())
            self.tokens = everyone

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Collect the loss of each optimizer step."""
        if trainer.global_step not in self.losses and self.monitor in trainer.callback_metrics:
            self.losses[trainer.global_step] = float(trainer.callback_metrics[self.monitor])

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the loss curve and print the summary."""
        folder = trainer.log_dir  # a collective
        if not trainer.is_global_zero or not self.losses:
            return
        curve = Path(folder or trainer.default_root_dir) / "loss.png"
        curve.parent.mkdir(parents=True, exist_ok=True)
        plot_losses(self.losses, f"{sum(self.tokens)} tokens per step, {len(self.tokens)} processes", curve)
        losses = list(self.losses.values())
        last = losses[-LAST_STEPS:]
        lines = {
            "steps": str(len(losses)),
            "loss": f"{losses[0]:.3f} -> {mean(last):.3f} (mean of the last {len(last)} steps)",
            "tokens per step": f"{sum(self.tokens)} = {' + '.join(map(str, self.tokens))}, one number per process",
            **self._first_step(trainer),
            "checkpoint": getattr(trainer.checkpoint_callback, "best_model_path", ""),
            "loss curve": str(curve),
        }
        print("\n" + "\n".join(f"{name:<19}{text}" for name, text in lines.items()), flush=True)

    def _first_step(self, trainer: pl.Trainer) -> dict[str, str]:
        data = getattr(trainer, "datamodule", None)
        batch = data.first_batch if isinstance(data, StdlibText) else None
        if self.untrained is None or batch is None or 1 not in self.losses:
            return {}
        if trainer.accumulate_grad_batches > 1 or batch["input_ids"].numel() != sum(self.tokens):
            return {}  # the step was more than this one batch
        alone = one_process_loss(self.untrained, batch)
        split = f"{self.losses[1]:.6f} on {len(self.tokens)} processes"
        return {"loss of first step": f"{split}, {alone:.6f} in one process on the whole batch"}
