"""Arranges the processes of a run in a grid with a data-parallel and a sequence-parallel axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.query_runs import most_ulysses

DATA_AXIS = "data_parallel"
SEQUENCE_AXIS = "sequence_parallel"


@dataclass(frozen=True)
class MeshSizes:
    """The length of each mesh axis. Their product is the world size.

    Attributes:
        sp_size: P.
        dp_size: Data-parallel ranks.
        ulysses: Consecutive ranks of a sequence-parallel group that exchange heads, if there are enough; None for P.
    """

    sp_size: int
    dp_size: int
    ulysses: int | None = None


def resolve_sizes(
    world_size: int,
    node_size: int,
    sp_size: int | Literal["auto"] | Mapping[str, int],
    dp_shard_size: int | None,
) -> MeshSizes:
    """Turns the strategy's sizes into axis lengths.

    Args:
        world_size: Processes in the run.
        node_size: Processes on this node. ``sp_size="auto"`` takes this number.
        sp_size: P, or its factors ``ulysses`` and ``gather``.
        dp_shard_size: Data-parallel ranks. ``None`` takes the world size divided by P.

    Raises:
        UlyssesError: If the product is not the world size.
    """
    ulysses = None
    if isinstance(sp_size, Mapping):
        ulysses = sp_size["ulysses"]
        sp = ulysses * sp_size["gather"]
    else:
        sp = node_size if sp_size == "auto" else sp_size
    # For the error messages.
    fitting = [size for size in range(1, world_size + 1) if world_size % size == 0]
    if sp < 1 or world_size % sp:
        raise UlyssesError(
            f"sp_size={sp} in a world of {world_size} processes",
            "a world size that sp_size divides",
            f"set sp_size to one of {fitting}, or change the number of devices or nodes",
        )
    dp = world_size // sp if dp_shard_size is None else dp_shard_size
    if sp * dp != world_size:
        raise UlyssesError(
            f"sp_size={sp} * dp_shard_size={dp} = {sp * dp}",
            f"a product equal to the world size, {world_size}",
            f"set dp_shard_size={world_size // sp} (or leave it out) with sp_size={sp}; fitting sp_size: {fitting}",
        )
    return MeshSizes(sp, dp, ulysses)


@dataclass(frozen=True)
class HeadGrid:
    """The ranks of a sequence-parallel group for one attention call: U that exchange heads, times R with the same ones.

    Rank r is ``outer * U + inner``. So the tokens of the U ranks that exchange heads are consecutive.

    Attributes:
        ulysses: U, the ranks that exchange heads.
        gather: R, the ranks that hold the same heads, and gather their keys and values.
        inner: The place of this rank among the U.
        outer: Its place among the R.
        heads_group: The U ranks; None for one.
        keys_group: The R ranks; None for one.
    """

    ulysses: int
    gather: int
    inner: int
    outer: int
    heads_group: dist.ProcessGroup | None
    keys_group: dist.ProcessGroup | None


def _is_alive(group: dist.ProcessGroup) -> bool:
    try:
        dist.get_process_group_ranks(group)
    except KeyError:
        return False
    return True


@dataclass(frozen=True)
class SequenceMesh:
    """Sizes of the mesh, the rank of this process along each axis, and the process group of each axis.

    Facts that the hosts know travel over groups of their own beside NCCL, so that no host waits for its device to send
    or read them. Where the other groups are on the host already, there are no further ones.

    Consecutive ranks form a sequence-parallel group, so its all-to-alls stay inside a node if the group fits in one.
    The group of an axis of length one is ``None``.

    Example:
        World size 4 with ``sp_size=2``: ranks 0 and 1 share one sequence, ranks 2 and 3 share another.
    """

    rank: int
    world_size: int
    sp_size: int
    sp_rank: int
    dp_size: int
    dp_rank: int
    sp_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    device_mesh: DeviceMesh | None = None
    groups: tuple[dist.ProcessGroup, ...] = ()
    host_group: dist.ProcessGroup | None = None
    host_dp_group: dist.ProcessGroup | None = None
    ulysses: int | None = None
    made: dict[int, tuple[dist.ProcessGroup, ...]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def create(cls, sizes: MeshSizes, device_type: str) -> SequenceMesh:
        """Builds the groups from the default process group. Every process must call it."""
        device_mesh = init_device_mesh(
            device_type, (sizes.dp_size, sizes.sp_size), mesh_dim_names=(DATA_AXIS, SEQUENCE_AXIS)
        )
        rank = dist.get_rank()
        return cls(
            rank=rank,
            world_size=dist.get_world_size(),
            sp_size=sizes.sp_size,
            # The sequence axis is the inner one of the mesh.
            sp_rank=rank % sizes.sp_size,
            dp_size=sizes.dp_size,
            dp_rank=rank // sizes.sp_size,
            sp_group=device_mesh.get_group(SEQUENCE_AXIS) if sizes.sp_size > 1 else None,
            dp_group=device_mesh.get_group(DATA_AXIS) if sizes.dp_size > 1 else None,
            device_mesh=device_mesh,
            groups=tuple(device_mesh.get_all_groups()),
            ulysses=sizes.ulysses,
        )

    @property
    def is_closed(self) -> bool:
        """Whether the groups are gone: `close` was called, or the world to which they belonged has ended."""
        return not all(map(_is_alive, self.groups))

    def close(self) -> None:
        """Ends the groups, which hold threads and connections; the sizes remain. Closing twice does nothing."""
        for group in self.groups:
            # An axis as long as the world may have the world's own group.
            if _is_alive(group) and group is not dist.group.WORLD:
                dist.destroy_process_group(group)

    def with_host_groups(self, device_type: str) -> SequenceMesh:
        """The mesh with gloo groups of the world and of the data-parallel axis. Every process must call it.

        Without effect for the CPU, whose groups are on the host, and for a mesh that has them.
        """
        if device_type == "cpu" or self.host_group is not None:
            return self
        world = dist.new_group(backend="gloo")
        # Every process takes part in making every group.
        axes = [
            dist.new_group(list(range(sp_rank, self.world_size, self.sp_size)), backend="gloo")
            for sp_rank in range(self.sp_size)
        ]
        return replace(self, host_group=world, host_dp_group=axes[self.sp_rank] if self.dp_size > 1 else None)

    def without_host_groups(self) -> SequenceMesh:
        """Destroys the groups of `with_host_groups`; whoever waits in one of them gets an error."""
        for group in (self.host_group, self.host_dp_group):
            if group is not None and dist.is_initialized():
                dist.destroy_process_group(group)
        return replace(self, host_group=None, host_dp_group=None)

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The data-parallel axis for tensors on the host, or None if it has one rank."""
        return self.host_dp_group or self.dp_group

    def head_ranks(self, num_heads: int) -> int:
        """U, the ranks that exchange heads in an attention call with ``num_heads`` query heads."""
        return most_ulysses(num_heads, self.ulysses or self.sp_size)

    def grid(self, num_heads: int) -> HeadGrid:
        """The ranks of this process's group for an attention call.

        The first call for other numbers than those of the mesh makes groups. So all ranks of a group call it together.

        Args:
            num_heads: H of the call.
        """
        size = self.head_ranks(num_heads)
        count, (outer, inner) = self.sp_size // size, divmod(self.sp_rank, size)
        if count == 1:
            return HeadGrid(size, count, inner, outer, self.sp_group, None)
        if size == 1:
            return HeadGrid(size, count, inner, outer, None, self.sp_group)
        if size not in self.made:
            first = self.rank - self.sp_rank
            ranks = ([outer * size + i for i in range(size)], [i * size + inner for i in range(count)])
            # Only the ranks of a group wait for each other: those of other groups may be elsewhere. Its name follows
            # from its ranks, and a later group must not take it: so these end with the world, and not in `close`.
            self.made[size] = tuple(
                dist.new_group([first + each for each in part], use_local_synchronization=True) for part in ranks
            )
        return HeadGrid(size, count, inner, outer, *self.made[size])


def opened(
    former: SequenceMesh | None,
    world_size: int,
    node_size: int,
    sp_size: int | Literal["auto"] | Mapping[str, int],
    dp_shard_size: int | None,
    device_type: str,
) -> SequenceMesh:
    """The mesh of a strategy whose processes are connected, with groups on the host. Every process must call it.

    Args:
        former: The strategy's mesh of an earlier run, which may still be open.
        world_size: See `resolve_sizes`, as for the following ones.
        node_size: The same.
        sp_size: The same.
        dp_shard_size: The same.
        device_type: Of the model.

    Raises:
        UlyssesError: If the product of the sizes is not the world size.
    """
    if former is None or former.is_closed:
        sizes = resolve_sizes(world_size, node_size, sp_size, dp_shard_size)
        former = SequenceMesh.create(sizes, device_type)
    return former.with_host_groups(device_type)


#: A process by itself.
ALONE = SequenceMesh(0, 1, 1, 0, 1, 0)
