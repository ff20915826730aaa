"""Arranges the processes of a run in a grid with a data-parallel and a sequence-parallel axis."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_ulysses.errors import UlyssesError

DATA_AXIS = "data_parallel"
SEQUENCE_AXIS = "sequence_parallel"


@dataclass(frozen=True)
class MeshSizes:
    """The length of each mesh axis. Their product is the world size."""

    sp_size: int
    dp_size: int


def resolve_sizes(
    world_size: int,
    node_size: int,
    sp_size: int | Literal["auto"],
    dp_shard_size: int | None,
) -> MeshSizes:
    """Turns the strategy's sizes into axis lengths.

    Args:
        world_size: Processes in the run.
        node_size: Processes on this node. ``sp_size="auto"`` takes this number.
        sp_size: P.
        dp_shard_size: Data-parallel ranks. ``None`` takes the world size divided by P.

    Raises:
        UlyssesError: If the product is not the world size.
    """
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
    return MeshSizes(sp_size=sp, dp_size=dp)


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

    def check_heads(self, num_heads: int) -> None:
        """Raises `UlyssesError` if some rank would get no query head. The error names the largest P that works."""
        if self.sp_size > num_heads:
            # It must divide the world size as well.
            largest = max(size for size in range(1, num_heads + 1) if self.world_size % size == 0)
            raise UlyssesError(
                f"sp_size={self.sp_size} for attention with {num_heads} query heads",
                "at least one query head for each rank of a sequence-parallel group",
                f"set sp_size={largest}, the largest that works with {self.world_size} processes",
            )


#: A process by itself.
ALONE = SequenceMesh(0, 1, 1, 0, 1, 0)
