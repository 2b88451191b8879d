"""Tokens a second of our ``generate`` beside vLLM's own, for the same work, in turns. One JSON line a figure.

    python benchmarks/rollout_speed.py [--shape 0.5b] [--turns 5] [--workloads fixed tail] [--ways ours raw]

Random weights in a Qwen2.5 shape; nothing is downloaded. ``--device cpu --shape tiny`` works without a GPU, on shorter
responses; vLLM's older runner, the one for CPUs, draws seeded responses one by one.
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

QUIET = 0.2  # quantile over the turns: what each step takes while others use the machine least
WORKLOADS = {"fixed": "512 tokens each", "tail": "one token in 256 ends a response, 1024 at most"}  # tiny: 64 and 256
WAYS = {
    "ours": "generate",
    "raw": "vLLM's own, which is told how many tokens each response has",
    "seeded": "the same with a seed each",
    "stopping": "vLLM's own with a seed each and the ids that stop, as it is called where lengths are not known",
}


# What costs vLLM least: numbers at the end, no text.
PLAIN: dict[str, Any] = {
    "ignore_eos": True,
    "logprobs": 0,
    "flat_logprobs": True,
    "detokenize": False,
    "output_kind": RequestOutputKind.FINAL_ONLY,
}


@dataclass
class Turn:
    """What one call took.

    Attributes:
        tokens: drawn.
        seconds: of the call, without the yardstick's, in which a GPU may have worked on.
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
        turn.tokens = self._ours(sampling) if way == "ours" else self._raw(way, sampling)
        turn.seconds = time.perf_counter() - start - turn.yardstick
        turn.yardstick /= len(turn.steps)
        return turn

    def _ours(self, sampling: Sampling) -> int:
        groups = self.bench.engine.generate(self.bench.prompts, sampling, self.seeds)
        self.lengths = [[len(response.token_ids) for response in group] for group in groups]
        return sum(map(sum, self.lengths))

    def _raw(self, way: str, sampling: Sampling) -> int:
        prompts, params = self._asked(way, sampling)
        outputs = self.bench.engine._llm.generate(prompts, params, use_tqdm=False)
        return sum(len(one.token_ids) for output in outputs for one in output.outputs)

    def _asked(self, way: str, sampling: Sampling) -> tuple[list[Any], list[SamplingParams]]:
        """A request for each response, or where nothing tells those of a prompt apart, for all of them."""
        together = way == "raw" and not sampling.stop_token_ids
        stop_ids = sorted(self.bench.engine._split_stops(sampling)[1])
        prompts, params = [], []
        for prompt, seeds, lengths in zip(self.bench.prompts, self.seeds, self.lengths):
            own: list[dict[str, Any]] = [{"max_tokens": count} for count in lengths]
            if together:
                own = [{"n": len(seeds), "max_tokens": sampling.max_new_tokens}]
            elif way == "stopping":
                own = [{"max_tokens": sampling.max_new_tokens, "stop_token_ids": stop_ids}] * len(seeds)
            if way != "raw":
                own = [{**one, "seed": seed} for one, seed in zip(own, seeds)]
            prompts += [{"prompt_token_ids": prompt.token_ids.tolist()}] * len(own)
            params += [SamplingParams(**one, **PLAIN) for one in own]
        return prompts, params


def run(race: Race, sampling: Sampling, ways: list[str], turns: int) -> dict[str, list[Turn]]:
    """Every way's turns; a first one warms up, and none is always the one after the other."""
    taken: dict[str, list[Turn]] = {way: [] for way in ways}
    race.run("ours", sampling)  # for the lengths, which the others are asked for
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


def when_quiet(turns: list[Turn]) -> float:
    """Seconds of a turn of which each step, and what lies outside, takes what it takes in the quiet fifth of turns."""
    parts = [*zip(*(turn.steps for turn in turns)), [turn.outside for turn in turns]]
    return sum(float(np.quantile(part, QUIET)) for part in parts)


def say(workload: str, taken: dict[str, list[Turn]]) -> None:
    pace = median(turn.yardstick for turns in taken.values() for turn in turns)
    clock = {way: [turn.seconds for turn in turns] for way, turns in taken.items()}
    even = {way: [turn.seconds * pace / turn.yardstick for turn in turns] for way, turns in taken.items()}
    for way, turns in taken.items():
        of = {"part": "speed", "workload": workload, "way": way, "turns": len(turns)}
        report(
            **of,
            runner=os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "1"),
            tokens_per_second=median(turn.tokens / turn.seconds for turn in turns),
            lowest=min(turn.tokens / turn.seconds for turn in turns),
            highest=max(turn.tokens / turn.seconds for turn in turns),
            seconds=median(clock[way]),
            outside_steps=median(turn.outside for turn in turns),
            seconds_when_quiet=when_quiet(turns),
        )
        report(**of, what="seconds at the pace of the median turn", **spread(even[way]))
        report(
            **of,
            what="turn by turn",
            seconds=[round(turn.seconds, 3) for turn in turns],
            yardstick_us=[round(turn.yardstick * 1e6, 2) for turn in turns],
        )
    for way in [way for way in taken if way != "ours" and "ours" in taken]:
        for pairs, seconds in (("turn by turn", clock), ("turn by turn at one pace", even)):
            shares = [own / other for own, other in zip(seconds["ours"], seconds[way])]
            report(part="speed", workload=workload, what=f"ours over {way}'s, {pairs}", **spread(shares))


def told(choices: dict[str, str]) -> str:
    return "; ".join(f"{name}: {meaning}" for name, meaning in choices.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help=told(WORKLOADS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help=told(WAYS))
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs: starts in a quarter of the time")
    arguments = parser.parse_args()
    if arguments.turns < 1:
        parser.error("--turns must be 1 or more.")
    bench = Bench(arguments)
    report(part="speed", what="start", seconds=bench.started, push_seconds=bench.pushes[0])
    long, tokens = (256, 64) if bench.small else (1024, 512)
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
