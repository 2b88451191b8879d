"""Tensor operations that training runs on: packing, attention, the chunked head, fingerprints."""

from lightrft.ops.attention import varlen_attention
from lightrft.ops.fingerprint import Fingerprint, fingerprint
from lightrft.ops.log_probs import log_probs_and_entropy
from lightrft.ops.packing import Packed, pack, pad, split_by_tokens
from lightrft.ops.sequence_parallel import check_heads, sequence_parallel_attention, sum_of_parts

__all__ = [
    "Fingerprint",
    "Packed",
    "check_heads",
    "fingerprint",
    "log_probs_and_entropy",
    "pack",
    "pad",
    "sequence_parallel_attention",
    "split_by_tokens",
    "sum_of_parts",
    "varlen_attention",
]
