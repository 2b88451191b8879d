"""How a process leaves its group: a real one, as the interpreter's end is what goes wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Gloo's threads have a second of work left, each part of which they give back to the interpreter. What DDP keeps holds
# on to the group, as whatever the user's script still refers to does, so that destroying it does not end the threads.
LATE = """
import torch, torch.distributed as dist
from lightrft.strategies import launch, leave_together, make_fabric

fabric = make_fabric("ddp", "32-true", accelerator="cpu", devices=1)
launch(fabric)
kept = fabric.setup_module(torch.nn.Linear(2, 2))
{leave}
one = torch.ones(1 << 20)
two = torch.empty_like(one)
for _ in range(4000):
    dist.all_gather_into_tensor(two[:], one[:], async_op=True)
raise SystemExit({code})
"""


CASES = {"a run that went well": ("leave_together(fabric)", 0), "a run that failed": ("", 3)}


@pytest.mark.parametrize(("leave", "code"), CASES.values(), ids=CASES)
def test_the_interpreter_does_not_end_before_gloo_has_given_back_its_tensors(leave: str, code: int) -> None:
    command = [sys.executable, "-c", LATE.format(leave=leave, code=code)]
    run = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert run.returncode == code, run.stderr  # -6 and "terminate called" where it does, or it hangs
