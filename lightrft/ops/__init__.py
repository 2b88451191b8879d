"""What training runs on: packing, balance, attention over packed rows, the chunked head, fingerprints."""

from lightrft.ops.attention import varlen_attention
from lightrft.ops.balance import CostModel, busiest_over_mean, loads, micro_steps, partition
from lightrft.ops.fingerprint import Fingerprint, Fingerprints, fingerprint, joined
from lightrft.ops.log_probs import log_probs_and_entropy
from lightrft.ops.packing import Packed, joined_features, pack, pad, split_by_tokens
from lightrft.ops.sequence_parallel import check_heads, sequence_parallel_attention, sum_of_parts
from lightrft.ops.shard import Shard

__all__ = [
    "CostModel",
    "Fingerprint",
    "Fingerprints",
    "Packed",
    "Shard",
    "busiest_over_mean",
    "check_heads",
    "fingerprint",
    "joined",
    "joined_features",
    "loads",
    "log_probs_and_entropy",
    "micro_steps",
    "pack",
    "pad",
    "partition",
    "sequence_parallel_attention",
    "split_by_tokens",
    "sum_of_parts",
    "varlen_attention",
]
