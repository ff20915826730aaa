"""The settings of the strategy, checked before a run starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from lightning_ulysses.errors import UlyssesError, UlyssesValueError
from lightning_ulysses.geometry.batch_keys import BatchRules
from lightning_ulysses.geometry.split_plan import SequencePlan

# Keys of a DeepSpeed config that the strategy or the Trainer sets, with the setting to use instead.
_OWN_KEYS = {
    "gradient_accumulation_steps": "set Trainer(accumulate_grad_batches=...)",
    "train_batch_size": "leave it out; it follows from the dataloader",
    "mpu": "leave it out; the strategy builds the groups",
    "sequence_parallel_size": "set sp_size in the strategy",
    "data_parallel_size": "set dp_shard_size in the strategy",
    "tensor_parallel": "leave it out; tensor parallelism is not supported",
    "mesh_param": "leave it out; the strategy builds the groups",
}

#: Suffixes under which the strategy is registered, with the arguments that they stand for.
REGISTERED: Mapping[str, Mapping[str, Any]] = {
    "": {"stage": 2},
    **{f"_stage_{stage}": {"stage": stage} for stage in (1, 2, 3)},
    "_stage_3_offload": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
}


@dataclass(frozen=True)
class MemoryConfig:
    """Parts of a step that run a part at a time, or twice, or wait on the host; see ``docs/memory.md``.

    Attributes:
        tiled_loss: Whether cross entropies compute the logits of a head tile by tile; names of heads in place of True.
        tiled_mlp: Whether MLPs run on tiles and keep their input only; names of submodules in place of True.
        tiled_norm: The same for norms.
        tile_tokens: Tokens of a tile.
        tile_bytes: What a tile of a module may keep, or its logits in float32 may take. 256 MiB by default.
        head_chunks: In how many chunks each rank's heads are exchanged and attended; ``"auto"`` for one head at a time
            on the rank with the fewest.
        overlap: Whether the exchange of a chunk of heads runs beside the attention of the one before it.
        checkpoint: ``"block"`` keeps the inputs of the repeated blocks of a model and computes each block again in the
            backward; ``"block+attention"`` keeps the outputs of attention as well, which is then computed once.
        checkpoint_blocks: Names of the blocks; they are found by default.
        offload: ``"cpu"`` has what is kept of checkpointed blocks wait for the backward in host memory.
    """

    tiled_loss: bool | list[str] = False
    tiled_mlp: bool | list[str] = False
    tiled_norm: bool | list[str] = False
    tile_tokens: int | None = None
    tile_bytes: int | None = None
    head_chunks: int | Literal["auto"] = 1
    overlap: bool = False
    checkpoint: Literal["none", "block", "block+attention"] = "none"
    checkpoint_blocks: list[str] | None = None
    offload: Literal["none", "cpu"] = "none"

    def __post_init__(self) -> None:
        for name in ("tiled_loss", "tiled_mlp", "tiled_norm"):
            value = getattr(self, name)
            is_right = isinstance(value, bool) or _are_names(value)
            _require(is_right, name, value, "True, False or a list of names of submodules")
        for name in ("tile_tokens", "tile_bytes"):
            value = getattr(self, name)
            is_size = value is None or (type(value) is int and value >= 1)
            _require(is_size, name, value, "a positive whole number or None")
        if self.tile_tokens is not None and self.tile_bytes is not None:
            raise UlyssesError(
                f"tile_tokens={self.tile_tokens} and tile_bytes={self.tile_bytes}", "one of them", "drop tile_tokens"
            )
        self._check_heads()
        self._check_checkpoint()

    def _check_heads(self) -> None:
        count = self.head_chunks
        is_count = count == "auto" or (type(count) is int and count >= 1)
        _require(is_count, "head_chunks", count, "'auto' or a positive whole number, 1 for all heads at once")
        _require(isinstance(self.overlap, bool), "overlap", self.overlap, "True or False")
        if self.overlap and not self.cuts_heads:
            raise UlyssesError(
                "overlap=True with all heads at once",
                "chunks of heads, of which one can wait",
                "set head_chunks='auto'",
            )

    def _check_checkpoint(self) -> None:
        kinds, places = ("none", "block", "block+attention"), ("none", "cpu")
        _require(self.checkpoint in kinds, "checkpoint", self.checkpoint, f"one of {kinds}")
        _require(self.offload in places, "offload", self.offload, f"one of {places}")
        names = self.checkpoint_blocks
        is_right = names is None or _are_names(names)
        _require(is_right, "checkpoint_blocks", names, "a list of names of submodules, or None to find them")
        needing = [name for name, value in (("offload", self.offload != "none"), ("checkpoint_blocks", names)) if value]
        if needing and self.checkpoint == "none":
            raise UlyssesError(
                f"{needing[0]}={getattr(self, needing[0])!r} without checkpoint",
                "checkpointed blocks, whose inputs alone are kept",
                "set checkpoint='block' as well",
            )

    @property
    def is_on(self) -> bool:
        """Whether any part is asked for."""
        is_tiled = self.tiled_loss or self.tiled_mlp or self.tiled_norm
        return bool(is_tiled or self.cuts_heads or self.checkpoint != "none")

    @property
    def cuts_heads(self) -> bool:
        """Whether heads are to be computed in chunks."""
        return self.head_chunks != 1

    def rows(self, row_bytes: int) -> int:
        """Rows of a tile whose rows take ``row_bytes`` each."""
        return self.tile_tokens or max((self.tile_bytes or 256 * 2**20) // row_bytes, 1)


def are_sizes(value: object) -> bool:
    """Whether a value is P or the factors of P."""
    if isinstance(value, Mapping):
        return value.keys() == {"ulysses", "gather"} and all(type(size) is int and size >= 1 for size in value.values())
    return value == "auto" or (type(value) is int and value >= 1)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) and each for each in value)


def read_parts(given: MemoryConfig | Mapping[str, Any] | str | None) -> MemoryConfig | Literal["auto"]:
    """The argument ``memory`` of `UlyssesDeepSpeedStrategy`.

    Raises:
        UlyssesError: If it is none, or has keys that do not exist.
    """
    if given == "auto":
        return "auto"
    _require(not isinstance(given, str), "memory", given, "'auto', or a mapping such as {'tiled_loss': True}")
    assert not isinstance(given, str)
    return read_memory(given)


def read_memory(given: MemoryConfig | Mapping[str, Any] | None) -> MemoryConfig:
    """The parts that are named.

    Raises:
        UlyssesError: If it is none, or has keys that do not exist.
    """
    if isinstance(given, MemoryConfig):
        return given
    known = [each.name for each in fields(MemoryConfig)]
    is_right = given is None or (isinstance(given, Mapping) and all(key in known for key in given))
    unknown = [str(key) for key in given if key not in known] if isinstance(given, Mapping) else []
    near = [(key, *get_close_matches(key, known, 1)) for key in unknown]
    fix = ", ".join(f"write {pair[1]!r} for {pair[0]!r}" if pair[1:] else f"leave {pair[0]!r} out" for pair in near)
    _require(is_right, "memory", given, f"None, a MemoryConfig, or a mapping with some of {known}", fix)
    return MemoryConfig(**(given or {}))


@dataclass(frozen=True)
class UlyssesConfig:
    """The settings that are not DeepSpeed's. `UlyssesDeepSpeedStrategy` documents them."""

    sp_size: int | Literal["auto"] | Mapping[str, int] = "auto"
    dp_shard_size: int | None = None
    loss_weighting: Literal["tokens", "none"] = "tokens"
    check_model: bool = True
    split: Literal["auto", "batch", "blocks"] = "auto"
    targets: str | None = None
    rules: BatchRules = field(default_factory=BatchRules)
    plan: SequencePlan | None = None
    memory: MemoryConfig | Literal["auto"] = field(default_factory=MemoryConfig)

    def __post_init__(self) -> None:
        self._check_types()
        if not are_sizes(self.sp_size):
            raise UlyssesError(
                f"sp_size={self.sp_size!r}",
                "'auto', a positive number, or two whose product it is, such as {'ulysses': 8, 'gather': 4}",
                "change sp_size",
            )
        if self.loss_weighting not in ("tokens", "none"):
            raise UlyssesError(
                f"loss_weighting={self.loss_weighting!r}",
                "'tokens' (the loss is a mean over tokens) or 'none' (it is not)",
                "change loss_weighting",
            )
        if self.split not in ("auto", "batch", "blocks"):
            raise UlyssesError(
                f"split={self.split!r}",
                "'batch' (each rank gets its slice of the batch), 'blocks' (the model is split at its repeated blocks, "
                "and whole before and after them) or 'auto' (whichever gives the step of one process)",
                "change split",
            )
        if self.split != "auto" and self.plan is not None:
            raise UlyssesError(
                f"both split={self.split!r} and a plan", "one of them: a plan says itself where to split", "drop split"
            )
        multiple = self.rules.pad_to_multiple_of
        if multiple is not None and self.plan is not None and self.plan.split:
            raise UlyssesError(
                f"pad_to_multiple_of={multiple} with a plan",
                "no padding, which the part of the model before the split would attend to",
                "leave pad_to_multiple_of out; no multiple is required",
            )

    def _check_types(self) -> None:
        multiple, ignored = self.rules.pad_to_multiple_of, self.rules.ignore_index
        is_multiple = multiple is None or (type(multiple) is int and multiple >= 1)
        _require(is_multiple, "pad_to_multiple_of", multiple, "a positive whole number or None")
        _require(type(ignored) is int, "ignore_index", ignored, "a whole number, the label that counts as no target")
        is_key = self.targets is None or (isinstance(self.targets, str) and self.targets != "")
        _require(is_key, "targets", self.targets, "the key of a tensor of the batch, or None")
        _require(isinstance(self.check_model, bool), "check_model", self.check_model, "True or False")


def _require(is_right: bool, name: str, value: Any, expected: str, fix: str = "") -> None:
    if not is_right:
        raise UlyssesError(f"{name}={value!r}", expected, fix or f"change {name}")


def batch_rules(
    sequence_dims: Mapping[str, int | None] | None,
    pad_to_multiple_of: int | None,
    ignore_index: int,
    plan: SequencePlan | None,
) -> BatchRules:
    """The rules for reading a batch, from arguments of `UlyssesDeepSpeedStrategy`.

    Raises:
        UlyssesError: If ``sequence_dims`` is no mapping to whole numbers.
    """
    is_mapping = sequence_dims is None or isinstance(sequence_dims, Mapping)
    is_right = is_mapping and all(dim is None or type(dim) is int for dim in (sequence_dims or {}).values())
    _require(
        is_right,
        "sequence_dims",
        sequence_dims,
        "a mapping of keys of the batch (or indices of a tuple) to the dimension that carries the sequence, or to None "
        "for a tensor that every rank needs whole, such as {'x': 1}",
    )
    dims = {str(key): dim for key, dim in (sequence_dims or {}).items()}
    whole = frozenset(plan.whole) if plan is not None else frozenset()
    # With a join the loss is computed on the whole sequence, so every rank needs the whole batch.
    return BatchRules(dims, pad_to_multiple_of, ignore_index, whole, plan is not None and bool(plan.join))


def whole_rules(rules: BatchRules) -> BatchRules:
    """The same rules for a batch that every rank gets whole."""
    return replace(rules, pad_to_multiple_of=None, keeps_all=True)


def check_replicas(dp_shard_size: int | None, dp_replicate_size: int) -> None:
    """Refuses sizes of the data-parallel axis that are invalid or not supported.

    Raises:
        UlyssesValueError: With the name of the argument.
    """
    if dp_shard_size is not None and (type(dp_shard_size) is not int or dp_shard_size < 1):
        raise UlyssesValueError(f"dp_shard_size={dp_shard_size!r}", "a positive number or None", "change dp_shard_size")
    if dp_replicate_size != 1:
        # The suggested size covers the replicas as well.
        replicas = dp_replicate_size if isinstance(dp_replicate_size, int) else 1
        raise UlyssesValueError(
            f"dp_replicate_size={dp_replicate_size!r}",
            "dp_replicate_size=1: ZeRO shards over all processes, and DeepSpeed's hierarchical variants (MiCS, hpZ) "
            "do not give the same step at every stage",
            f"drop dp_replicate_size, or set dp_shard_size={(dp_shard_size or 1) * max(replicas, 1)}",
        )


def settle_config(config: dict[str, Any], is_given: bool) -> None:
    """Completes the DeepSpeed config of a strategy, in place.

    Args:
        config: As Lightning has made or read it.
        is_given: Whether it is the user's.

    Raises:
        UlyssesError: For a user's config with a key that the strategy sets.
    """
    if is_given:
        check_deepspeed_config(config)
    else:
        # The user's own optimizer must work with offload; DeepSpeed's needs a compiler.
        config["zero_force_ds_cpu_optimizer"] = False
    # Only DeepSpeed's timers read it; Lightning would build a second train dataloader to guess it.
    config.setdefault("train_micro_batch_size_per_gpu", 1)
    # Its throughput timer waits for the device twice in each step, and counts samples, which are slices here.
    config.setdefault("timers", {"throughput": {"enabled": False}})


def check_config(config: object) -> None:
    """Refuses what is neither a DeepSpeed config nor the path of one."""
    is_config = config is None or isinstance(config, (dict, str, Path))
    _require(is_config, "config", config, "a DeepSpeed config as a dict, the path of one, or None")


def check_deepspeed_config(config: Mapping[str, Any] | None) -> None:
    """Refuses DeepSpeed settings that the strategy or the Trainer sets, and sharding that is not exact.

    Raises:
        UlyssesError: With the name of the key.
    """
    if config is None:
        return
    for key, fix in _OWN_KEYS.items():
        if key in config:
            raise UlyssesError(f"{key!r} in the DeepSpeed config", "a config without it", fix)
    zero = config.get("zero_optimization") or {}
    check_stage(zero.get("stage", 0))
    # -1 and 1 are the values that switch these variants off.
    hierarchical = [key for key in ("mics_shard_size", "zero_hpz_partition_size") if zero.get(key, 1) not in (-1, 1)]
    if hierarchical:
        raise UlyssesError(
            f"{hierarchical[0]!r} in the DeepSpeed config",
            "ZeRO shards over all processes, the only sharding whose step is exact at every stage",
            f"remove {hierarchical[0]!r}",
        )


def check_stage(stage: int) -> None:
    """Refuses a ZeRO stage that is not exact."""
    if type(stage) is not int:
        raise UlyssesError(f"stage={stage!r}", "the ZeRO stage as a whole number: 1, 2 or 3", "set stage=2")
    if stage not in (1, 2, 3):
        raise UlyssesError(
            f"ZeRO stage {stage!r}",
            "stage 1, 2 or 3; DeepSpeed's stage 0 reduces bf16 gradients and computes their norm differently",
            "set stage=1, which keeps whole parameters and gradients on every process",
        )
