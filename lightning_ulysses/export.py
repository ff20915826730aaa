"""Weights of a sharded checkpoint: in one file for other programs, and those that hooks saved in place of others."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ulysses.errors import UlyssesError

#: Under it, a sharded checkpoint holds weights that callbacks or the module put in place of the trained ones.
REPLACED = "ulysses_state_dict"


def keep_replaced(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Keeps the ``state_dict`` of a checkpoint if hooks replaced any of its weights, such as by their averages.

    Lightning's DeepSpeedStrategy drops it, since DeepSpeed saves the trained weights by itself.
    """
    trained, found = module.state_dict(), checkpoint.get("state_dict") or {}
    if any(trained[name].data_ptr() != tensor.data_ptr() for name, tensor in found.items() if name in trained):
        checkpoint[REPLACED] = found


def restore_replaced(checkpoint: dict[str, Any]) -> None:
    """Gives a checkpoint the ``state_dict`` back that was kept."""
    if REPLACED in checkpoint:
        checkpoint["state_dict"] = checkpoint.pop(REPLACED)


def load_weights(checkpoint: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """The whole float32 weights of a checkpoint directory of any ZeRO stage, on the CPU.

    Of a run with a callback that averages weights, these are the averages.

    Args:
        checkpoint: The directory that the Trainer saved. Only a trusted one: it is unpickled, which can run any code.
        prefix: Selects the weights whose names begin with it, and removes it from them. ``"model."`` selects those of
            ``self.model``.

    Raises:
        UlyssesError: If the directory is not such a checkpoint, or no name begins with ``prefix``.

    Source:
        DeepSpeed ``utils/zero_to_fp32.py``.
    """
    if not (Path(checkpoint) / "checkpoint").is_dir():
        raise UlyssesError(
            f"{str(checkpoint)!r}, which holds no sharded checkpoint",
            "a directory that a Trainer with this strategy saved, with a folder 'checkpoint' inside",
            "pass the path that ModelCheckpoint or Trainer.save_checkpoint wrote",
        )
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), "checkpoint")
    # Also averages that a callback saved in place of the trained weights.
    for file in (Path(checkpoint) / "checkpoint").glob("mp_rank_00_model_states.pt"):
        state = torch.load(file, map_location="cpu", weights_only=False, mmap=True)
        # At stage 1, DeepSpeed's function leaves out what is frozen.
        for name, tensor in (state.get("module") or {}).items():
            weights.setdefault(name, tensor.float())
        replaced = state.get(REPLACED, {})
        weights.update({name: tensor.float() for name, tensor in replaced.items() if name in weights})
    chosen = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    if not chosen:
        raise UlyssesError(
            f"prefix {prefix!r}, with which none of the weights {sorted(weights)[:4]}... begins",
            "a prefix of the names of weights",
            "use the name of the attribute that holds the model, followed by a dot",
        )
    return chosen


def export_weights(checkpoint: str | Path, output: str | Path, prefix: str = "") -> None:
    """Writes the result of `load_weights` to one file: safetensors if ``output`` ends so, else ``torch.save``.

    Tied weights are written once. In safetensors, where names cannot share a tensor, the metadata say which name stands
    for another, as Hugging Face does; ``safetensors.torch.load_model`` ties them again.

    Args:
        checkpoint: The directory that the Trainer saved. Only a trusted one: it is unpickled, which can run any code.
        output: The file to write.
        prefix: See `load_weights`.

    Raises:
        UlyssesError: See `load_weights`; or if safetensors is not installed.
    """
    is_safe = Path(output).suffix == ".safetensors"
    if is_safe and find_spec("safetensors") is None:
        raise UlyssesError(
            f"output {str(output)!r} without the package safetensors",
            "the package that writes such files",
            "pip install safetensors, or write to a name that ends with .pt",
        )
    weights = load_weights(checkpoint, prefix)
    if not is_safe:
        # Names that share a tensor share it in the file as well.
        torch.save(weights, output)
        return
    from safetensors.torch import save_file

    kept, metadata, first = {}, {"format": "pt"}, dict[object, str]()
    for name, tensor in weights.items():
        place = tensor.data_ptr(), tensor.shape, tensor.stride()
        standing = first.setdefault(place, name) if tensor.numel() else name
        if standing == name:
            # safetensors refuses parts of a larger tensor.
            kept[name] = tensor.clone().contiguous()
        else:
            metadata[name] = standing
    save_file(kept, output, metadata)
