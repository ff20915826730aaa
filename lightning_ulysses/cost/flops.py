"""What a model computes per token and per pair of tokens, and what a device could."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_ulysses.cost.model import CostModel
from lightning_ulysses.errors import UlyssesError

Number = TypeVar("Number", float, Tensor)

# Dense bf16 operations per second, from the data sheets of NVIDIA: the first pattern that the name matches counts.
# Names of SXM boards do not say so: "NVIDIA H100 80GB HBM3".
_PEAKS = (
    (r"H100 PCIe", 756e12),
    (r"H100 NVL", 835e12),
    (r"H200 NVL", 835e12),
    (r"\b(GH200|H200|H100|H800)\b", 989e12),
    (r"\bB200\b", 2250e12),
    (r"\bH20\b", 148e12),
    (r"\b(A100|A800)\b", 312e12),
    (r"\bA30\b", 165e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
)


@dataclass(frozen=True)
class ModelOperations:
    """Operations of one forward and backward pass; a multiplication and an addition are two.

    Attributes:
        per_token: Operations per token.
        per_pair: Operations per token and token of its document; 0 where attention is not counted.
        heads: Query heads; 0 where unknown.
    """

    per_token: float
    per_pair: float = 0.0
    heads: int = 0

    def of(self, tokens: Number, pairs: Number) -> Number:
        """Operations for so many tokens, whose documents' squared lengths add up to ``pairs``."""
        return self.per_token * tokens + self.per_pair * pairs


def _is_causal(module: nn.Module) -> bool:
    """False where every attention layer says that it is not causal, as those of an encoder do."""
    said = {layer.is_causal for layer in module.modules() if isinstance(getattr(layer, "is_causal", None), bool)}
    return said != {False}


def model_operations(module: nn.Module) -> ModelOperations:
    """What training a module computes: three times the forward pass, two of them backward.

    With the config of a transformers model inside, layers, head and attention are counted as those of a dense
    transformer with gated MLPs; attention by documents, and half of it where it is causal. Without one, six operations
    per parameter and token are, and attention is not counted.

    Args:
        module: The module, sharded by ZeRO-3 or whole.
    """
    for part in module.modules():
        config: Any = getattr(part, "config", None)
        try:
            cost = CostModel.from_config(config, causal=_is_causal(part))
        except UlyssesError:
            continue
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return ModelOperations(3 * cost.per_token, 3 * cost.per_pair, int(getattr(text, "num_attention_heads", 0)))
    # ZeRO-3 leaves an empty tensor in place of a parameter and its size beside it.
    return ModelOperations(6.0 * sum(int(getattr(p, "ds_numel", p.numel())) for p in module.parameters()))


def peak_of_name(name: str) -> float | None:
    """Dense bf16 operations per second of a GPU, by the name that CUDA gives it; None if it is not in the table."""
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, name)), None)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations per second of a device; None where unknown, as for every CPU."""
    return peak_of_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
