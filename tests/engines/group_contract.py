"""The contract of every engine for one over several ranks; ``test_groups.py`` runs it on all of them in step."""

from __future__ import annotations

import torch.distributed as dist

from lightrft.engines import EngineGroup, TransformersEngine

from .contract import EngineContract


class TestTransformersEngineOnAGroup(EngineContract):
    make = staticmethod(lambda: TransformersEngine(tensor_parallel_size=dist.get_world_size()))

    @staticmethod
    def group() -> EngineGroup:
        return EngineGroup(dist.get_world_size())
