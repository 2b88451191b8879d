"""Tensor operations that training runs on: packing, attention over packed rows, the chunked head, fingerprints."""

from lightrft.ops.attention import varlen_attention
from lightrft.ops.fingerprint import Fingerprint, fingerprint, joined
from lightrft.ops.log_probs import log_probs_and_entropy
from lightrft.ops.packing import Packed, pack, pad, split_by_tokens
from lightrft.ops.shard import Shard

__all__ = [
    "Fingerprint",
    "Packed",
    "Shard",
    "fingerprint",
    "joined",
    "log_probs_and_entropy",
    "pack",
    "pad",
    "split_by_tokens",
    "varlen_attention",
]
