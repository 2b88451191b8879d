"""How ranks form groups that compute one micro-batch together."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Layout:
    """Contiguous ranks, ``sequence_parallel_size`` of them a group; the groups compute different micro-batches.

    Attributes:
        world_size: number of all ranks.
        rank: this one.
        sequence_parallel_size: ranks that share the tokens of a micro-batch.

    Raises:
        ValueError: the groups do not divide the ranks.
    """

    world_size: int
    rank: int
    sequence_parallel_size: int = 1

    def __post_init__(self) -> None:
        size = self.sequence_parallel_size
        if size < 1 or self.world_size % size:
            raise ValueError(
                f"sequence_parallel_size={size} does not divide {self.world_size} rank(s); set it to a divisor of that."
            )

    def mesh(self, device_type: str) -> DeviceMesh:
        """All ranks as ``data x sequence``; ``get_group("sequence")`` are those of this one's group. Collective."""
        return init_device_mesh(
            device_type, (self.groups, self.sequence_parallel_size), mesh_dim_names=("data", "sequence")
        )

    @property
    def groups(self) -> int:
        """How many micro-batches are computed at the same time."""
        return self.world_size // self.sequence_parallel_size

    @property
    def group(self) -> int:
        """This rank's."""
        return self.rank // self.sequence_parallel_size

    def leader(self, group: int) -> int:
        """The rank that speaks for a group, so that what its ranks all know counts once."""
        return group * self.sequence_parallel_size

    @property
    def leads(self) -> bool:
        """Whether this rank is its group's leader."""
        return self.rank == self.leader(self.group)
