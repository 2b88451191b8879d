"""Tokens a second of our ``generate`` beside vLLM's own, for the same work, in turns. One JSON line a figure.

    python benchmarks/rollout_speed.py [--shape 0.5b] [--turns 5] [--workloads fixed tail] [--ways ours raw seeded]

Random weights in a Qwen2.5 shape; nothing is downloaded. ``--device cpu --shape tiny`` is a rehearsal.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import os
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from rollout import SHAPES, Bench, report
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from lightrft.samples import Sampling

QUIET = 0.2  # of the turns: each step as it was in them, while others used the machine less
WORKLOADS = {"fixed": "512 tokens each", "tail": "one token in 256 ends a response, 1024 at most"}
WAYS = {"ours": "generate", "raw": "vLLM's own", "seeded": "vLLM's own with a seed each"}


@dataclass
class Turn:
    """What one call took.

    Attributes:
        tokens: drawn.
        seconds: of the call, without the yardstick's.
        steps: seconds of each of vLLM's steps in it.
        yardstick: seconds that one and the same work took, on average after each step: how slow the machine was.
    """

    tokens: int = 0
    seconds: float = 0.0
    steps: list[float] = field(default_factory=list)
    yardstick: float = 0.0

    @property
    def outside(self) -> float:
        """Seconds that no step of vLLM's took: requests, texts, tensors."""
        return self.seconds - sum(self.steps)


class Yardstick:
    """Work such as vLLM does for each response between two steps of a GPU; about 60 us.

    A core that other guests of the machine use too may be half as fast for seconds on end, and sampling waits for it.
    """

    def __init__(self) -> None:
        self._counters = [[0] for _ in range(512)]

    def __call__(self) -> float:
        start = time.perf_counter()
        for _ in range(3):
            for counter in self._counters:
                counter[0] += 1
        return time.perf_counter() - start


class Race:
    """The ways to have the same tokens drawn."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.seeds = bench.seeds(0)  # in every turn, so that lengths which are drawn are the same too
        self.lengths: list[list[int]] = []
        self._turn = Turn()
        self._yardstick = Yardstick()
        self._step = bench.engine._llm.llm_engine.step
        bench.engine._llm.llm_engine.step = self._timed_step

    def _timed_step(self) -> Any:
        start = time.perf_counter()
        outputs = self._step()
        self._turn.steps.append(time.perf_counter() - start)
        self._turn.yardstick += self._yardstick()
        return outputs

    def run(self, way: str, sampling: Sampling) -> Turn:
        self.bench.engine._forget()
        gc.collect()
        self._turn = turn = Turn()
        start = time.perf_counter()
        turn.tokens = self._ours(sampling) if way == "ours" else self._raw(sampling, seeded=way == "seeded")
        turn.seconds = time.perf_counter() - start - turn.yardstick
        turn.yardstick /= len(turn.steps)
        return turn

    def _ours(self, sampling: Sampling) -> int:
        groups = self.bench.engine.generate(self.bench.prompts, sampling, self.seeds)
        self.lengths = [[len(response.token_ids) for response in group] for group in groups]
        return sum(map(sum, self.lengths))

    def _raw(self, sampling: Sampling, seeded: bool) -> int:
        """The same work: as many tokens of each response as ours drew last."""
        common: dict[str, Any] = {
            "ignore_eos": True,
            "logprobs": 0,
            "output_kind": RequestOutputKind.FINAL_ONLY,
            "detokenize": False,
            "flat_logprobs": True,
        }
        prompts, params = [], []
        for prompt, own, tokens in zip(self.bench.prompts, self.seeds, self.lengths):
            asked = {"prompt_token_ids": prompt.token_ids.tolist()}
            if seeded:
                prompts += [asked] * len(own)
                params += [SamplingParams(**common, seed=seed, max_tokens=count) for seed, count in zip(own, tokens)]
            elif sampling.stop_token_ids:
                prompts += [asked] * len(own)
                params += [SamplingParams(**common, max_tokens=count) for count in tokens]
            else:
                prompts.append(asked)
                params.append(SamplingParams(**common, n=len(own), max_tokens=sampling.max_new_tokens))
        outputs = self.bench.engine._llm.generate(prompts, params, use_tqdm=False)
        return sum(len(one.token_ids) for output in outputs for one in output.outputs)


def run(race: Race, sampling: Sampling, ways: list[str], turns: int) -> dict[str, list[Turn]]:
    """Every way's turns; a first one warms up, and none is always the one after the other."""
    taken: dict[str, list[Turn]] = {way: [] for way in ways}
    race.run("ours", sampling)  # for the lengths
    for turn in range(turns + 1):
        for way in ways[:: -1 if turn % 2 else 1]:
            took = race.run(way, sampling)
            if turn:
                taken[way].append(took)
    return taken


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "lowest": min(values), "highest": max(values)}


def count_calls(race: Race, sampling: Sampling, way: str) -> int:
    """Function calls in a turn: what a machine's mood does not change."""
    profile = cProfile.Profile()
    profile.enable()
    race.run(way, sampling)
    profile.disable()
    return sum(entry.callcount for entry in profile.getstats())


def say(workload: str, taken: dict[str, list[Turn]]) -> None:
    pace = median(turn.yardstick for turns in taken.values() for turn in turns)
    even = {way: [turn.seconds * pace / turn.yardstick for turn in turns] for way, turns in taken.items()}
    for way, turns in taken.items():
        rates = [turn.tokens / turn.seconds for turn in turns]
        report(
            part="speed",
            runner=os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "1"),
            workload=workload,
            way=way,
            turns=len(turns),
            tokens_per_second=median(rates),
            lowest=min(rates),
            highest=max(rates),
            seconds=median(turn.seconds for turn in turns),
            outside_steps=median(turn.outside for turn in turns),
            steps_when_quiet=float(np.quantile([turn.steps for turn in turns], QUIET, axis=0).sum()),
        )
        report(
            part="speed", workload=workload, way=way, what="seconds at the pace of the median turn", **spread(even[way])
        )
        report(
            part="speed",
            workload=workload,
            way=way,
            what="turn by turn",
            seconds=[round(turn.seconds, 3) for turn in turns],
            yardstick_us=[round(turn.yardstick * 1e6, 2) for turn in turns],
        )
    for way in [way for way in taken if way != "ours" and "ours" in taken]:
        shares = [own / other for own, other in zip(even["ours"], even[way])]
        report(part="speed", workload=workload, what=f"ours over {way}'s at one pace, turn by turn", **spread(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help=str(WORKLOADS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help=str(WAYS))
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs: starts in a quarter of the time")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    report(part="speed", what="start", seconds=bench.started, push_seconds=bench.pushes[0])
    long, tokens = (64, 32) if bench.small else (1024, 512)
    samplings = {
        "fixed": Sampling(max_new_tokens=tokens),
        "tail": Sampling(max_new_tokens=long, stop_token_ids=bench.stop_ids),
    }
    race = Race(bench)
    for workload in arguments.workloads:
        say(workload, run(race, samplings[workload], arguments.ways, arguments.turns))
        for way in arguments.ways:
            calls = count_calls(race, samplings[workload], way)
            report(part="speed", workload=workload, way=way, what="function calls in a turn", count=calls)


if __name__ == "__main__":
    main()
