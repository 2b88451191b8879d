"""Which ranks share a packed row."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def sequence_mesh(device_type: str, world_size: int, degree: int) -> DeviceMesh:
    """All ranks as ``data x sequence``: each ``degree`` contiguous ones share a row, on one node where they fit.

    Collective; the process group is up.

    Args:
        device_type: ``cpu`` or ``cuda``.
        world_size: number of all ranks.
        degree: of sequence parallelism.

    Returns:
        a mesh of ``[world_size / degree, degree]``; ``mesh.get_group("sequence")`` are the ranks of this one's row.

    Raises:
        ValueError: ``degree`` does not divide the ranks.
    """
    if degree < 1 or world_size % degree:
        raise ValueError(
            f"sequence_parallel_size={degree} does not divide the {world_size} ranks evenly; set it to a divisor of "
            f"{world_size}, or start a multiple of it."
        )
    return init_device_mesh(device_type, (world_size // degree, degree), mesh_dim_names=("data", "sequence"))
