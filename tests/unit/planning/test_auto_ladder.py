"""``memory="auto"``: where it may be said, and which parts a model can have."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import Strategy
from models import LlamaModule
from torch import nn

from lightning_ulysses import UlyssesError
from lightning_ulysses.config import MemoryConfig, read_parts
from lightning_ulysses.planning.auto import Room, find_room, gathered_units, ladder
from lightning_ulysses.planning.plan import LADDER


def test_configs_of_lightning_may_say_it() -> None:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Strategy, "strategy")
    given = {"class_path": "lightning_ulysses.UlyssesDeepSpeedStrategy", "init_args": {"memory": "auto"}}
    assert parser.parse_object({"strategy": given}).strategy.init_args.memory == "auto"
    assert read_parts("auto") == "auto"
    with pytest.raises(UlyssesError, match="'auto'"):
        read_parts("always")


def test_the_ladder_has_what_the_model_has() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    model = LlamaModule(layers=3)
    assert ladder(model, 2, gpu) == [MemoryConfig(**parts) for parts in LADDER]
    # Nothing is exchanged on one process, and nothing is saved on the host of a CPU.
    assert not any(each.cuts_heads or each.offload != "none" for each in ladder(model, 1, cpu))
    assert ladder(nn.Linear(2, 2), 2, cpu) == [MemoryConfig(), MemoryConfig(head_chunks="auto")]


def test_blocks_that_are_checkpointed_already_stay_so() -> None:
    model = LlamaModule(layers=3)
    model.model.gradient_checkpointing_enable()
    assert {each.checkpoint for each in ladder(model, 2, torch.device("cuda"))} == {"none"}


def test_all_tiles_that_may_be_chosen_are_gathered_as_one() -> None:
    model = LlamaModule(layers=3)
    wanted = [layer.mlp for layer in model.model.model.layers]
    assert gathered_units(model, "auto") == wanted
    assert gathered_units(model, MemoryConfig()) == []


def test_room_on_a_cpu_is_shared() -> None:
    alone, shared = find_room(torch.device("cpu"), 1), find_room(torch.device("cpu"), 4)
    assert isinstance(alone, Room) and alone.device == alone.host
    assert shared.device == pytest.approx(alone.device / 4, rel=0.2)
