"""Weights between two processes' ends: every tensor bit by bit, and neither end waits for one that is gone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from lightrft.engines import EngineError
from lightrft.engines.server import weight_channel
from lightrft.engines.server.weight_channel import ChannelBroken, Place, WeightChannel, rendezvous

CPU = torch.device("cpu")
TENSORS = [
    ("matrix", torch.randn(7, 50)),
    ("transposed", torch.randn(4, 6).t()),
    ("half", torch.randn(333).bfloat16()),
    ("scalar", torch.tensor(3.0)),
    ("nothing", torch.zeros(0, 4)),
    ("integers", torch.arange(9)),
]


def nobody_ended() -> None:
    pass


@pytest.fixture
def ends() -> Iterator[tuple[WeightChannel, WeightChannel, ThreadPoolExecutor]]:
    """The trainer's, the worker's, and a thread for what the worker does."""
    store, place = rendezvous("127.0.0.1", "gloo", 20)
    with ThreadPoolExecutor(1) as thread:
        worker = thread.submit(WeightChannel.join, place, CPU)
        yield WeightChannel.open(store, place, CPU, nobody_ended), worker.result(), thread


def received(channel: WeightChannel) -> list[tuple[str, Tensor]]:
    return list(channel.receive(channel.alive))


@pytest.mark.parametrize("size", [64, 1000, 1 << 20])
def test_tensors_arrive_one_push_after_the_other_whatever_the_buckets_hold(ends, monkeypatch, size):
    trainer, worker, thread = ends
    monkeypatch.setattr(weight_channel, "_BUCKET", size)
    for factor in (1, 2):
        arrived = thread.submit(received, worker)
        pushed = [(name, tensor * factor) for name, tensor in TENSORS]
        trainer.send(iter(pushed), nobody_ended)
        found = arrived.result()
        assert [name for name, _ in found] == [name for name, _ in pushed]
        assert all(a.dtype == b.dtype and torch.equal(a, b) for (_, a), (_, b) in zip(found, pushed))


def test_what_the_group_leaves_in_the_store_is_not_taken_for_words():
    """NCCL's id of its connection lies there under ``0``, and is no text."""
    store, place = rendezvous("127.0.0.1", "gloo", 20)
    for number in range(4):
        store.set(str(number), b"\xca\xfe")
    with ThreadPoolExecutor(1) as thread:
        joined = thread.submit(WeightChannel.join, place, CPU)
        trainer = WeightChannel.open(store, place, CPU, nobody_ended)
        arrived = thread.submit(received, joined.result())
        trainer.send(iter(TENSORS), nobody_ended)
        assert [name for name, _ in arrived.result()] == [name for name, _ in TENSORS]


def test_what_breaks_off_at_the_trainer_breaks_off_at_the_worker_and_the_next_push_works(ends, monkeypatch):
    trainer, worker, thread = ends
    monkeypatch.setattr(weight_channel, "_BUCKET", 64)

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield from TENSORS[:2]
        raise ConnectionError("rank 3 is gone")

    arrived = thread.submit(received, worker)
    with pytest.raises(ConnectionError):
        trainer.send(broken(), nobody_ended)
    assert not trainer.lost
    with pytest.raises(EngineError, match="broke the push off: rank 3 is gone"):
        arrived.result()
    arrived = thread.submit(received, worker)
    trainer.send(iter(TENSORS), nobody_ended)
    assert len(arrived.result()) == len(TENSORS)


def test_a_trainer_that_waits_in_vain_says_so(ends):
    trainer, _, _ = ends

    def ended() -> None:
        raise EngineError("the worker ended early")

    big = torch.zeros(64 << 20)  # more than is on its way unread
    with pytest.raises(EngineError, match="ended early"):
        trainer.send([("big", big)], ended)
    assert trainer.lost


def test_a_worker_that_never_comes_or_cannot_come_is_said_with_the_address():
    store, place = rendezvous("127.0.0.1", "gloo", 0.2)
    with pytest.raises(ChannelBroken, match=f"nobody came to 127.0.0.1:{place.port}"):
        WeightChannel.open(store, place, CPU, nobody_ended)
    port = place.port
    del store
    with pytest.raises(ChannelBroken, match=f"cannot reach the trainer at 127.0.0.1:{port}"):
        WeightChannel.join(Place("127.0.0.1", port, "gloo", 1), CPU)


def gone(place: Any) -> None:
    WeightChannel.join(Place(*place), CPU)


def test_a_worker_whose_process_is_gone_is_not_waited_for():
    import dataclasses
    import multiprocessing

    store, place = rendezvous("127.0.0.1", "gloo", 60)
    process = multiprocessing.get_context("forkserver").Process(target=gone, args=(dataclasses.astuple(place),))
    process.start()
    channel = WeightChannel.open(store, place, CPU, nobody_ended)
    process.join()
    with pytest.raises(ChannelBroken):
        channel.send([("big", torch.zeros(64 << 20))], nobody_ended)
