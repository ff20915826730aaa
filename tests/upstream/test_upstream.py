"""The private parts of Lightning, DeepSpeed and transformers that are leaned on are still what they were."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch.nn.functional as F
from models import HandWritten
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from lightning_ulysses.interceptors import torch_draws
from lightning_ulysses.patching.early_bound import LEAVE_ALONE
from lightning_ulysses.testing import QUIET
from lightning_ulysses.upstream import deepspeed as upstream_deepspeed
from lightning_ulysses.upstream import lightning as upstream_lightning

LIBRARIES = LEAVE_ALONE - {"torch", "lightning_ulysses"}


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.fixture(scope="module")
def trainer() -> L.Trainer:
    return L.Trainer(accelerator="cpu", devices=1, accumulate_grad_batches=3, **QUIET)


def test_lightning_says_whether_the_optimizer_steps(trainer: L.Trainer) -> None:
    assert parameters(trainer.fit_loop._should_accumulate) == []
    current, found = trainer.fit_loop.epoch_loop.batch_progress.current, []
    for current.ready in range(1, 5):
        found.append(upstream_lightning.should_accumulate(trainer))
    current.ready = 0
    assert found == [True, True, False, True]


def test_lightning_knows_the_batches_of_an_epoch(trainer: L.Trainer) -> None:
    from lightning.pytorch.utilities import CombinedLoader

    assert upstream_lightning.used_batches(trainer) == float("inf")
    loader = CombinedLoader([[1, 2, 3]])
    with mock.patch.object(trainer.fit_loop, "_combined_loader", loader):
        assert upstream_lightning.used_batches(trainer) == float("inf")
        for limits, wanted in (([2], 2.0), ([float("inf")], float("inf"))):
            loader.limits = limits
            assert upstream_lightning.used_batches(trainer) == wanted


def test_lightning_keeps_its_progress_where_it_is_rescaled(trainer: L.Trainer) -> None:
    state = trainer.fit_loop.state_dict()
    current = state["epoch_loop.batch_progress"]["current"]
    assert {"ready", "started", "processed", "completed"} <= set(current)
    source = inspect.getsource(type(trainer.fit_loop).on_save_checkpoint)
    assert 'state_dict["combined_loader"]' in source
    current.update(ready=6, started=6, processed=6, completed=6)
    state["state_dict"] = {"combined_loader": [{"batches": 6, "dp_size": 2}]}
    upstream_lightning.rescale_progress({"loops": {"fit_loop": state}}, 4)
    assert [current[name] for name in ("ready", "started", "processed", "completed")] == [3, 3, 3, 3]
    # As saved behind a batch, before Lightning has counted it as completed.
    current.update(ready=6, started=6, processed=6, completed=5)
    upstream_lightning.rescale_progress({"loops": {"fit_loop": state}}, 4)
    assert [current[name] for name in ("ready", "started", "processed", "completed")] == [3, 3, 3, 2]
    upstream_lightning.rescale_progress({}, 4)


def test_lightning_asks_for_monitored_values_at_three_places(trainer: L.Trainer) -> None:
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    assert parameters(ModelCheckpoint._monitor_candidates) == ["self", "trainer"]
    assert parameters(EarlyStopping._run_early_stopping_check) == ["self", "trainer"]
    assert parameters(trainer.fit_loop.epoch_loop._get_monitor_value) == ["key"]


def test_lightning_calls_hooks_where_they_are_looked_for() -> None:
    from lightning.pytorch.trainer import call

    for function, owner in ((call._call_callback_hooks, "callback"), (call._call_lightning_module_hook, "pl_module")):
        names = function.__code__.co_varnames
        assert {"trainer", "hook_name", owner} <= set(names)
    assert {"trainer", "hook_name"} <= set(parameters(call._call_strategy_hook))


def test_deepspeed_keeps_its_copy_of_the_weights_where_edits_are_carried() -> None:
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for module, copied in (
        (stage_1_and_2, "bit16_partitions[partition_id].data.copy_(fp32_partition.data)"),
        (bf16_optimizer, "bf16_partitions[partition_id].data.copy_(fp32_partition.data)"),
        (stage3, "fp32_partition.data.copy_(fp16_partitions.data)"),
    ):
        assert copied in inspect.getsource(module)


def test_lightning_modules_have_a_device_mesh() -> None:
    module, mesh = HandWritten(), mock.sentinel.mesh
    assert module.device_mesh is None
    upstream_lightning.set_device_mesh(module, mesh)
    assert module.device_mesh is mesh


def test_deepspeed_asks_whether_the_shared_memory_op_is_wanted() -> None:
    import deepspeed
    from deepspeed.comm.torch import build_shm_op

    compatible, name = deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm"
    builder = SimpleNamespace(NAME=name, load=mock.Mock(), absolute_name=lambda: name)
    with mock.patch("deepspeed.comm.torch.get_accelerator") as accelerator, mock.patch.dict(compatible, {name: True}):
        accelerator.return_value.create_op_builder.return_value = builder
        with upstream_deepspeed.without_shared_memory_op():
            assert build_shm_op() is None and not builder.load.called
        assert compatible[name] is True
        build_shm_op()
        assert builder.load.called
        del compatible[name]
        with pytest.raises(KeyError), upstream_deepspeed.without_shared_memory_op():
            raise KeyError
        assert name not in compatible


def test_deepspeed_can_be_pointed_at_the_cpu() -> None:
    from deepspeed.accelerator import get_accelerator

    before = get_accelerator()
    gpu = mock.Mock(**{"device_name.return_value": "cuda"})
    with (
        mock.patch("deepspeed.accelerator.get_accelerator", return_value=gpu),
        mock.patch("deepspeed.accelerator.set_accelerator") as chosen,
    ):
        upstream_deepspeed.use_accelerator("cuda")
        assert not chosen.called
        upstream_deepspeed.use_accelerator("cpu")
    assert chosen.call_args.args[0].device_name() == "cpu"
    assert get_accelerator() is before and parameters(inspect.unwrap(type(before).device_name))[0] == "self"


def test_deepspeed_restores_weights_by_a_method_that_an_inference_engine_lacks() -> None:
    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    assert "self.optimizer._restore_from_bit16_weights()" in inspect.getsource(DeepSpeedEngine.load_checkpoint)
    assert hasattr(DeepSpeedZeroOptimizer_Stage3, "_restore_from_bit16_weights")
    assert not hasattr(DeepSpeedZeRoOffload, "_restore_from_bit16_weights")
    engine = SimpleNamespace(optimizer=SimpleNamespace())
    upstream_deepspeed.allow_weights_only_load(engine)
    assert engine.optimizer._restore_from_bit16_weights() is None
    upstream_deepspeed.allow_weights_only_load(SimpleNamespace(optimizer=None))


def test_deepspeed_keeps_its_world_where_it_is_forgotten() -> None:
    import deepspeed.comm.comm as comm
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    counter = inspect.signature(DeepSpeedZeRoOffload._register_deepspeed_module).parameters["count"]
    assert counter.default is DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0]
    cached = [name for name in vars(groups) if name.startswith("_") and name.isupper()]
    assert {"_WORLD_GROUP", "_ZERO_PARAM_INTRA_PARALLEL_GROUP"} <= set(cached)
    assert isinstance(Init.param_id, int) and hasattr(comm, "cdb")
    with (
        mock.patch.object(comm, "cdb", "backend"),
        mock.patch.object(groups, "_WORLD_GROUP", object()),
        mock.patch.object(Init, "param_id", 7),
    ):
        counter.default[0] = 5
        upstream_deepspeed.forget_world()
        assert comm.cdb is None and groups._WORLD_GROUP is None
        assert Init.param_id == 0 and counter.default == [0]


def test_transformers_keeps_its_tables_and_masks() -> None:
    from transformers import masking_utils
    from transformers.modeling_utils import AttentionInterface

    from lightning_ulysses.interceptors.transformers.masks import _mask_parts

    for table in (AttentionInterface, masking_utils.AttentionMaskInterface):
        assert {"sdpa", "flash_attention_2"} <= set(table._global_mapping)
    arguments = parameters(masking_utils.sdpa_mask)
    assert {"batch_size", "q_length", "kv_length", "mask_function", "attention_mask"} <= set(arguments)
    composed = masking_utils.and_masks(
        masking_utils.causal_mask_function,
        masking_utils.sliding_window_overlay(5),
        masking_utils.packed_sequence_mask_function(None),
    )
    assert _mask_parts(composed) == {
        "causal_mask_function": {},
        "sliding_window_overlay": {"sliding_window": 5},
        "packed_sequence_mask_function": {"packed_sequence_mask": None},
    }


def test_a_module_is_called_by_its_own_call_impl() -> None:
    """`memory.head` defers logits before any hook of the head, by an attribute of the module."""
    module = nn.Linear(2, 2)
    vars(module)["_call_impl"] = lambda *args: args
    assert module(1, 2) == (1, 2)


def test_fabric_keeps_what_its_strategy_overrides() -> None:
    from lightning.fabric import fabric, wrappers
    from lightning.fabric.strategies.ddp import DDPStrategy
    from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy
    from lightning.fabric.utilities.load import _move_state_into
    from lightning.fabric.utilities.seed import pl_worker_init_function

    assert parameters(DeepSpeedStrategy._setup_distributed) == parameters(DDPStrategy.setup_environment) == ["self"]
    assert parameters(DeepSpeedStrategy.setup_module_and_optimizers) == ["self", "module", "optimizers", "scheduler"]
    assert "_backward_sync_control.no_backward_sync(forward_module, enabled)" in inspect.getsource(fabric.Fabric)
    # The class of a wrapped optimizer is made of that of the optimizer.
    assert "(self.__class__, optimizer.__class__)" in inspect.getsource(wrappers._FabricOptimizer)
    assert parameters(_move_state_into) == ["source", "destination", "keys"]
    assert parameters(pl_worker_init_function) == ["worker_id", "rank"]


def test_deepspeed_clips_unless_it_is_told_not_to() -> None:
    from deepspeed.runtime.config import get_gradient_clipping

    assert get_gradient_clipping({}) == 1.0 and get_gradient_clipping({"gradient_clipping": 0.0}) == 0.0


def test_deepspeed_has_the_norm_of_gradients_before_a_step() -> None:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for owner, name in (
        (BF16_Optimizer, "get_grads_for_norm"),
        (DeepSpeedZeroOptimizer, "scaled_global_norm"),
        (DeepSpeedZeroOptimizer_Stage3, "_get_norm_groups"),
    ):
        # Decorators of DeepSpeed's hide the source of the method.
        _, _, step = inspect.getsource(owner).partition("def step(")
        assert f"self.{name}(" in step


def test_libraries_hold_no_function_that_is_replaced() -> None:
    import deepspeed  # noqa: F401

    functions = [getattr(owner, name) for owner, name, _ in torch_draws._functions() if owner is not Tensor]
    functions += [F.scaled_dot_product_attention, checkpoint, flex_attention]
    wanted = {id(function): function for function in functions}
    modules = [(name, module) for name, module in sys.modules.items() if name.partition(".")[0] in LIBRARIES]
    assert len(modules) > 1000
    held = {f"{name}.{key}" for name, module in modules for key, value in vars(module).items() if id(value) in wanted}
    # With this one DeepSpeed puts torch's own back.
    assert held <= {"deepspeed.runtime.zero.partition_parameters._orig_torch_randn"}
