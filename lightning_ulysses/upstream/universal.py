"""Writes and loads DeepSpeed's universal checkpoints, of any optimizer and for any ZeRO stage.

The files are those of DeepSpeed's own converter (``checkpoint/ds_to_universal.py``). That one, and the loading of
stage 3 (``zero/stage3.py``), know the states of Adam only, and each stage only its own. So both are done here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ulysses.upstream.shards import Shards, is_per_element, read_shards, whole

# The key under which a file holds its tensor.
_PARAM = "param"
# Of the state of ZeRO, what is not divided.
_GLOBAL = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad", "ds_version")
_OWN = "ulysses"
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def write_universal(source: Path, target: Path, track: Callable[[list[Any]], Iterable[Any]]) -> None:
    """Writes the state of the shards in ``source`` to the folder ``target``, one parameter after the other.

    Args:
        source: The folder with shards.
        target: An empty folder.
        track: Goes through a list, and shows how far it is.
    """
    shards = read_shards(source)
    for name, shape, pieces in track(list(shards.pieces())):
        folder = target / "zero" / name
        folder.mkdir(parents=True)
        first = shards.flat(pieces[0])
        for key, value in first.items():
            if is_per_element(value, first["fp32"]):
                torch.save({_PARAM: whole(shards, shape, pieces, key).clone()}, folder / f"{key}.pt")
            elif key == "step":
                torch.save(value, folder / "step.pt")
    torch.save(_common(shards), target / "zero" / "optimizer_state.pt")
    model = {key: value for key, value in shards.models[0].items() if not key.startswith("frozen_param")}
    model["module"] = {name: tensor.clone() for name, tensor in shards.others().items()}
    # The name at stages 1 and 2, and that at stage 3.
    first_name, second_name = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save(model, target / first_name)
    try:
        os.link(target / first_name, target / second_name)
    except OSError:
        shutil.copyfile(target / first_name, target / second_name)


def _common(shards: Shards) -> dict[str, Any]:
    """What the optimizer holds beside tensors of the size of parameters."""
    optimizer, base = shards.optimizers[0], shards.base[0]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in base["param_groups"]]
    scalars: dict[int, dict[str, Any]] = {}
    members: list[list[str]] = [[] for _ in groups]
    for index, names in enumerate(shards.shapes):
        members[shards.group_of[index]] += names
        state = base["state"].get(index, {})
        scalars[shards.group_of[index]] = {
            key: value for key, value in state.items() if not (isinstance(value, Tensor) and value.dim() == 1)
        }
    groups = [{**group, "params": []} for group in groups]
    return {
        **{key: optimizer[key] for key in _GLOBAL if key in optimizer},
        "ds_version": shards.models[0].get("ds_version"),
        "param_groups": groups,
        # As DeepSpeed reads it at stage 3.
        "optimizer_state_dict": {"state": scalars, "param_groups": groups},
        _OWN: {"members": members, "scalars": scalars},
    }


def load_universal(engine: Any, folder: Path) -> dict[str, Any]:
    """Loads weights and optimizer state into an engine of any world and stage; a collective.

    Args:
        engine: DeepSpeed's, for training.
        folder: From `write_universal`.

    Returns:
        What Lightning saved beside weights and optimizer.

    Raises:
        ValueError: If parameters or their groups are others, or the optimizer's state is on a disk.
    """
    optimizer = engine.optimizer
    if getattr(optimizer, "swap_optimizer", False):
        raise ValueError("optimizer state that is offloaded to a disk")
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()
    common = torch.load(folder / "zero" / "optimizer_state.pt", map_location="cpu", weights_only=False)
    groups = list(_groups(engine))
    _check_members(groups, common[_OWN]["members"], engine.param_names)
    with torch.no_grad():
        for index, flat, places in groups:
            _fill(optimizer.optimizer.state, flat, places, folder / "zero", engine.param_names)
            for key, value in common[_OWN]["scalars"].get(index, {}).items():
                optimizer.optimizer.state[flat][key] = value.clone() if isinstance(value, Tensor) else value
    for group, saved in zip(optimizer.optimizer.param_groups, common["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
    _load_scaler(optimizer, common)
    _spread(optimizer)
    model = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False, mmap=True)
    load_whole(engine.module, model["module"])
    for name in _COUNTERS:
        setattr(engine, name, model.get(name, 0))
    return {key: value for key, value in model.items() if key not in ("module", "optimizer", "lr_scheduler")}


# A parameter, where its part is among its own numbers, and where in the flat tensor: (parameter, first, start, size).
_Place = tuple[nn.Parameter, int, int, int]


def _groups(engine: Any) -> Iterator[tuple[int, Tensor, list[_Place]]]:
    """For each flat tensor of this rank: its parameter group, the tensor, and the places of parameters in it."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            places, start = [], 0
            for parameter in optimizer.fp16_groups[index]:
                group = getattr(parameter, "ds_process_group", None)
                part = parameter.ds_tensor.ds_numel
                first = part * dist.get_rank(group)
                places.append((parameter, first, start, max(0, min(part, parameter.ds_numel - first))))
                start += part
            yield optimizer.sub_group_to_group_id[index], flat, places
        return
    names = ("bit16_groups", "single_partition_of_fp32_groups")
    if hasattr(optimizer, "bf16_groups"):
        names = ("bf16_groups", "fp32_groups_flat_partition")
    for index, flat in enumerate(getattr(optimizer, names[1])):
        places = []
        for parameter in getattr(optimizer, names[0])[index]:
            mapping = parameter._hp_mapping
            if mapping is None:
                places.append((parameter, 0, 0, 0))
                continue
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            places.append((parameter, here.start, there.start, there.numel))
        yield index, flat, places


def _fill(state: Any, flat: Tensor, places: list[_Place], folder: Path, names: Mapping[nn.Parameter, str]) -> None:
    filled = {"fp32": flat}
    for parameter, first, start, size in places:
        files = sorted((folder / names[parameter]).glob("*.pt"))
        for file in files:
            key = file.stem
            if key == "step":
                continue
            if key not in filled:
                filled[key] = state[flat][key] = torch.zeros_like(flat)
            if not size:
                continue
            tensor = torch.load(file, map_location="cpu", weights_only=False, mmap=True)[_PARAM]
            if tensor.numel() != getattr(parameter, "ds_numel", parameter.numel()):
                raise ValueError(f"{names[parameter]} of shape {tuple(tensor.shape)}")
            # (...) -> (size,)
            filled[key].narrow(0, start, size).copy_(tensor.flatten().narrow(0, first, size))


def _check_members(groups: list[Any], saved: list[list[str]], names: Mapping[nn.Parameter, str]) -> None:
    found: list[list[str]] = [[] for _ in range(max(len(saved), 1 + max(index for index, _, _ in groups)))]
    for index, _, places in groups:
        found[index] += [names[parameter] for parameter, *_ in places]
    for index, have in enumerate(found):
        want = saved[index] if index < len(saved) else []
        if set(have) != set(want):
            other = sorted(set(have) ^ set(want))
            raise ValueError(f"parameter group {index} of the optimizer, which differs by {other[:4]}")


def _load_scaler(optimizer: Any, common: Mapping[str, Any]) -> None:
    # That of another precision scales by other rules.
    if type(common.get("loss_scaler")) is type(getattr(optimizer, "loss_scaler", None)):
        for key in ("loss_scaler", "dynamic_loss_scale", "overflow"):
            if key in common and hasattr(optimizer, key):
                setattr(optimizer, key, common[key])


def _spread(optimizer: Any) -> None:
    """Carries the weights of the optimizer into the module, on all ranks."""
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        if hasattr(optimizer, "_link_all_hp_params"):
            optimizer._link_all_hp_params()
        optimizer.update_lp_params()
    else:
        for index, weights in enumerate(optimizer.fp32_partitioned_groups_flat):
            mine = optimizer.fp16_partitioned_groups_flat[index]
            if weights.numel():
                mine.data.copy_(weights.data)
            updated = optimizer.unflatten(mine, optimizer.fp16_partitioned_groups[index])
            for part, values in zip(optimizer.fp16_partitioned_groups[index], updated, strict=True):
                part.data = values.data
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()


def read_universal(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole weights, buffers and frozen parameters, and what Lightning saved beside them."""
    model = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    tensors = dict(model.pop("module"))
    for file in (folder / "zero").rglob("fp32.pt"):
        tensors[file.parent.name] = torch.load(file, map_location="cpu", weights_only=False)[_PARAM]
    return tensors, model


def load_whole(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies whole tensors into buffers and parameters by name, also into parameters that ZeRO-3 divides."""
    from deepspeed.runtime.zero import GatheredParameters

    buffers = dict(module.named_buffers())
    for name, parameter in module.named_parameters():
        if name not in tensors:
            continue
        is_divided = hasattr(parameter, "ds_id")
        with torch.no_grad(), GatheredParameters([parameter], modifier_rank=0, enabled=is_divided):
            if not is_divided or dist.get_rank() == 0:
                parameter.copy_(tensors[name])
    for name in buffers.keys() & tensors.keys():
        buffers[name].copy_(tensors[name])
