"""Lightning's hooks that save, load and remove checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies.deepspeed import DeepSpeedStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_ulysses.checkpoints.commit import discard
from lightning_ulysses.checkpoints.load import find, load_to_evaluate, load_to_train
from lightning_ulysses.checkpoints.manifest import Division, Manifest
from lightning_ulysses.checkpoints.naming import RunName, division
from lightning_ulysses.checkpoints.ranks import from_all, world
from lightning_ulysses.checkpoints.save import saved_whole
from lightning_ulysses.export import keep_replaced, restore_replaced
from lightning_ulysses.upstream import deepspeed as upstream_deepspeed
from lightning_ulysses.upstream import lightning as upstream_lightning


class CheckpointedStrategy(DeepSpeedStrategy):
    """A strategy whose checkpoints are complete or not there, and fit any number of processes."""

    def settled(self) -> AbstractContextManager[None]:
        """Around saving: the optimizer's copy of the weights is the module's."""
        return nullcontext()

    def ranks_of_sequence(self) -> int:
        """P, which the manifest tells."""
        return 1

    @cached_property
    def _run(self) -> RunName:
        return RunName()

    @property
    def _division(self) -> Division:
        assert isinstance(self.config, dict)
        return division(self.world_size, self.config)

    def _manifest(self) -> Manifest:
        assert self.lightning_module is not None
        step = self.lightning_module.trainer.global_step
        return self._run.manifest(step, self.ranks_of_sequence(), self.deepspeed_engine.optimizer, self._division)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, *args: Any, **kwargs: Any) -> None:
        assert self.lightning_module is not None
        path = Path(self.broadcast(filepath))
        self._join_shares(upstream_lightning.loader_state(checkpoint))
        with self.settled(), saved_whole(path, self._manifest(), self.local_rank == 0) as beside:
            if not self.zero_stage_3:
                keep_replaced(checkpoint, self.lightning_module)
            with upstream_deepspeed.held_frozen(upstream_deepspeed.unstepped(self.deepspeed_engine)):
                super().save_checkpoint(checkpoint, beside, *args, **kwargs)

    def _join_shares(self, state: dict[str, Any]) -> None:
        """Has each rank keep what the train dataloaders of all data-parallel ranks have saved; a collective."""
        # None at the end of an epoch.
        shares = from_all(state.get("shares") or [], world())[:: self.ranks_of_sequence()]
        state["shares"] = [share for each in shares for share in each] if all(shares) else []

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        upstream_deepspeed.check_engine(self.model, checkpoint_path)
        assert self.lightning_module is not None
        natively = partial(super().load_checkpoint, weights_only=weights_only)
        if self.load_full_weights and self.zero_stage_3:
            return natively(checkpoint_path)
        upstream_deepspeed.allow_weights_only_load(self.deepspeed_engine)
        found = find(checkpoint_path)
        if self.lightning_module.trainer.training:
            self._run.goes_on(found)
            checkpoint = load_to_train(found, self._division, self.deepspeed_engine, natively, rank_zero_info)
        else:
            checkpoint = load_to_evaluate(found, self._division, self.lightning_module, natively)
        restore_replaced(checkpoint)
        return checkpoint

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.lightning_module is not None
        upstream_lightning.begin_new_epoch(self.lightning_module.trainer)

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self.is_global_zero:
            discard(Path(filepath))

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super().load_model_state_dict(checkpoint, strict)
        # DeepSpeed has loaded the trained weights; these were saved in their place.
        if not self.zero_stage_3 and "state_dict" in checkpoint:
            assert self.lightning_module is not None
            self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)
