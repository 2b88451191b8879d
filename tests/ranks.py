"""Runs a function on several gloo ranks, each a process of its own as torchrun would start it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

# Imported once in a server from which ranks are forked, before any thread of torch's exists there. DeepSpeed would
# import the last two, for seconds, when a stage is set up; where it is not installed they are passed over.
PRELOADED = ["lightrft.trainer", "lightrft.callbacks", "lightrft.lightning_modules", "pytest"]
PRELOADED += ["transformers.models.qwen2.modeling_qwen2", "deepspeed.runtime.zero.stage3"]
PRELOADED += ["deepspeed.runtime.zero.muon.muon_optimizer"]
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # asked for when it is imported
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)


def on_ranks(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work(*arguments)`` returns on each of ``size`` ranks; ``work`` finds them by ``Fabric(devices=size)``.

    ``work`` is a function of a module, so that it can be pickled; what it returns is pickled too.

    Raises:
        AssertionError: a rank raised or died; with its traceback. The other ranks are ended.
    """
    port = free_port()
    ranks = [_Rank(rank, size, port, work, arguments) for rank in range(size)]
    try:
        while open_ones := [rank.results for rank in ranks if not rank.answer]:
            for ready in wait(open_ones):
                next(rank for rank in ranks if rank.results is ready).receive()
        return [rank.answer[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.end()


class _Rank:
    def __init__(self, rank: int, size: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.rank = rank
        self.results, sending = CONTEXT.Pipe(duplex=False)
        self.answer: list[Any] = []
        self._process = CONTEXT.Process(target=_run, args=(sending, rank, size, port, work, arguments))
        self._process.start()
        sending.close()

    def receive(self) -> None:
        try:
            # Plainly pickled: multiprocessing would hand over tensors by files that go with the process.
            result, error = pickle.loads(self.results.recv_bytes())
        except EOFError:
            self._process.join()
            raise AssertionError(f"Rank {self.rank} died with exit code {self._process.exitcode}.") from None
        assert error is None, f"Rank {self.rank}:\n{error}"
        self.answer = [result]

    def end(self) -> None:
        if not self.answer:
            self._process.kill()
        self._process.join()


def _run(
    sending: Connection, rank: int, size: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch.distributed as dist

    become(rank, size, port)
    gc.freeze()  # what was imported before the fork is no garbage, and DeepSpeed collects often
    try:
        answer = work(*arguments), None
    except BaseException:
        answer = None, traceback.format_exc()
    sending.send_bytes(pickle.dumps(answer))
    if answer[1] is None and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def become(rank: int, size: int, port: int) -> None:
    """Make this process what torchrun would have started as the rank."""
    import torch

    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
