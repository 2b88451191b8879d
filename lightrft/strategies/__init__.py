"""How models lie over ranks: strategies of Fabric, behind one surface (:class:`Sharding`)."""

from __future__ import annotations

from lightrft.strategies.base import Sharding
from lightrft.strategies.choice import STRATEGIES, make_fabric, placement_of, sharding_of
from lightrft.strategies.flight_recorder import unfinished_collective
from lightrft.strategies.fully_sharded import FSDP2, blocks, data_parallel, shard_blocks
from lightrft.strategies.half_precision import ScaledFloat16
from lightrft.strategies.launch import launch
from lightrft.strategies.layout import Layout
from lightrft.strategies.movable import Movable, to_host
from lightrft.strategies.placement import Placement
from lightrft.strategies.process_group import leave_together, let_collectives_last
from lightrft.strategies.replicated import DDP
from lightrft.strategies.roles import Roles, by_role
from lightrft.strategies.whole import gathered, whole
from lightrft.strategies.zero import ZeRO

__all__ = [
    "DDP",
    "FSDP2",
    "STRATEGIES",
    "Layout",
    "Movable",
    "Placement",
    "Roles",
    "ScaledFloat16",
    "Sharding",
    "ZeRO",
    "blocks",
    "by_role",
    "data_parallel",
    "gathered",
    "launch",
    "leave_together",
    "let_collectives_last",
    "make_fabric",
    "placement_of",
    "shard_blocks",
    "sharding_of",
    "to_host",
    "unfinished_collective",
    "whole",
]
