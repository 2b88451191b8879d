"""The seed of every response, so that what is sampled depends on neither rank, batch, nor resume."""

from __future__ import annotations

import hashlib


def response_seed(run_seed: int, iteration: int, prompt_uid: str, sample_index: int) -> int:
    """Seed of one response's own random stream.

    Args:
        run_seed: the run's seed.
        iteration: the iteration it is sampled in.
        prompt_uid: :attr:`lightrft.samples.Prompt.uid`.
        sample_index: which sample of the prompt.

    Returns:
        63 bits of a BLAKE2b hash of the four: the same in every process, on every platform and Python.
    """
    # The text comes last: numbers hold no separator, so no two quadruples share an encoding.
    key = f"{int(run_seed)}/{int(iteration)}/{int(sample_index)}/{prompt_uid}"
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def continuation_seed(seed: int, position: int) -> int:
    """Seed of what goes on after the first ``position`` tokens of the response that began with ``seed``."""
    digest = hashlib.blake2b(f"{int(seed)}+{int(position)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
