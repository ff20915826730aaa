"""Operations of a model per token and per pair of tokens, and the peak rate of a device."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_ulysses.cost.model import CostModel
from lightning_ulysses.errors import UlyssesError

Number = TypeVar("Number", float, Tensor)

# Dense bf16 operations per second, from the data sheets of NVIDIA. The first pattern that matches the name counts.
# Names of SXM boards do not contain "SXM": "NVIDIA H100 80GB HBM3".
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
    """Operations of one forward and backward pass. A multiplication and an addition count as two.

    Attributes:
        per_token: Operations per token.
        per_pair: Operations per pair of tokens of one document, of which it has length ** 2. 0 if attention is not
            counted.
        heads: Query heads; 0 if unknown.
    """

    per_token: float
    per_pair: float = 0.0
    heads: int = 0

    def of(self, tokens: Number, pairs: Number) -> Number:
        """Operations for ``tokens`` tokens; ``pairs`` is the sum of their documents' squared lengths."""
        return self.per_token * tokens + self.per_pair * pairs


def _is_causal(module: nn.Module) -> bool:
    """False if every attention layer says that it is not causal, as in an encoder."""
    said = {layer.is_causal for layer in module.modules() if isinstance(getattr(layer, "is_causal", None), bool)}
    return said != {False}


def model_operations(module: nn.Module) -> ModelOperations:
    """The operations of training a module: three times those of the forward pass, since the backward takes two.

    If the module contains a transformers model, its config gives the sizes. Layers and head are counted as in a dense
    transformer with gated MLPs. Attention is counted by document lengths, and halved if it is causal. Without a config,
    six operations per parameter and token are counted, and attention is not.

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
    # ZeRO-3 leaves an empty tensor in place of a parameter, and stores its size in ds_numel.
    return ModelOperations(6.0 * sum(int(getattr(p, "ds_numel", p.numel())) for p in module.parameters()))


def peak_of_name(name: str) -> float | None:
    """Dense bf16 operations per second of a GPU, by its name in CUDA; None if the table lacks it."""
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, name)), None)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations per second of a device; None if unknown, as for every CPU."""
    return peak_of_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
