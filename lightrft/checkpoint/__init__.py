"""Checkpoint folders: written whole or not at all, in the background; read back exactly, on any number of ranks.

A folder holds for each trained model what :mod:`lightrft.strategies.state` writes (the policy's at its top, a critic's
in ``critic/``), the loop's state of each rank (``rank-<r>.pt``), what ``lightrft export`` needs besides
(``huggingface/``: configuration and tokenizer), and ``checkpoint.json``, which names every file with its size and
checksum. It is written under a hidden name, flushed to the disk, and renamed: a killed writer leaves the earlier
checkpoints as they were and never a half-written one under a final name.
"""

from lightrft.checkpoint.best import Best
from lightrft.checkpoint.loading import find, load
from lightrft.checkpoint.manifest import is_checkpoint, verify
from lightrft.checkpoint.writer import Writer, check_writable

__all__ = ["Best", "Writer", "check_writable", "find", "is_checkpoint", "load", "verify"]
