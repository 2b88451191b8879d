from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from lightrft.rewards import MathAccuracy
from lightrft.samples import Prompt, Response, Rollout, Sampling

MakeRollout = Callable[..., Rollout]


@pytest.fixture(scope="session")
def accuracy() -> Iterator[MathAccuracy]:
    """Workers shared by the tests that do not hurt them."""
    reward = MathAccuracy(seconds_per_answer=60.0, workers=1)
    yield reward
    reward.close()


@pytest.fixture
def make_rollout() -> MakeRollout:
    """A rollout of ``(label, reference, [texts])`` groups; a text ``None`` is an aborted response."""

    def make(*groups: tuple[str | None, str | None, list[str | None]]) -> Rollout:
        prompts = [
            Prompt(
                uid=f"data/{row}@0", token_ids=torch.ones(3, dtype=torch.int64), text="Q", reference=ref, label=label
            )
            for row, (label, ref, _) in enumerate(groups)
        ]
        responses = [[_response(text) for text in texts] for _, _, texts in groups]
        return Rollout(prompts, responses, Sampling())

    return make


def _response(text: str | None) -> Response:
    length = 0 if text is None else 2
    return Response(
        token_ids=torch.zeros(length, dtype=torch.int64),
        log_probs=torch.zeros(length),
        text=text or "",
        finish_reason="abort" if text is None else "stop",
    )
