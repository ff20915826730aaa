"""The data-parallel rank of a process: what the user gave, checked against the strategy."""

from __future__ import annotations

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import SequenceMesh

# Number of data-parallel ranks, and the rank of this process among them.
Place = tuple[int, int]


def given_place(num_replicas: int | None, rank: int | None) -> Place | None:
    """The place that the user gave, if any.

    Raises:
        UlyssesError: If only one of the two is given, or the rank is out of range.
    """
    if num_replicas is None and rank is None:
        return None
    if num_replicas is None or rank is None or not 0 <= rank < num_replicas:
        raise UlyssesError(
            f"num_replicas={num_replicas} with rank={rank}",
            "both or neither, and a rank below num_replicas",
            "leave both out under the strategy, or take them from trainer.strategy.distributed_sampler_kwargs",
        )
    return num_replicas, rank


def place_in(mesh: SequenceMesh, given: Place | None, max_tokens: int) -> Place:
    """The place under a strategy.

    Raises:
        UlyssesError: If the user gave another place, or a pack may have fewer tokens than the ranks that share it.
    """
    place = mesh.dp_size, mesh.dp_rank
    if given not in (None, place):
        raise UlyssesError(
            f"num_replicas and rank {given} in a process that is data-parallel rank {mesh.dp_rank} of {mesh.dp_size} "
            f"(sp_size={mesh.sp_size})",
            "the data-parallel ranks, not all processes",
            "leave num_replicas and rank out",
        )
    if max_tokens < mesh.sp_size:
        raise UlyssesError(
            f"max_tokens={max_tokens} with sp_size={mesh.sp_size}",
            "at least one token for each rank that shares a pack",
            "raise max_tokens",
        )
    return place
