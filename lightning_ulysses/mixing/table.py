"""What the arguments of each function carry, by the names of its parameters.

A letter stands for a dimension: b rows, s the sequence, h heads (or channels, each of which is scanned by itself), g
groups of heads, others what a head holds. H is a dimension that holds all heads one after another. An argument without
s is a parameter of heads, of which a rank uses its own. One with s and without h or g is shared by all heads.

Sources: `fla.ops`, `mamba_ssm.ops`, `causal_conv1d`; transformers ``models/*/modeling_*.py``, whose own functions have
the same arguments in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Operand:
    """One argument.

    Attributes:
        names: What it is called. The first name is that of messages.
        forms: The letters of its dimensions; several forms differ in their number.
    """

    names: tuple[str, ...]
    forms: tuple[str, ...]

    def dims(self, count: int) -> str | None:
        """The letters of a tensor with so many dimensions; None if there is no such form."""
        return next((form for form in self.forms if len(form) == count), None)


@dataclass(frozen=True)
class Mixer:
    """One function.

    Attributes:
        operands: The arguments, the first ones in the order in which callers pass them by position.
        like: The operand with the shape of what it returns.
        by_position: How many of the operands callers may pass by position.
        is_pair: Whether it returns its state as well, or None in the place of that.
        looks_back: Whether it is a causal convolution, whose weight (channels, k) looks back by k - 1 tokens.
    """

    operands: tuple[Operand, ...]
    like: str
    by_position: int
    is_pair: bool = False
    looks_back: bool = False

    def operand(self, name: str) -> Operand | None:
        """The operand that is called so."""
        return next((operand for operand in self.operands if name in operand.names), None)


#: Arguments that hand a state into or out of a call.
STATES = (
    "initial_state",
    "initial_states",
    "output_final_state",
    "return_final_states",
    "return_last_state",
    "return_varlen_states",
    "return_intermediate_states",
    "final_states_out",
    "cp_context",
)
#: For each token the number of its document, (B, S).
INDEX = "seq_idx"


def _mixer(like: str, positional: Mapping[str, str], named: Mapping[str, str] | None = None, **kinds: bool) -> Mixer:
    read = [Operand(tuple(names.split("|")), tuple(dims.split("|"))) for names, dims in positional.items()]
    more = [Operand(tuple(names.split("|")), tuple(dims.split("|"))) for names, dims in (named or {}).items()]
    return Mixer((*read, *more), like, len(read), **kinds)


_QKV = {"q|query": "bsgd", "k|key": "bsgd", "v|value": "bshd"}
_GATED = {**_QKV, "g": "bsh", "beta": "bsh"}
_GATES = {"g": "bsh", "gk": "bshd", "gv": "bshd", "beta": "bsh"}
_CHANNELS = {"g": "bshd", "beta": "bsh", "A_log": "h", "dt_bias": "H"}
_SPACE = {"x|hidden_states": "bshd", "dt": "bsh", "A": "h", "B": "bsgn", "C": "bsgn"}
_SELECTIVE = {"u|hidden_states": "bhs", "delta|dt": "bhs", "A": "hn", "B": "hn|bns|bgns", "C": "hn|bns|bgns"}

_GATED_RULE = _mixer("v", _GATED, {"A_log": "h", "dt_bias": "h"}, is_pair=True)
_GATED_STEPS = _mixer("v", _QKV, _GATES, is_pair=True)
_CHANNEL_RULE = _mixer("v", _QKV, _CHANNELS, is_pair=True)
_CHUNK_SCAN = _mixer("x", _SPACE, {"D": "h|hd", "z": "bshd", "dt_bias": "h"})
_SELECTIVE_SCAN = _mixer("u", _SELECTIVE, {"D": "h", "z": "bhs", "delta_bias": "h"})

#: By the names of functions: those of the kernels, and those of transformers for the same.
TABLE: Mapping[str, Mixer] = {
    "chunk_gated_delta_rule": _GATED_RULE,
    "torch_chunk_gated_delta_rule": _GATED_RULE,
    "fused_recurrent_gated_delta_rule": _GATED_STEPS,
    "torch_recurrent_gated_delta_rule": _GATED_STEPS,
    "chunk_kda": _CHANNEL_RULE,
    "fused_recurrent_kda": _CHANNEL_RULE,
    "chunk_kimi_delta_attention": _CHANNEL_RULE,
    "recurrent_kimi_delta_attention": _CHANNEL_RULE,
    "mamba_chunk_scan_combined": _CHUNK_SCAN,
    "mamba2_chunk_scan": _CHUNK_SCAN,
    "selective_scan_fn": _SELECTIVE_SCAN,
    "mamba_selective_scan": _SELECTIVE_SCAN,
    "causal_conv1d_fn": _mixer("x", {"x|hidden_states": "bcs"}, looks_back=True),
}


@dataclass(frozen=True)
class Fused:
    """A kernel of a convolution, a scan and what follows, which nothing can be exchanged inside of.

    Attributes:
        switch: What to set on the caller so that it calls functions of the table one by one.
    """

    switch: str


#: transformers' own ones return None where they are not there, and their callers call the others then.
FUSED: Mapping[str, Fused] = {
    "mamba_inner_fn": Fused("use_fast_path=False"),
    "mamba2_split_conv1d_scan_combined": Fused("use_mem_eff_path=False"),
    "mamba_split_conv1d_scan_combined": Fused("use_mem_eff_path=False"),
}
