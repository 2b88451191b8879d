"""Exceptions that cross to another process: by the names of their classes, never pickled, so that each arrives."""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass
from typing import Any

from lightrft.engines.base import EngineError

_PLAIN = (str, bytes, int, float, bool, type(None))


class EngineProcessTraceback(Exception):
    """Where in the other process an exception was raised; the cause of that exception in this one."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True)
class Failure:
    """An exception in plain words.

    Attributes:
        kinds: module and name of its class and of its bases, nearest first.
        arguments: its ``args``, or only its message where they are not plain values.
        message: what it says.
        traceback: as Python prints it.
    """

    kinds: tuple[tuple[str, str], ...]
    arguments: tuple[Any, ...]
    message: str
    traceback: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Describe ``error``, which has been raised."""
        message = str(error)
        plain = all(isinstance(one, _PLAIN) for one in error.args)
        kinds = tuple((kind.__module__, kind.__qualname__) for kind in type(error).__mro__)
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        return cls(kinds, error.args if plain else (message,), message, "".join(lines))

    def error(self) -> Exception:
        """The exception again: of its own class, else of the nearest base that this process knows.

        One that has nothing in common with what is known here but being an exception becomes an :class:`EngineError`.
        """
        (_, name), *_ = self.kinds
        error = self._as(self.kinds[0], *self.arguments) or self._as(self.kinds[0], self.message)
        bases = iter(self.kinds[1:])
        while error is None:
            base = next(bases)
            if base[1] in ("Exception", "BaseException", "object"):
                base = (EngineError.__module__, EngineError.__qualname__)
            error = self._as(base, f"{name}: {self.message}")
        error.__cause__ = EngineProcessTraceback(self.traceback)
        return error

    def _as(self, kind: tuple[str, str], *arguments: Any) -> Exception | None:
        module, name = kind
        # Only what is imported: the other process may have packages that this one had better not load.
        known = getattr(sys.modules.get(module), name, None)
        if not (isinstance(known, type) and issubclass(known, Exception)) or known is Exception:
            return None
        try:
            error = known(*arguments)
            return error if self.message in str(error) else None
        except Exception:  # a constructor that wants something else
            return None
