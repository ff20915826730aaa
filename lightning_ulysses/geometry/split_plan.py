"""Reads and checks a plan: where inside a model the sequence is split and joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.joint import ONLY_OUTPUT, PADDED, Halo, Joined, Joint

# Name or index of an input -> the dimension that carries the sequence; None for the only one of the right length.
Dims = Mapping[str, int | None]


@dataclass(frozen=True)
class SequencePlan:
    """Where a model is split along the sequence, where it is joined, and what inside runs on more than its slice.

    Submodules are named by patterns. A pattern consists of parts between dots, and each part may hold ``*`` and ``?``.
    Patterns are relative to a model anywhere below the LightningModule: ``transformer.h.*`` matches
    ``self.gpt.transformer.h.0``. All patterns of a plan are relative to the same model.

    Attributes:
        split: For each submodule the inputs that carry the sequence, by parameter name or position, with their
            dimension. The first of these submodules to be called begins the region in which each rank holds its slice.
            A dimension of ``None`` stands for the only one that is as long as the sequence. Empty where the batch is
            cut, and only `joints` are said.
        join: For each submodule the outputs that carry the sequence, by index or key, with their dimension. ``""``
            stands for an output that is one tensor. The region ends there. Without ``join``, it ends with the step.
        local: Submodules inside a region whose attention is plain, because its keys are whole on every rank. An example
            is cross-attention to a text.
        whole: Keys of the batch (or indices of a tuple, as strings) that every rank gets whole. With ``join``, every
            rank gets the whole batch.
        cross: For each submodule the inputs that carry another sequence, of a length of its own, such as what an
            encoder returns. They are cut as well, and attention exchanges heads of keys and values cut so.
        both: For each submodule the inputs that belong to both sequences, such as positions of a text and an image
            that attend to each other: one tensor as long as both, or one for each.
        cross_first: Whether those of ``cross`` stand before those of ``split`` where attention joins both.
        joints: Submodules inside a region in which tokens meet outside of attention, with how each of them runs.
        is_family: Whether the plan fits several models. Patterns and inputs that a model lacks are then ignored.
        is_absolute: Whether patterns are relative to the LightningModule itself.
        is_divided: Whether what follows the join sees whole sequences and computes slices of them; see `divided`.
    """

    split: Mapping[str, Dims]
    join: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    local: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    cross: Mapping[str, Dims] = field(default_factory=dict)
    both: Mapping[str, Dims] = field(default_factory=dict)
    cross_first: bool = True
    joints: Mapping[str, Joint] = field(default_factory=dict)
    is_family: bool = False
    is_absolute: bool = False
    is_divided: bool = False

    def __post_init__(self) -> None:
        if not self.split and not self.joints:
            raise _error("nothing to split", "name at least one submodule and its inputs under split")
        if not self.split and (self.join or self.local or self.whole):
            raise _error("nothing to split", "drop join, local and keys under whole: the batch is cut")
        # With a join every rank gets the whole batch, so there is nothing to list.
        if self.join and self.whole:
            raise _error(
                "both join and whole", "drop whole: where the sequence is joined again, every rank gets the whole batch"
            )
        if self.is_divided and not self.join:
            raise _error("divided and no join", "drop divided: nothing is joined that could stay divided")
        if self.split and not self.join and not self.whole:
            raise _error(
                "neither join nor whole, so that the model would get a batch that is cut already",
                "join the output, or name the model's inputs under whole and take the loss of each rank's slice",
            )


_LITGPT: dict[str, Dims] = {"transformer.h.*": {"x": 1, "cos": -2, "sin": -2}}
# Inputs of the blocks of many diffusers models: tokens, and position embeddings of various shapes.
_BLOCK: Dims = {
    "hidden_states": 1,
    "rotary_emb": None,
    "image_rotary_emb": None,
    "rotary_embedding": None,
}

SHIPPED: dict[str, SequencePlan] = {
    "litgpt": SequencePlan(_LITGPT, {"lm_head": {ONLY_OUTPUT: 1}}),
    "litgpt_unjoined": SequencePlan(_LITGPT, whole=("input_ids", "0")),
    "diffusers": SequencePlan(
        {"transformer_blocks.*": _BLOCK, "blocks.*": _BLOCK},
        {"proj_out": {ONLY_OUTPUT: 1}, "proj_out_2": {ONLY_OUTPUT: 1}},
        # attn2 is the cross-attention to the text, whose keys every rank holds whole.
        local=("transformer_blocks.*.attn2", "blocks.*.attn2"),
        is_family=True,
    ),
}

_KEYS = {"split", "cross", "both", "cross_first", "join", "local", "whole", "halo", "divided"}
_FORM = (
    "{'split': {submodule: {input: dim}}, 'cross': {submodule: {input: dim}}, 'both': {submodule: {input: dim}}, "
    "'cross_first': bool, 'join': {submodule: dim}, 'local': [submodule], 'whole': [batch key] or "
    "{submodule: {input: dim}}, 'halo': {submodule: dim}, 'divided': bool}"
)


def _error(got: str, fix: str) -> UlyssesError:
    return UlyssesError(f"a plan with {got}", f"the name of a shipped plan, {sorted(SHIPPED)}, or {_FORM}", fix)


def read_plan(plan: str | Mapping[str, Any] | SequencePlan | None) -> SequencePlan | None:
    """Turns the strategy's argument ``plan`` into a `SequencePlan`.

    Args:
        plan: None, the name of a shipped plan, or a mapping with ``split`` and ``join``, ``local`` or ``whole``, such
            as one from YAML. ``whole`` is a list of keys of the batch, or a mapping: from submodules that run on the
            joined sequence to their inputs, and from keys of the batch to None. ``halo`` names convolutions and
            poolings of stride 1 with the dimension of the sequence.

    Raises:
        UlyssesError: If it is none of these, or contradicts itself.
    """
    if plan is None or isinstance(plan, SequencePlan):
        return plan
    if isinstance(plan, str):
        if plan not in SHIPPED:
            raise _error(f"the name {plan!r}", "change the name")
        return SHIPPED[plan]
    if not isinstance(plan, Mapping):
        raise _error(f"the value {plan!r}", "write a mapping")
    unknown = sorted(set(map(str, plan)) - _KEYS)
    if unknown:
        raise _error(f"the keys {unknown}", f"drop or rename {unknown[0]!r}")
    return SequencePlan(
        split={name: _dims("split", name, dims) for name, dims in _mapping("split", plan.get("split")).items()},
        join={name: _outputs(name, dims) for name, dims in _mapping("join", plan.get("join")).items()},
        local=_names("local", plan.get("local")),
        whole=_batch_keys(plan.get("whole")),
        cross={name: _dims("cross", name, dims) for name, dims in _mapping("cross", plan.get("cross")).items()},
        both={name: _dims("both", name, dims) for name, dims in _mapping("both", plan.get("both")).items()},
        cross_first=_flag("cross_first", plan.get("cross_first", True)),
        joints=_joints(plan.get("whole"), plan.get("halo")),
        is_divided=_flag("divided", plan.get("divided", False)),
    )


def _batch_keys(value: Any) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        return tuple(str(name) for name, dims in value.items() if dims is None)
    return _names("whole", value)


def _joints(whole: Any, halo: Any) -> dict[str, Joint]:
    joined = whole if isinstance(whole, Mapping) else {}
    found: dict[str, Joint] = {str(name): _joined(str(name), dims) for name, dims in joined.items() if dims is not None}
    return {**found, **{name: _halo(name, value) for name, value in _mapping("halo", halo).items()}}


def _joined(name: str, value: Any) -> Joined:
    if isinstance(value, Mapping) and set(value) == {"inputs", "outputs"}:
        outputs = value["outputs"]
        given = {ONLY_OUTPUT: outputs} if type(outputs) is int else _dims("whole", name, outputs)
        return Joined(_dims("whole", name, value["inputs"]), given)
    return Joined(_dims("whole", name, value))


def _halo(name: str, value: Any) -> Halo:
    given = value if isinstance(value, Mapping) else {"dim": value}
    if type(given.get("dim")) is not int or set(given) - {"dim", "padded"}:
        raise _error(f"halo[{name!r}]={value!r}", "give the dimension of the sequence, such as 2 for (B, C, S)")
    padded = given.get("padded", "before")
    if padded not in PADDED:
        raise _error(f"padded={padded!r} in halo[{name!r}]", f"write one of {list(PADDED)}")
    return Halo(given["dim"], padded)


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _error(f"{key}={value!r}", f"write {key} as a mapping from names of submodules")
    return {str(name): entry for name, entry in value.items()}


def _dims(key: str, name: str, value: Any) -> dict[str, int]:
    # type() and not isinstance(): True is an int for isinstance.
    good = isinstance(value, Mapping) and value and all(type(dim) is int for dim in value.values())
    if not good:
        raise _error(f"{key}[{name!r}]={value!r}", "give each of them its dimension, such as {hidden_states: 1}")
    return {str(part): dim for part, dim in value.items()}


def _outputs(name: str, value: Any) -> dict[str, int]:
    return {ONLY_OUTPUT: value} if type(value) is int else _dims("join", name, value)


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _error(f"{key}={value!r}", f"write {key} as true or false")
    return value


def _names(key: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    # A string is a sequence too, of letters.
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _error(f"{key}={value!r}", f"write {key} as a list")
    return tuple(map(str, value))
