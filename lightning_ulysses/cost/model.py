"""The cost of training on a pack of documents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_ulysses.errors import UlyssesError

_SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class CostModel:
    """The cost of a pack: ``per_token * tokens + per_pair * sum(length ** 2)`` over its documents.

    Only the ratio of the two matters. The default is that of a dense transformer with a hidden size of 4096 and causal
    attention. Each of its layers does 24 * hidden**2 operations per token, and 2 * hidden per pair of tokens of one
    document.

    Args:
        per_token: Operations per token, in any unit.
        per_pair: Operations per pair of tokens of one document, in the same unit. A document has length ** 2 pairs.

    Raises:
        UlyssesError: If one is negative or not finite, or both are 0.
    """

    per_token: float = 1.0
    per_pair: float = 1.0 / (12 * 4096)

    def __post_init__(self) -> None:
        costs: tuple[object, ...] = (self.per_token, self.per_pair)
        numbers = all(isinstance(cost, Real) and 0 <= float(cost) < math.inf for cost in costs)
        if not numbers or not any(costs):
            raise UlyssesError(
                f"a cost model with per_token={self.per_token!r} and per_pair={self.per_pair!r}",
                "finite numbers, not negative and not both 0",
                "leave the cost model out, or make one with CostModel.from_config(model.config)",
            )

    @classmethod
    def from_config(cls, config: Any, *, causal: bool = True) -> CostModel:
        """The cost of the forward pass of a dense transformer with gated MLPs, in operations.

        Args:
            config: Anything with the sizes of a Hugging Face config as attributes.
            causal: Whether a token attends only to the tokens before it, which halves the work on pairs.

        Raises:
            UlyssesError: If a size is missing.
        """
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        missing = [name for name in _SHAPE if getattr(config, name, None) is None]
        if missing:
            raise UlyssesError(
                f"a {type(config).__name__} without {', '.join(missing)}",
                f"the model's {', '.join(_SHAPE)}",
                "give the cost directly, as CostModel(per_token=..., per_pair=...)",
            )
        hidden, layers, heads, vocab = (getattr(config, name) for name in _SHAPE)
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        weights = layers * (2 * hidden * head_dim * (heads + kv_heads) + 3 * hidden * inner) + hidden * vocab
        return cls(2.0 * weights, (2.0 if causal else 4.0) * layers * heads * head_dim)

    def of(self, tokens: NDArray[np.int64], pairs: NDArray[np.int64]) -> NDArray[np.float64]:
        """(packs,) the cost of packs; ``pairs`` (packs,) are the sums of their documents' squared lengths."""
        return self.per_token * tokens + self.per_pair * pairs
