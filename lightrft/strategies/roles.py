"""Which strategy each model of a run takes: the run's, or one of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.strategies import Strategy

from lightrft.strategies.base import Sharding
from lightrft.strategies.choice import launched_fabric, sharding_of

ROLES = ("actor", "critic", "reference")


class Roles:
    """The surface of each model's strategy.

    Args:
        fabric: launched; the run's.
        own: strategies by role, for the models that take another one.
        arguments: of Fabric, as the run's was made.

    Attributes:
        default: of the run's strategy.
    """

    def __init__(self, fabric: Fabric, own: dict[str, str | Strategy], **arguments: Any) -> None:
        self.default = sharding_of(fabric)
        self._own = {role: sharding_of(launched_fabric(one, fabric, **arguments)) for role, one in own.items()}

    def __getitem__(self, role: str) -> Sharding:
        return self._own.get(role, self.default)

    def building(self) -> AbstractContextManager[None]:
        """Around the loading of all models' weights (:meth:`Sharding.building`)."""
        # A reference is copied from the actor: under another strategy, it may have to be whole where the actor is not.
        return nullcontext() if self._own else self.default.building()


def by_role(strategy: str | Strategy | dict[str, str | Strategy]) -> tuple[str | Strategy, dict[str, str | Strategy]]:
    """The run's strategy, and those of models that take another.

    Raises:
        ValueError: no ``default``, or a role that no model has.
    """
    if not isinstance(strategy, dict):
        return strategy, {}
    own = {role: one for role, one in strategy.items() if role != "default"}
    for role in own:
        if role not in ROLES:
            raise ValueError(f"trainer.strategy names {role!r}; models are {', '.join(ROLES)}, beside default.")
    if "default" not in strategy:
        raise ValueError("trainer.strategy by models needs default: the strategy of those that it does not name.")
    return strategy["default"], own
