"""What every reward offers; :class:`Reward` is selected by ``class_path`` in YAML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightrft.samples import FinishReason, Media, Prompt, Response


@dataclass(frozen=True)
class RewardInput:
    """One response to score. The response stands apart from the prompt, so a template in the prompt earns nothing.

    Attributes:
        response: text of the response alone.
        prompt: text of the prompt, template applied.
        reference: the expected answer, ``None`` where the record has none.
        label: name of the recipe.
        finish_reason: ``stop``, ``length`` or ``abort``.
        response_tokens: length of the response in tokens.
        media: the prompt's media, by reference.
        record: other columns of the record.
    """

    response: str
    prompt: str = ""
    reference: str | None = None
    label: str | None = None
    finish_reason: FinishReason = "stop"
    response_tokens: int = 0
    media: Media = field(default_factory=Media)
    record: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, prompt: Prompt, response: Response) -> RewardInput:
        return cls(
            response=response.text,
            prompt=prompt.text,
            reference=prompt.reference,
            label=prompt.label,
            finish_reason=response.finish_reason,
            response_tokens=len(response.token_ids),
            media=prompt.media,
            record=prompt.record,
        )


class Reward:
    """Scores responses. Subclasses implement :meth:`score` (one response) or :meth:`score_all` (a whole batch)."""

    def score(self, item: RewardInput) -> float | None:
        """Score of one response; ``None`` (or a non-finite number) is "no score", and the run's policy decides."""
        raise NotImplementedError(f"{type(self).__name__} must define score() or score_all().")

    def score_all(self, items: Sequence[RewardInput]) -> list[float | None]:
        """Scores of many responses, in order."""
        return [self.score(item) for item in items]

    def take_counters(self) -> dict[str, float]:
        """Events since the last call, for the metrics (``timeouts``, …); the same keys every time."""
        return {}

    def close(self) -> None:
        """End processes or connections the reward holds."""
