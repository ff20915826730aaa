"""One file of weights from a sharded checkpoint, for programs without DeepSpeed and this package."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lightning_ulysses.errors import UlyssesError


def load_weights(checkpoint: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """The whole float32 weights of a checkpoint directory of any ZeRO stage, on the CPU.

    Args:
        checkpoint: The directory that the Trainer saved.
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

    Args:
        checkpoint: The directory that the Trainer saved.
        output: The file to write.
        prefix: See `load_weights`.
    """
    weights = load_weights(checkpoint, prefix)
    if Path(output).suffix == ".safetensors":
        from safetensors.torch import save_file

        # safetensors refuses tensors that share memory, such as tied weights.
        save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()}, output, {"format": "pt"})
    else:
        torch.save(weights, output)
