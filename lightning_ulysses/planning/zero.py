"""The bytes that DeepSpeed's ZeRO takes on each process, by formula."""

from __future__ import annotations

from dataclasses import dataclass

# Defaults of Lightning's DeepSpeedStrategy and of DeepSpeed (``zero/config.py``), in elements.
_REDUCE_BUCKET = 200_000_000
_MAX_LIVE = 1_000_000_000


@dataclass(frozen=True)
class Sharding:
    """How the states of a model are divided.

    Attributes:
        stage: Of ZeRO, 1 to 3; 0 for a process that has everything.
        world: Processes that share the states.
        offload_optimizer: Whether optimizer states, masters and gradients are on the host.
        offload_parameters: Whether shards of parameters are on the host; stage 3 only.
        states: Numbers in float32 that the optimizer keeps for each parameter besides the master, 2 for Adam.
        reduce_bucket: Elements of a bucket of gradients.
        max_live: Elements of parameters that stage 3 holds at a time.
    """

    stage: int
    world: int
    offload_optimizer: bool = False
    offload_parameters: bool = False
    states: int = 2
    reduce_bucket: int = _REDUCE_BUCKET
    max_live: int = _MAX_LIVE


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one process.

    Attributes:
        device: By cause, during forward and backward.
        step: On the device beside these while the optimizer steps, when no activation lives.
        host: By cause.
    """

    device: dict[str, int]
    step: int
    host: dict[str, int]


def state_bytes(numel: int, largest: int, sharding: Sharding, size: int = 2) -> StateBytes:
    """What parameters, gradients, buckets and optimizer take.

    Args:
        numel: Parameters of the model.
        largest: Parameters that are gathered as one, at most.
        sharding: How they are divided.
        size: Bytes of a parameter in the model, 2 for bfloat16, whose masters are in float32.

    Source:
        DeepSpeed ``runtime/zero/stage_1_and_2.py`` (``ipg_buckets``, ``single_partition_of_fp32_groups``) and
        ``stage3.py`` (``__ipg_bucket_flat_buffer``, ``fp32_partitioned_groups_flat``).
    """
    own = -(-numel // sharding.world)
    is_split, on_host = sharding.stage == 3, sharding.offload_optimizer
    parameters = own * size if is_split else numel * size
    gradients = numel * size if sharding.stage < 2 else own * size
    # With stages 1 and 2, one bucket fills while the other one is reduced.
    buckets = sharding.reduce_bucket * size * (1 if is_split else 2) if sharding.world > 1 else 0
    masters = 4 * (1 + sharding.states) * own
    device = {
        "parameters": 0 if sharding.offload_parameters else parameters,
        "gathered parameters": min(numel, max(sharding.max_live, largest)) * size if is_split else 0,
        "gradients": 0 if on_host and sharding.stage > 0 else gradients,
        "buckets": buckets,
        "optimizer": 0 if on_host else masters,
    }
    host = {
        "parameters": parameters if sharding.offload_parameters else 0,
        # Gradients in float32 as well.
        "optimizer": masters + 4 * own if on_host else 0,
    }
    return StateBytes(
        {cause: number for cause, number in device.items() if number},
        0 if on_host else 4 * own,
        {cause: number for cause, number in host.items() if number},
    )
