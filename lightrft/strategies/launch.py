"""The processes of a run: started here, or by a launcher whose numbers must be those of the configuration."""

from __future__ import annotations

import os

import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

from lightrft.strategies.process_group import outlast_gloo


def launch(fabric: Fabric) -> None:
    """Have one process a device: start those of this node, or join those that torchrun, srun or ``fabric run`` started.

    Raises:
        ValueError: the launcher started other processes than ``devices`` and ``num_nodes`` say, or there are several
            nodes and nothing says which one this is; says what to set.
    """
    _check(fabric)
    if not fabric._launched:  # Fabric refuses to launch under `fabric run`, and a second time
        fabric.launch()
    outlast_gloo()


def _check(fabric: Fabric) -> None:
    strategy = fabric.strategy
    devices, nodes = len(getattr(strategy, "parallel_devices", None) or [0]), getattr(strategy, "num_nodes", 1)
    started = _started()
    if started is not None:
        launcher, per_node, on_nodes = started
        if (per_node, on_nodes) != (devices, nodes):
            raise ValueError(
                f"{launcher} started {per_node} process(es) on each of {on_nodes} node(s), but trainer.devices makes "
                f"{devices} and trainer.num_nodes is {nodes}; set --trainer.devices {per_node} --trainer.num_nodes "
                f"{on_nodes}, or have as many processes started."
            )
    elif nodes > 1 and isinstance(getattr(strategy, "cluster_environment", None), LightningEnvironment):
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
        if missing:
            raise ValueError(
                f"trainer.num_nodes is {nodes}, but {' and '.join(missing)} are not in the environment, so the nodes "
                "could not find each other; start with torchrun or srun, or set them on each node."
            )


def _started() -> tuple[str, int, int] | None:
    """Who started this process as one of how many on each of how many nodes; ``None`` if nobody says."""
    if dist.is_torchelastic_launched():
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return "torchrun", per_node, int(os.environ.get("WORLD_SIZE", "1")) // per_node
    if SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        return "srun", int(os.environ["SLURM_NTASKS"]) // nodes, nodes
    return None
