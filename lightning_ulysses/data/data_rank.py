"""Which data-parallel rank a process is: what it was told, and whether that fits the strategy."""

from __future__ import annotations

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import SequenceMesh

# Data-parallel ranks, and the number of this one.
Place = tuple[int, int]


def given_place(num_replicas: int | None, rank: int | None) -> Place | None:
    """The user's own words for it, if any.

    Raises:
        UlyssesError: If half of them are missing, or there is no such rank.
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
        UlyssesError: If the user's words are others, or a pack may be shorter than the ranks that share it.
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
