"""OwnProcess: the contract of every engine, and that its process lives, dies and clears up as it should."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from lightrft.engines import EngineError, OwnProcess, TransformersEngine
from lightrft.ops.fingerprint import fingerprint
from lightrft.samples import Sampling
from lightrft.whereabouts import here

from .contract import EngineContract, world
from .scripted_engine import ScriptedEngine

CPU = torch.device("cpu")
ANY = Sampling()


class TestOwnProcess(EngineContract):
    make = staticmethod(lambda: OwnProcess(TransformersEngine()))

    def test_tensors_larger_than_a_bucket_arrive_whole(self, engine, monkeypatch):
        monkeypatch.setattr(engine, "bucket_bytes", 1000)
        pushed = {name: tensor * 3 for name, tensor in world().weights()}
        assert any(tensor.nbytes > 20 * engine.bucket_bytes for tensor in pushed.values())
        engine.update_weights(pushed.items(), 5)
        assert engine.fingerprint(list(pushed)) == {name: fingerprint(tensor) for name, tensor in pushed.items()}

    # Comes after the test above now, which would have to start another.
    test_closing_twice_is_allowed_and_ends_all_service = (
        EngineContract.test_closing_twice_is_allowed_and_ends_all_service
    )


@pytest.mark.gpu
class TestOwnProcessOnCuda(EngineContract):
    make = staticmethod(lambda: OwnProcess(TransformersEngine()))
    device = torch.device("cuda:0")
    tolerance = 1e-4

    def test_weights_on_the_device_arrive_through_its_memory_in_buckets_of_any_size(self, engine, monkeypatch):
        pushed = {name: (tensor * 3).to(self.device) for name, tensor in world().weights()}
        for size in (1000, 1 << 20):
            monkeypatch.setattr(engine, "bucket_bytes", size)
            engine.update_weights(pushed.items(), size)
            assert engine.fingerprint(list(pushed)) == {name: fingerprint(tensor) for name, tensor in pushed.items()}

    def test_a_push_leaves_no_memory_taken(self, engine):
        engine.update_weights(world().weights(), 1)
        before = torch.cuda.mem_get_info(self.device)[0]
        for version in range(5):
            engine.update_weights(world().weights(), version)
        assert before - torch.cuda.mem_get_info(self.device)[0] < engine.bucket_bytes


@pytest.fixture(scope="module")
def living() -> Iterator[list[OwnProcess]]:
    """A started engine that a test has left alive, for the next."""
    engines: list[OwnProcess] = []
    yield engines
    for engine in engines:
        engine.close()


@pytest.fixture
def run(living: list[OwnProcess]) -> Iterator[Callable[..., OwnProcess]]:
    """Starts an engine in a process of its own; without arguments one that lives will do."""
    used: list[OwnProcess] = []

    def start(needs: str = "os", **options: Any) -> OwnProcess:
        plain = needs == "os" and not options
        used.append(living.pop() if plain and living else OwnProcess(ScriptedEngine(needs), **options))
        if not used[-1].running:
            used[-1].start(world().config, world().tokenizer, CPU)
        return used[-1]

    yield start
    for engine in used:
        engine.timeout_seconds = 600.0
        if engine.running and engine.site == [] and not living:
            living.append(engine)
        else:
            engine.close()


def ask(engine: OwnProcess, expression: str) -> Any:
    return engine.fingerprint([expression])[expression]


def do(engine: OwnProcess, statement: str) -> None:
    engine.generate([statement], ANY, [[]])  # type: ignore[list-item]


def ends(pid: int) -> bool:
    """Wait for a process to end, whoever's child it is."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 30)[0])
    finally:
        os.close(descriptor)


def folders() -> set[Path]:
    import tempfile

    return set(Path(tempfile.gettempdir()).glob("lightrft-engine-*"))


def traces(engine: OwnProcess) -> tuple[int, int, Path]:
    """Ids of its process and of a process that this one has started, and the folder of its files."""
    folder = Path(ask(engine, "sys.argv[-1]"))
    assert folder in Path(ask(engine, "tempfile.mkdtemp()")).parents
    return ask(engine, "os.getpid()"), ask(engine, "self.helper.pid"), folder


# What it is like


def test_it_is_another_process_with_this_ones_environment_but_no_rank(run, monkeypatch):
    monkeypatch.setenv("LIGHTRFT_ANYTHING", "passed on")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("RANK", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "1")
    engine = run(site=[])
    assert engine.in_own_process and not TransformersEngine.in_own_process
    assert engine.in_float8 == {"known once started"}
    assert ask(engine, "os.getpid()") != os.getpid()
    assert ask(engine, "os.getsid(0)") != os.getsid(0)
    variables = ask(engine, "dict(os.environ)")
    assert (variables["LIGHTRFT_ANYTHING"], variables["OMP_NUM_THREADS"]) == ("passed on", "1")
    assert not {"RANK", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"} & variables.keys()
    assert ask(engine, "torch.get_num_threads()") == torch.get_num_threads()


def test_config_and_tokenizer_arrive_as_they_are(run):
    engine = run()
    ours, theirs = world().config.to_dict(), ask(engine, "self.config.to_dict()")
    assert {key for key in ours if ours[key] != theirs[key]} <= {"_name_or_path", "architectures"}
    assert ask(engine, "self.config.dtype") == torch.float32
    assert ask(engine, "self.tokenizer.get_vocab()") == world().tokenizer.get_vocab()
    assert ask(engine, "self.tokenizer.all_special_ids") == world().tokenizer.all_special_ids


def test_a_site_of_its_own_wins_and_lightrft_stays_ours(run, tmp_path):
    (tmp_path / "tabnanny.py").write_text("where = 'site'\n")  # shadows one of the standard library
    (tmp_path / "lightrft").mkdir()
    (tmp_path / "lightrft/__init__.py").write_text("raise ImportError('not ours')\n")
    engine = run("tabnanny", site=str(tmp_path))
    assert ask(engine, "self.module.where") == "site"
    assert not hasattr(__import__("tabnanny"), "where")


def test_what_is_missing_in_its_process_is_named_with_the_interpreter_and_the_remedy(run, tmp_path):
    with pytest.raises(EngineError, match=rf"(?s)no_such_library.*{sys.executable}.*{tmp_path}.*site"):
        run("no_such_library", site=[str(tmp_path)])
    (tmp_path / "torch.py").write_text("raise ImportError('torch is broken here')\n")
    with pytest.raises(EngineError, match=r"(?s)exit code 1 during start.*torch is broken here"):
        run(site=[str(tmp_path)])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"python": "/no/such/python"}, "/no/such/python"), ({"site": "/no/such/site"}, "/no/such/site")],
    ids=str,
)
def test_an_interpreter_or_site_that_is_not_there_is_named(run, options, message):
    before = folders()
    with pytest.raises(EngineError, match=message):
        run(**options)
    assert folders() <= before


def test_mistakes_in_the_configuration_are_refused_at_once():
    with pytest.raises(ValueError, match="already"):
        OwnProcess(OwnProcess(TransformersEngine()))
    with pytest.raises(ValueError, match="tensor_parallel_size"):
        OwnProcess(TransformersEngine(tensor_parallel_size=2))
    with pytest.raises(ValueError, match="timeout_seconds"):
        OwnProcess(TransformersEngine(), timeout_seconds=0)


def test_before_it_starts_it_says_so_and_has_the_engines_dtype():
    engine = OwnProcess(TransformersEngine(dtype="bfloat16"))
    assert engine.dtype == torch.bfloat16
    with pytest.raises(EngineError, match="start"):
        engine.score([])
    engine.close()


def test_an_adapter_goes_the_way_of_weights(run):
    engine = run()
    engine.update_adapter(0.5, [("down", torch.arange(3.0)), ("up", torch.zeros(2, 2))], 4)
    assert engine.weight_version == 4
    pushed = ask(engine, "(self.scaling, dict(self.pushed))")
    assert pushed[0] == 0.5 and pushed[1]["down"].tolist() == [0, 1, 2] and pushed[1]["up"].shape == (2, 2)


# Errors


def test_errors_come_back_as_what_they_are_with_the_place_where_they_arose(run):
    engine = run()
    for statement, kind, message in (
        ("raise EngineError('a weight is missing')", EngineError, "a weight is missing"),
        ("raise FileNotFoundError(2, 'Nothing', 'there')", FileNotFoundError, r"\[Errno 2\] Nothing: 'there'"),
        ("{}['key']", KeyError, "'key'"),
        ("raise StubbornError('no', threading.Lock(), 3)", EngineError, "StubbornError: no"),
        ("exec('class Own(Exception): pass\\nraise Own(open)')", EngineError, "Own: <built-in function open>"),
    ):
        with pytest.raises(kind, match=message) as caught:
            do(engine, statement)
        assert caught.type is kind
        assert "scripted_engine.py" in str(caught.value.__cause__)
    assert ask(engine, "1 + 1") == 2


# Death


def test_killed_during_a_call_or_between_calls_it_says_how_and_can_start_anew(run):
    engine = run()
    engine.update_weights([("w", torch.ones(2))], 3)
    pid, helper, folder = traces(engine)
    with pytest.raises(EngineError, match=r"(?s)SIGKILL.*during generate.*out of luck"):
        do(engine, "os.write(2, b'out of luck\\n'); os.kill(os.getpid(), signal.SIGKILL)")
    assert engine.weight_version == -1
    assert ends(pid) and ends(helper) and not folder.exists()
    with pytest.raises(EngineError, match="SIGKILL"):
        engine.score([])
    engine.start(world().config, world().tokenizer, CPU)
    pid, helper, folder = traces(engine)
    os.kill(pid, signal.SIGTERM)
    assert ends(pid)
    with pytest.raises(EngineError, match=r"SIGTERM between calls"):
        engine.wake()
    assert ends(helper) and not folder.exists()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.wake()


def test_dead_in_the_midst_of_a_push_it_says_so(run):
    engine = run()
    pid = ask(engine, "os.getpid()")
    engine.bucket_bytes = 64

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield "first", torch.ones(32)
        os.kill(pid, signal.SIGKILL)
        for index in range(4):
            yield f"later{index}", torch.ones(32)

    with pytest.raises(EngineError, match=r"SIGKILL.*during update_weights"):
        engine.update_weights(tensors(), 1)


def test_an_exit_of_the_library_is_named_by_its_code(run):
    with pytest.raises(EngineError, match="exit code 7"):
        do(run(), "os._exit(7)")


def test_a_process_that_stops_is_found_by_its_lack_of_progress(run):
    engine = run()
    pid, helper, folder = traces(engine)
    engine.timeout_seconds = 1.0
    with pytest.raises(EngineError, match=r"no progress for 1 seconds during generate"):
        do(engine, "os.kill(os.getpid(), signal.SIGSTOP)")
    assert ends(pid) and ends(helper) and not folder.exists()


def test_one_that_does_not_even_read_is_found_too(run):
    engine = run()
    os.kill(ask(engine, "os.getpid()"), signal.SIGSTOP)
    engine.timeout_seconds = 1.0
    with pytest.raises(EngineError, match="no progress"):
        do(engine, "#" * (4 << 20))  # more than the connection holds


def test_closing_clears_up(run):
    segments = set(os.listdir("/dev/shm"))
    engine = run()
    engine.update_weights([("w", torch.ones(1000))], 1)
    pid, helper, folder = traces(engine)
    engine.close()
    assert ends(pid) and ends(helper) and not folder.exists()
    assert not [name for name in set(os.listdir("/dev/shm")) - segments if "lightrft" in name]


def left_alone(sending: Connection, pipe: str | None) -> None:
    """A trainer that starts an engine, says what it started, and is busy with it until ``pipe`` is written, or idle."""
    engine = OwnProcess(ScriptedEngine())
    engine.start(world().config, world().tokenizer, CPU)
    sending.send(traces(engine))
    do(engine, f"open_for_reading('{pipe}')") if pipe else threading.Event().wait()


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_it_ends_with_the_trainer_however_that_ends(busy, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    receiving, sending = ranks.CONTEXT.Pipe(duplex=False)
    trainer = ranks.CONTEXT.Process(target=left_alone, args=(sending, str(pipe) if busy else None))
    trainer.start()
    sending.close()
    pid, helper, folder = receiving.recv()
    with open(pipe, "w") if busy else nullcontext():  # opens when the engine reads
        trainer.kill()
        trainer.join()
        assert ends(pid) and ends(helper) and not folder.exists()


def test_to_ask_the_engine_while_it_takes_weights_is_refused_rather_than_waited_for(run):
    engine = run()

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        engine.fingerprint(["os.getpid()"])
        yield "never", torch.ones(1)

    with pytest.raises(EngineError, match=r"fingerprint\(\) was called within this thread's push"):
        engine.update_weights(tensors(), 1)
    assert ask(engine, "1 + 1") == 2


# Threads


def test_two_threads_take_turns_and_progress_is_seen_here(run, tmp_path):
    engine = run()
    os.mkfifo(tmp_path / "pipe")
    done: list[Any] = []
    work = [
        threading.Thread(target=lambda: do(engine, f"mark(); self.said = open_for_reading('{tmp_path}/pipe'); mark()")),
        threading.Thread(target=lambda: done.append(ask(engine, "self.said"))),
    ]
    work[0].start()
    with open(tmp_path / "pipe", "w") as pipe:  # opens when the first call reads
        work[1].start()
        before = here.since
        while here.since == before:  # the mark before reading is heard of
            pass
        assert not done
        pipe.write("spoken")
    for thread in work:
        thread.join()
    assert done == ["spoken"]


def test_closing_breaks_off_a_call_in_another_thread(run, tmp_path):
    engine = run()
    os.mkfifo(tmp_path / "pipe")
    errors: list[BaseException] = []

    def call() -> None:
        try:
            do(engine, f"open_for_reading('{tmp_path}/pipe')")
        except EngineError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    with open(tmp_path / "pipe", "w"):
        engine.close()
    thread.join()
    assert "was closed during generate" in str(errors[0])
