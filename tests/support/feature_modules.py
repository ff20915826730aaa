"""Modules and callbacks that use what Lightning offers around a step, for the table of features."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch import callbacks as ready
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from models import HandWritten, pair_batch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

BATCHES = [pair_batch(seed, 33, 2, "uneven") for seed in range(4)]
EVEN = [pair_batch(seed, 33, 2) for seed in range(4)]


class Logged(HandWritten):
    """Logs the losses of its steps, and predicts logits."""

    def __init__(self, lr: float = 0.1, **settings: Any) -> None:
        super().__init__(lr=lr, **settings)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        loss = super().validation_step(batch, batch_idx)
        self.log("val_loss", loss)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self._loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


class Counter(L.Callback):
    """Counts the hooks of a run."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("on_"):
            calls = super().__getattribute__("calls")
            calls[name] = calls.get(name, 0) + 1
        return found


class ScalesGradients(L.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)


class Unfreeze(ready.BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.embed, train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.make_trainable(pl_module.embed)


class Writer(ready.BasePredictionWriter):
    def __init__(self, interval: Any) -> None:
        super().__init__(interval)
        self.sums: list[float] = []

    def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, *rest: Any) -> None:
        self.sums.append(float(prediction.double().square().sum()))


class Remembers(Logger):
    """A logger of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        return "remembers"

    @property
    def version(self) -> str:
        return "0"

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        return self.logged

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append(dict(metrics))


class Scheduled(Logged):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class OwnSchedule(Logged):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()


class Plateau(Logged):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class OwnData(Logged):
    """A dataloader of its own, another one in each epoch."""

    def train_dataloader(self) -> Any:
        first = 2 * (self.current_epoch % 2)
        return DataLoader(BATCHES[first : first + 2], batch_size=None)  # type: ignore[arg-type]


class Normed(Logged):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(self.embed.embedding_dim)
        head, norm = self.head, self.norm

        class Head(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm, self.head = norm, head

            def forward(self, hidden: Tensor) -> Tensor:
                # (B, S, W) -> (B, W, S) -> (B, S, W)
                return self.head(self.norm(hidden.transpose(1, 2)).transpose(1, 2))

        self.head = Head()  # type: ignore[assignment]


class Stops(Logged):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


class OwnClipping(Logged):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        clip = 0.01 * (1 + self.current_epoch)
        self.clip_gradients(optimizer, gradient_clip_val=clip, gradient_clip_algorithm=self.kind)


class BeforeStep(Logged):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + self.trainer.global_step)


class ReadsGradients(Logged):
    def on_after_backward(self) -> None:
        self.log("norm", torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None]).norm())


class OwnStep(Logged):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 if batch_idx % 2 else 0.05
        optimizer.step(closure=optimizer_closure)


class Manual(Logged):
    def __init__(self, backwards: int, logs_late: bool = False) -> None:
        super().__init__()
        self.backwards, self.logs_late, self.automatic_optimization = backwards, logs_late, False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        for _ in range(self.backwards):
            loss = self._loss(batch)
            if not self.logs_late:
                self.log("loss", loss)
            self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.05)
        optimizer.step()
        if self.logs_late:
            self.log("loss", loss)


class TwoOptimizers(Logged):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(each.parameters(), lr=0.1) for each in (self.embed, self.head)]


class Returns(Logged):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.kind == "nan":
            return (loss - loss.detach()).sqrt() * 0
        return None if self.kind == "none" else {"loss": loss, "seen": loss.detach()}


class TakesIterator(Logged):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        batch, *_ = next(dataloader_iter)
        return self._loss(batch)


class EpochEnds(Logged):
    def on_train_epoch_end(self) -> None:
        self.log("epochs", float(self.current_epoch))

    def on_validation_epoch_end(self) -> None:
        self.log("weight", self.head.weight.detach().double().norm())


class Late(Logged):
    """Builds its model in ``configure_model``."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        self.automatic_optimization = True

    def configure_model(self) -> None:
        if hasattr(self, "head"):
            return
        built = Logged()
        for name, module in built.named_children():
            setattr(self, name, module)
        self.positions, self.loss, self.lr, self.checkpointing = "sequence", "cross_entropy", 0.1, False


class OwnCallbacks(Logged):
    def configure_callbacks(self) -> Any:
        return [ready.EarlyStopping("val_loss", mode="max", patience=0)]


class Transfers(Logged):
    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return tuple(each.to(device) for each in batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        # The whole sequence, in reverse.
        return batch[0].flip(1), batch[1].flip(1)


class Saves(Logged):
    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.kept = 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["kept"] = 7 + checkpoint["hyper_parameters"]["size"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.kept = checkpoint["kept"]


class Edits(Logged):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.head.bias.mul_(0.5)


class Measured(Logged):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(self.head.out_features, average="micro", ignore_index=-100)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        x, y = batch
        self.accuracy(self(x).flatten(0, 1), y.flatten())
        self.log("accuracy", self.accuracy)
        return super().validation_step(batch, batch_idx)


class Gathers(Logged):
    gathered: tuple[int, ...] = ()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.gathered = tuple(torch.as_tensor(self.all_gather(torch.tensor(1.0))).shape)


class Synced(Logged):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        loss = HandWritten.validation_step(self, batch, batch_idx)
        self.log("val_loss", loss, sync_dist=True)
        return loss
