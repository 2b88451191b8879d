"""No deadline for an example: a machine that is busy with other work must not fail a formula."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
