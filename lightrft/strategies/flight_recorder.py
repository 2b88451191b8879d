"""Which collective this rank waits in, as torch's flight recorder (NCCL and gloo) has it."""

from __future__ import annotations

import json
from typing import Any

import torch.distributed as dist


def unfinished_collective() -> str | None:
    """The oldest collective of this process that is not over, e.g. ``all_reduce #12``; ``None`` where there is none.

    The number counts the collectives of its process group, alike on all of the group's ranks. Collectives of a
    strategy inside a forward or backward are among them.

    Raises:
        LookupError: nothing is recorded (``TORCH_FR_BUFFER_SIZE=0``, or another torch than is supported).
    """
    entries = [entry for trace in _traces() for entry in trace.get("entries", [])]
    if not entries:
        raise LookupError("torch's flight recorder is empty.")
    waiting = [entry for entry in entries if not entry["retired"] and entry["state"] != "completed"]
    return _name(min(waiting, key=lambda entry: entry["time_created_ns"])) if waiting else None


def _traces() -> list[dict[str, Any]]:
    if not dist.is_available():
        return []
    import torch._C._distributed_c10d as c10d

    # Of gloo, and where torch is built with it of NCCL.
    dumps = [getattr(c10d, name, None) for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json")]
    return [json.loads(dump()) for dump in dumps if dump is not None]


def _name(entry: dict[str, Any]) -> str:
    operation = entry["profiling_name"].partition(":")[2] or entry["profiling_name"]
    group = entry["process_group"][1]
    return f"{operation} #{entry['collective_seq_id']}" + ("" if group == "default_pg" else f" of {group}")
