"""Calls a tokenizer, of transformers or of the user's own, for one text or for many."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from lightning_ulysses.errors import UlyssesError

# Texts on which two ways to call a tokenizer are compared, and by which its behaviour is known.
PROBES = (
    "The 3 quick-brown foxes; naïve café «Ωμέγα» 你好, мир!",
    "\t def f(x_1):  return  x_1 + 0.25 \r\n\n 🙂\u00a0e\u0301",
    "<s> </s> <|endoftext|> [CLS] [SEP] <unk>",
    "AbstractSingletonProxyFactoryBean 1234567 aaaaaaaaaaaaaaaa",
)
_SETTINGS = ("add_special_tokens", "verbose")


def load_tokenizer(tokenizer: Any) -> Any:
    """Loads a tokenizer from its name or path. Any other callable is taken for a tokenizer.

    Raises:
        UlyssesError: If it is neither.
    """
    if isinstance(tokenizer, str):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(tokenizer)
    if not callable(tokenizer):
        raise UlyssesError(
            f"a tokenizer of type {type(tokenizer).__name__}",
            "the name or path of a transformers tokenizer, or the tokenizer itself",
            "set tokenizer='name', or pass AutoTokenizer.from_pretrained(...)",
        )
    return tokenizer


class TextEncoder:
    """Turns texts into token ids, without truncation and padding.

    Args:
        tokenizer: A transformers tokenizer, or a function of a text that returns ids, or a mapping with ``input_ids``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer}

    @cached_property
    def _accepted(self) -> frozenset[str]:
        """The settings that the tokenizer takes."""
        try:
            parameters = inspect.signature(self.tokenizer).parameters
        except (TypeError, ValueError):
            return frozenset()
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return frozenset(_SETTINGS)
        return frozenset(_SETTINGS) & set(parameters)

    def one(self, text: str, special: bool = True) -> list[int]:
        """The ids of one text.

        Args:
            text: The text.
            special: Whether the tokenizer adds the special tokens of a whole text.

        Raises:
            UlyssesError: If the tokenizer returns no ids of one text.
        """
        settings = {"add_special_tokens": special, "verbose": False}
        found = self.tokenizer(text, **{key: settings[key] for key in _SETTINGS if key in self._accepted})
        if isinstance(found, Mapping):
            found = found.get("input_ids")
        ids = found.tolist() if hasattr(found, "tolist") else found
        if not isinstance(ids, (list, tuple)) or not all(
            type(token) is int or hasattr(token, "__index__") for token in ids
        ):
            raise UlyssesError(
                f"a tokenizer that returns {str(found)[:80]} for {text[:40]!r}",
                "the ids of one text, or a mapping that holds them under 'input_ids'",
                "return a list of integers from the tokenizer",
            )
        return list(map(int, ids))

    @cached_property
    def _rust(self) -> Callable[..., Any] | None:
        """The tokenizer's own function for many texts, if it gives what `one` gives."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        function: Callable[..., Any] | None = getattr(backend, "encode_batch_fast", None)
        if function is None or not all(hasattr(backend, name) for name in ("no_truncation", "no_padding")):
            return None
        # A class of the user's own may change a text before it is encoded, or its ids.
        calls = [getattr(type(self.tokenizer), name, None) for name in ("__call__", "_encode_plus")]
        if any(not str(getattr(call, "__module__", "")).startswith("transformers.") for call in calls):
            return None
        for special in (True, False):
            # `one` first: transformers takes truncation and padding off when it is called.
            expected = [self.one(text, special) for text in PROBES]
            if [found.ids for found in function(list(PROBES), add_special_tokens=special)] != expected:
                return None
        return function

    def many(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """The ids of each text, as `one` gives them."""
        if not texts:
            return []
        # The first text goes both ways, which also takes truncation and padding off again.
        first, function = self.one(texts[0], special), self._rust
        if function is None:
            return [first, *(self.one(text, special) for text in texts[1:])]
        found = [encoding.ids for encoding in function(list(texts), add_special_tokens=special)]
        return found if found[0] == first else [first, *(self.one(text, special) for text in texts[1:])]
