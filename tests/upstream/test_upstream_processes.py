"""The private parts of Lightning, DeepSpeed and torch by which runs end are what they were."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch.distributed as dist
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn

from lightning_ulysses.testing import QUIET
from lightning_ulysses.upstream.lightning import evaluation_batches
from lightning_ulysses.upstream.torch_builds import build_root


def test_lightning_asks_the_connector_for_its_handlers() -> None:
    """By attributes of the object, which can be replaced; and after the strategy was set up."""
    source = inspect.getsource(_SignalConnector.register_signal_handlers)
    assert "[self._sigterm_notifier_fn]" in source and "append(self._slurm_sigusr_handler_fn)" in source
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(_TrainingEpochLoop.advance)
    run = inspect.getsource(L.Trainer._run)
    assert run.index("self.strategy.setup(self)") < run.index("self._signal_connector.register_signal_handlers()")
    assert "self.strategy.barrier(" in inspect.getsource(L.Trainer.save_checkpoint)


def test_lightning_counts_evaluation_batches() -> None:
    trainer = L.Trainer(accelerator="cpu", devices=1, **QUIET)
    trainer.state.fn = TrainerFn.VALIDATING
    trainer.validating = True
    trainer.validate_loop._max_batches = [3, float("inf")]
    assert evaluation_batches(trainer) == [3.0, float("inf")]


def test_deepspeed_keeps_hooks_and_modules_where_they_are_let_go() -> None:
    from deepspeed.runtime.zero import parameter_offload, stage3, stage_1_and_2

    for module in (stage_1_and_2, stage3):
        assert "self._grad_acc_hooks.append(" in inspect.getsource(module)
    assert isinstance(parameter_offload.FWD_MODULE_STACK, list)
    name = "_PartitionedParameterCoordinator__params_to_release"
    method: Any = vars(parameter_offload.PartitionedParameterCoordinator)[name]
    assert callable(inspect.getclosurevars(method).nonlocals["func"].cache_clear)


def test_torch_has_a_default_store_and_a_build_root(monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(dist.distributed_c10d._get_default_store)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert build_root().name == "torch_extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/elsewhere")
    assert build_root() == Path("/elsewhere")
