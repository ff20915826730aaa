"""Reads the shards that DeepSpeed writes at any ZeRO stage (``runtime/engine.py``): whole tensors by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The settings of ZeRO by which the order of numbers in a shard depends, with their defaults.
_LAYOUT = {"round_robin_gradients": False, "sub_group_size": 1_000_000_000, "parameter_alignment": None}


@dataclass(frozen=True)
class Piece:
    """Where some consecutive numbers of a parameter are: in the flat tensors of a group on a rank."""

    rank: int
    group: int
    start: int
    size: int


@dataclass(frozen=True)
class Shards:
    """The files of a checkpoint, mapped into memory and not read.

    Args:
        stage: ZeRO stage.
        models: The state of the model of each rank; at stages 1 and 2, of all ranks together.
        optimizers: The state of ZeRO of each rank.
    """

    stage: int
    models: tuple[Mapping[str, Any], ...]
    optimizers: tuple[Mapping[str, Any], ...]

    @property
    def world(self) -> int:
        """W, the number of processes that wrote them."""
        return len(self.optimizers)

    @property
    def shapes(self) -> list[dict[str, torch.Size]]:
        """The shapes of parameters by name, for each group of flat tensors."""
        return [dict(group) for group in self.models[0]["param_shapes"]]

    @property
    def base(self) -> list[Mapping[str, Any]]:
        """The state of the user's optimizer on each rank, as of its ``state_dict``."""
        key = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        return [optimizer[key] for optimizer in self.optimizers]

    @property
    def group_of(self) -> list[int]:
        """The parameter group of the optimizer that each group of flat tensors belongs to."""
        counts = [len(group["params"]) for group in self.base[0]["param_groups"]]
        return [index for index, count in enumerate(counts) for _ in range(count)]

    def flat(self, piece: Piece) -> Mapping[str, Any]:
        """The flat tensors of a group on a rank, by state; ``fp32`` are the weights."""
        name = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        weights = self.optimizers[piece.rank][name][piece.group]
        return {"fp32": weights, **self.base[piece.rank]["state"].get(piece.group, {})}

    def pieces(self) -> Iterator[tuple[str, torch.Size, list[Piece]]]:
        """Each parameter with its pieces in order."""
        for group, shapes in enumerate(self.shapes):
            offset = 0
            for name, shape in shapes.items():
                if self.stage == 3:
                    # Every rank holds as many, the last of them padding.
                    part = -(-shape.numel() // self.world)
                    sizes = [max(0, min(part, shape.numel() - rank * part)) for rank in range(self.world)]
                    yield name, shape, [Piece(rank, group, offset, size) for rank, size in enumerate(sizes)]
                    offset += part
                else:
                    maps = [optimizer["param_slice_mappings"][group].get(name) for optimizer in self.optimizers]
                    yield name, shape, [Piece(r, group, m.start, m.numel) for r, m in enumerate(maps) if m is not None]

    def others(self) -> dict[str, Tensor]:
        """Tensors of the model that no optimizer steps: buffers and frozen parameters."""
        stepped = {name for shapes in self.shapes for name in shapes} | set(self.models[0].get("shared_params") or {})
        found = {name: tensor for name, tensor in (self.models[0]["module"] or {}).items() if name not in stepped}
        if self.stage == 3:
            # Of divided parameters, only an empty tensor is here.
            found = {name: tensor for name, tensor in found.items() if tensor.numel()}
            for name, shape in (self.models[0].get("frozen_param_shapes") or {}).items():
                parts = [model["frozen_param_fragments"][name].flatten() for model in self.models]
                # W pieces, the last of them padded -> (...)
                found[name] = torch.cat(parts)[: shape.numel()].view(shape)
        return found


def is_per_element(value: Any, weights: Tensor) -> bool:
    """Whether a state of the optimizer has a number for each weight; some are padded."""
    return isinstance(value, Tensor) and value.dim() == 1 and value.numel() >= weights.numel()


def _rank_of(path: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_mp_rank_", path.name)
    return int(found.group(1)) if found else 0


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False, mmap=True)


def read_shards(folder: Path) -> Shards:
    """Opens the shards in a folder.

    Raises:
        FileNotFoundError: If there are none.
    """
    optimizers = sorted(folder.glob("*_optim_states.pt"), key=_rank_of)
    models = sorted(folder.glob("zero_pp_rank_*_model_states.pt"), key=_rank_of) or sorted(
        folder.glob("mp_rank_*_model_states.pt")
    )
    if not optimizers or not models:
        raise FileNotFoundError(f"no shards of an optimizer in {folder}")
    states = [_load(path)["optimizer_state_dict"] for path in optimizers]
    # The optimizer of bfloat16 at stage 1 does not say.
    stage = int(states[0].get("zero_stage", 1))
    return Shards(stage, tuple(map(_load, models)), tuple(states))


def layout(zero: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a DeepSpeed config's ``zero_optimization`` that order the numbers of shards, without defaults."""
    stage = zero.get("stage")
    names = ("sub_group_size",) if stage == 3 else ("round_robin_gradients", "parameter_alignment")
    chosen = {name: zero.get(name, _LAYOUT[name]) for name in names}
    return {name: value for name, value in chosen.items() if value != _LAYOUT[name]}


def precision_of(config: Mapping[str, Any]) -> str:
    """The precision that a DeepSpeed config asks for: ``"32"``, ``"bf16"`` or ``"16"``."""
    for name, short in (("bf16", "bf16"), ("fp16", "16")):
        if (config.get(name) or {}).get("enabled"):
            return short
    return "32"


def divided_by(config: Mapping[str, Any]) -> tuple[int, str, dict[str, Any]]:
    """Stage, precision and layout of the shards that an engine with a config writes."""
    zero = config.get("zero_optimization") or {}
    return int(zero.get("stage", 0)), precision_of(config), layout(zero)


def described(folder: Path) -> tuple[int, int, str, dict[str, Any]]:
    """World size, stage, precision and layout of the shards in a folder."""
    shards = read_shards(folder)
    config = shards.models[0].get("ds_config") or {}
    return shards.world, *divided_by(config if isinstance(config, Mapping) else {})


def client_state(folder: Path) -> dict[str, Any]:
    """What Lightning saved beside weights and optimizer."""
    models = sorted(folder.glob("*_model_states.pt"), key=_rank_of)
    state = _load(models[0])
    return {key: value for key, value in state.items() if key not in ("module", "optimizer", "lr_scheduler")}


def frozen_names(folder: Path) -> frozenset[str]:
    """The parameters that were saved as frozen ones."""
    models = sorted(folder.glob("*_model_states.pt"), key=_rank_of)
    return frozenset(_load(models[0]).get("frozen_param_shapes") or ()) if models else frozenset()


def whole(shards: Shards, shape: torch.Size, pieces: list[Piece], key: str) -> Tensor:
    """One state of a parameter, joined from its pieces.

    Raises:
        ValueError: If pieces are missing.
    """
    parts = [shards.flat(piece)[key].narrow(0, piece.start, piece.size) for piece in pieces]
    # Pieces in order -> (...)
    joined = torch.cat(parts)
    if joined.numel() != math.prod(shape):
        raise ValueError(f"{joined.numel()} numbers for a parameter of shape {tuple(shape)}")
    return joined.view(shape)
