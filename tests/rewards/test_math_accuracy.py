r"""Model text is hostile: the tests send what stalls or kills a computer algebra system to real worker processes."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lightrft.rewards import MathAccuracy, RewardInput, verifier

STALLS = r"\boxed{9^{9^{9^{9}}}}"


def children_of(pid: int) -> set[int]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == pid:
            found.add(int(folder.name))
    return found


def workers_of(pid: int) -> set[int]:
    """Processes of the verifier that ``pid`` has started."""
    return {child for child in children_of(pid) if b"verify_worker.py" in command_of(child)}


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def boxed(answer: str, reference: str | None = "5") -> RewardInput:
    return RewardInput(rf"Clearly \boxed{{{answer}}}.", reference=reference)


def my_workers() -> set[int]:
    return workers_of(os.getpid())


@pytest.fixture
def short() -> Iterator[MathAccuracy]:
    """One worker that may take two seconds over an answer."""
    reward = MathAccuracy(seconds_per_answer=2.0, workers=1)
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("72", "72", 1.0),
        ("72.0", "72", 1.0),
        ("1,000", "1000", 1.0),
        (r"\$72", "72", 1.0),
        (r"72\text{ cm}", "72", 1.0),
        ("7.", "7", 1.0),
        ("x=5", "5", 1.0),
        ("5", "$5$", 1.0),
        ("5", r"the solution: \boxed{5}", 1.0),
        ("0.5", r"\frac{1}{2}", 1.0),
        (r"\dfrac12", r"\frac{1}{2}", 1.0),
        (r"\sqrt{12}", "2 \\sqrt { 3 }", 1.0),
        ("(x+1)^2", "x^2+2x+1", 1.0),
        (r"\{2,1\}", r"\{1,2\}", 1.0),
        (r"\text{A}", "A", 1.0),
        ("-5", "5", 0.0),
        ("5, 7", "5", 0.0),
        ("5 or 7", "5", 0.0),
        ("5$ or $7", "5", 0.0),
        ("B", "A", 0.0),
        ("", "5", 0.0),
        (r"\frac{", "5", 0.0),
        ("five", "5", 0.0),
    ],
)
def test_the_boxed_answer_is_compared_as_mathematics(
    accuracy: MathAccuracy, answer: str, reference: str, expected: float
) -> None:
    assert accuracy.score(boxed(answer, reference)) == expected


def test_only_the_last_box_of_the_response_counts(accuracy: MathAccuracy) -> None:
    responses = [r"\boxed{2+3} no, \boxed{6}", r"\boxed{6} no, \boxed{2+3}", "5", r"\boxed{2+3} or \boxed{6", ""]
    scores = accuracy.score_all([RewardInput(response, reference="5") for response in responses])
    assert scores == [0.0, 1.0, 0.0, 0.0, 0.0]


def test_an_answer_in_the_prompt_earns_nothing(accuracy: MathAccuracy) -> None:
    assert accuracy.score(RewardInput("I do not know.", prompt=r"e.g. \boxed{5}", reference="5")) == 0.0


@pytest.mark.parametrize("reference", [None, "", "  ", r"\boxed{}"])
def test_without_a_reference_there_is_no_score(reference: str | None) -> None:
    assert MathAccuracy().score(boxed("5", reference)) is None


def test_the_last_expression_counts_when_asked_for() -> None:
    reward = MathAccuracy(answer="last_expression", seconds_per_answer=60.0, workers=1)
    responses = [
        "3 and 2 make 5",
        "5 is more than 3",
        r"so $\frac{10}{2}$",
        r"\boxed{5} of 7",
        "none",
        "x" * 3_000_000 + " 5",
    ]
    scores = reward.score_all([RewardInput(response, reference="5") for response in responses])
    reward.close()
    assert scores == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]


def test_an_answer_equal_to_the_reference_needs_no_worker() -> None:
    before = my_workers()
    reward = MathAccuracy()
    assert reward.score_all([boxed(" 5 "), boxed(r"\odd{1}", r"\odd{1}"), boxed("")]) == [1.0, 1.0, 0.0]
    assert my_workers() == before


def test_many_answers_come_back_in_order(accuracy: MathAccuracy) -> None:
    items = [boxed(f"{k}+1", str(k + 1 if k % 3 else k)) for k in range(100)]
    assert accuracy.score_all(items) == [float(k % 3 > 0) for k in range(100)]
    assert accuracy.score_all([]) == []


def test_a_stalling_answer_earns_nothing_and_the_others_of_its_batch_their_due(short: MathAccuracy) -> None:
    short.score(boxed("2+3"))
    before = my_workers()
    items = [boxed("10/2"), boxed("6"), RewardInput(STALLS, reference="5"), boxed("15/3"), boxed("2+3"), boxed("7")]
    assert short.score_all(items) == [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    assert short.take_counters() == {"timeouts": 1.0, "worker_deaths": 0.0}
    assert not [pid for pid in before - my_workers() if is_running(pid)]  # killed, not left to burn a core
    assert before - my_workers()
    assert short.score(boxed("4+1")) == 1.0
    assert short.take_counters() == {"timeouts": 0.0, "worker_deaths": 0.0}


def test_every_response_with_a_stalling_answer_is_counted(short: MathAccuracy) -> None:
    assert short.score_all([RewardInput(STALLS, reference="5")] * 20) == [0.0] * 20
    assert short.take_counters()["timeouts"] == 20.0


@pytest.mark.parametrize(
    "answer",
    [
        "{" * 40 + "5" + "\\}" * 40,
        r"\frac{" * 300 + "1" + "}{2}" * 300,
        r"\sqrt{" * 400 + "2" + "}" * 400,
        "9" * 2000,
        "\ud800 5",
        "\x00",
        "5\n]\n[1",
        r"\begin{matrix}" * 50,
        "__import__('os').system('touch {marker}')",
        r"\text{__import__('os').system('touch {marker}')}",
        "exec(open('{marker}','w'))",
    ],
)
def test_crafted_text_earns_nothing_and_runs_nothing(accuracy: MathAccuracy, tmp_path: Path, answer: str) -> None:
    marker = tmp_path / "ran"
    assert accuracy.score_all([boxed(answer.replace("{marker}", str(marker))), boxed("2+3")]) == [0.0, 1.0]
    assert not marker.exists()


def test_a_worker_is_confined_and_is_told_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET_TOKEN", "hunter2")
    before = my_workers()
    reward = MathAccuracy(seconds_per_answer=60.0, workers=1)
    assert reward.score(boxed("2+3")) == 1.0
    (pid,) = my_workers() - before
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    values = {line[:26].strip(): line[26:].split()[:2] for line in limits}
    assert values["Max address space"] == [str(1 << 30)] * 2
    assert values["Max file size"] == values["Max core file size"] == ["0", "0"]
    assert b"hunter2" not in Path(f"/proc/{pid}/environ").read_bytes()
    reward.close()


def test_a_trainer_of_many_gigabytes_does_not_make_its_worker_look_grown() -> None:
    program = """
import sys
sys.path[:0] = sys.argv[1:]
ballast = bytearray(700 << 20)  # the worker is forked from this
from lightrft.rewards import MathAccuracy
from test_math_accuracy import boxed, my_workers
reward = MathAccuracy(workers=1)
seen = set()
for _ in range(3):
    assert reward.score(boxed("2+3")) == 1.0
    seen |= my_workers()
reward.close()
assert len(seen) == 1, seen
"""
    paths = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_worker_that_has_grown_is_replaced_and_no_answer_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "_RETIRE_BYTES", 1 << 20)  # every worker is past that
    before = my_workers()
    reward = MathAccuracy(seconds_per_answer=60.0, workers=1)
    assert reward.score_all([boxed("2+3"), boxed("6"), boxed("10/2")]) == [1.0, 0.0, 1.0]
    last = my_workers() - before  # gone by now, or going
    assert reward.score_all([boxed("4+1"), boxed("7")]) == [1.0, 0.0]
    assert reward.take_counters() == {"timeouts": 0.0, "worker_deaths": 0.0}
    assert not last & my_workers()
    reward.close()


def use_program(monkeypatch: pytest.MonkeyPatch, path: Path, program: str) -> None:
    path.write_text(program)
    monkeypatch.setattr(verifier, "_PROGRAM", path)


def test_an_answer_that_crashes_its_worker_earns_nothing_and_is_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = """
import json, os, sys
sys.stdin.readline()
os.write(1, b"r")
for line in sys.stdin:
    for reference, text, boxed in json.loads(line):
        if text == "crash":
            os.abort()
        os.write(1, b"1")
"""
    use_program(monkeypatch, tmp_path / "verify_worker.py", program)
    reward = MathAccuracy(seconds_per_answer=60.0, workers=1)
    assert reward.score_all([boxed("1"), boxed("crash"), boxed("2"), boxed("3")]) == [1.0, 0.0, 1.0, 1.0]
    assert reward.take_counters() == {"timeouts": 0.0, "worker_deaths": 1.0}
    reward.close()


def test_equal_answers_are_verified_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "seen"
    program = f"""
import json, os, sys
sys.stdin.readline()
os.write(1, b"r")
for line in sys.stdin:
    for reference, text, boxed in json.loads(line):
        print(text, file=open({str(log)!r}, "a"), flush=True)
        os.write(1, b"1")
"""
    use_program(monkeypatch, tmp_path / "verify_worker.py", program)
    reward = MathAccuracy(seconds_per_answer=60.0, workers=1)
    assert reward.score_all([boxed(answer) for answer in "1213121"]) == [1.0] * 7
    assert sorted(log.read_text().split()) == ["1", "2", "3"]
    reward.close()


def test_a_worker_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_program(monkeypatch, tmp_path / "verify_worker.py", "raise ImportError('no sympy here')")
    before = my_workers()
    with pytest.raises(RuntimeError, match="could not start: ImportError: no sympy here"):
        MathAccuracy().score(boxed("2+3"))
    assert my_workers() == before


def test_no_answer_is_blamed_for_a_worker_killed_while_idle(short: MathAccuracy) -> None:
    before = my_workers()
    short.score(boxed("2+3"))
    (pid,) = my_workers() - before
    process = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([process], [], [])
    os.close(process)
    assert short.score(boxed("1+4")) == 1.0
    assert short.take_counters()["worker_deaths"] == 0.0


def test_interrupting_the_terminal_leaves_a_worker_at_its_work(accuracy: MathAccuracy) -> None:
    accuracy.score(boxed("2+3"))
    before = my_workers()
    for pid in before:
        os.kill(pid, signal.SIGINT)
    assert accuracy.score(boxed("6-1")) == 1.0
    assert my_workers() == before


def test_threads_do_not_get_each_others_verdicts(accuracy: MathAccuracy) -> None:
    def work(value: int) -> list[float | None]:
        return accuracy.score_all([boxed(f"{value}+{k}", str(value + 1)) for k in range(5)])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(0, 200, 20))) == [[0.0, 1.0, 0.0, 0.0, 0.0]] * 10


def test_copies_and_pickles_work_and_start_their_own_workers(short: MathAccuracy) -> None:
    assert MathAccuracy().__dict__ == pickle.loads(pickle.dumps(MathAccuracy())).__dict__
    short.score(boxed("2+3"))
    mine = my_workers()
    for copied in (copy.deepcopy(short), pickle.loads(pickle.dumps(short))):
        assert copied.score(boxed("1+4")) == 1.0
        assert len(my_workers() - mine) == 1
        copied.close()
    assert short.score(boxed("4+1")) == 1.0
    assert my_workers() == mine


def test_closing_and_forgetting_end_the_workers() -> None:
    before = my_workers()
    reward = MathAccuracy(seconds_per_answer=60.0, workers=2)
    assert reward.score_all([boxed("2+3"), boxed("6")]) == [1.0, 0.0]
    assert my_workers() > before
    reward.close()
    reward.close()
    assert my_workers() == before
    assert reward.score(boxed("1+4")) == 1.0  # and it starts again
    assert my_workers() > before
    del reward
    gc.collect()
    assert my_workers() == before


SCRIPT = """
import os, sys
from lightrft.rewards import MathAccuracy, RewardInput
reward = MathAccuracy(seconds_per_answer=1.0, workers=1)
item = RewardInput(r"\\boxed{2+3}", reference="5")
while reward.score(item) != 1.0:
    pass
"""


def start(*lines: str, then: str = "") -> subprocess.Popen[str]:
    """A training script without a ``__main__`` guard: has a worker, runs ``lines``, waits for us, and runs ``then``."""
    program = SCRIPT + "\n".join([*lines, "print('going', flush=True)", "sys.stdin.read()", then])
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "going\n"
    return process


def all_end(pids: set[int]) -> bool:
    """Whether processes that are not ours end; waits for it, long enough for any machine."""
    for pid in pids:
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ended = select.select([process], [], [], 60.0)[0]
        os.close(process)
        if not ended:
            return False
    return True


LINGER = "child = os.fork()\nif not child: sys.stdin.read(); os._exit(0)"
STALL = (
    "import threading; "
    f"threading.Thread(target=reward.score, args=(RewardInput({STALLS!r}, reference='5'),), daemon=True).start()"
)


@pytest.mark.parametrize("meanwhile", ["", STALL, LINGER], ids=["idle", "busy", "with a forked process left over"])
def test_a_killed_parent_leaves_no_worker_behind(meanwhile: str) -> None:
    process = start(meanwhile)
    workers = workers_of(process.pid)
    assert workers
    process.kill()
    process.wait()
    assert all_end(workers)
    process.communicate()  # ends the process left over


def test_a_script_that_ends_leaves_no_worker_behind() -> None:
    process = start()
    workers = workers_of(process.pid)
    assert workers
    process.communicate()
    assert process.returncode == 0
    assert not [pid for pid in workers if is_running(pid)]


def test_a_forked_process_scores_with_its_own_workers_and_leaves_its_parents_alone() -> None:
    process = start(
        "again, ready = RewardInput(r'\\boxed{1+4}', reference='5'), os.pipe()",
        "child = os.fork()",
        "if not child: score = reward.score(again); os.write(ready[1], b'.'); sys.stdin.read(); sys.exit(score != 1.0)",
        "os.read(ready[0], 1)",
        then="assert os.waitpid(child, 0)[1] == 0 and reward.score(again) == 1.0; "
        "print(reward._verifier._running[0].process.pid)",
    )
    (worker,) = workers_of(process.pid)
    (child,) = children_of(process.pid) - {worker}
    assert len(workers_of(child)) == 1
    assert process.communicate()[0] == f"{worker}\n"  # still the same one
    assert process.returncode == 0


def test_a_process_forked_while_a_thread_is_scoring_can_score() -> None:
    process = start(
        STALL,
        "while not reward._verifier._lock.locked(): pass",
        "child = os.fork()",
        "if not child: import signal; signal.alarm(60); sys.exit(reward.score(item) != 1.0)",
        "assert os.waitpid(child, 0)[1] == 0",
    )
    process.communicate()
    assert process.returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [{"answer": "first"}, {"seconds_per_answer": 0.0}, {"seconds_per_answer": float("nan")}, {"workers": 0}],
)
def test_arguments_outside_their_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        MathAccuracy(**arguments)
