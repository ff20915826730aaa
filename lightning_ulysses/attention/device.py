"""What the device of an attention call can do. Tests replace these functions to take a GPU's paths on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def is_gpu(tensor: Tensor) -> bool:
    """Whether CUDA's kernels compute on the tensor."""
    return tensor.device.type == "cuda"


def has_flash(tensor: Tensor) -> bool:
    """Whether flash attention takes the device and precision of a tensor: half precision on Ampere or newer."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return half and is_gpu(tensor) and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
