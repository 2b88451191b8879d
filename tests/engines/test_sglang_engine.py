"""SGLangEngine holds the contract of engines, in a process of its own, on the CPU and on a GPU.

The variable LIGHTRFT_SGLANG_SITE may name the folder that has SGLang and
its transformers, LIGHTRFT_SGLANG_PYTHON the interpreter.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig

from lightrft.engines import EngineError, OwnProcess, SGLangEngine
from lightrft.engines.sglang.scheduler import STEPS
from lightrft.ops.fingerprint import Fingerprint, fingerprint
from lightrft.samples import FIRE, Prompt, Sampling
from lightrft.whereabouts import here

from .contract import EngineContract, assert_log_probs, drawn_from, ids_of, prompt, world

PYTHON = os.environ.get("LIGHTRFT_SGLANG_PYTHON")
SITE = list(filter(None, os.environ.get("LIGHTRFT_SGLANG_SITE", "").split(os.pathsep)))
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
needs_sglang = pytest.mark.skipif(
    not (PYTHON or SITE or importlib.util.find_spec("sglang")), reason="needs SGLang: see LIGHTRFT_SGLANG_SITE"
)


def apart(dtype: str, graphs: bool = False, quantization: Any = None, **options: Any) -> OwnProcess:
    options = {"disable_cuda_graph": not graphs, **options}
    return OwnProcess(SGLangEngine(dtype, quantization, 0.2, options=options), python=PYTHON, site=SITE)


def started(dtype: str, tied: bool = False, **options: Any) -> OwnProcess:
    """With the world's weights."""
    engine = apart(dtype, **options)
    engine.start(world(tied).config, world(tied).tokenizer, DEVICE)
    engine.update_weights(world(tied).weights(), 0)
    return engine


def stored(engine: OwnProcess, factor: float = 1.0) -> dict[str, Fingerprint]:
    """What an engine must hold of the world's weights times ``factor``."""
    parts: dict[str, Any] = {}
    for name, tensor in scaled_weights(factor):
        parts |= engine.stored(name, tensor.to(DEVICE, torch.bfloat16))
    return {name: fingerprint(tensor) for name, tensor in parts.items()}


def scaled_weights(factor: float) -> list[tuple[str, torch.Tensor]]:
    return [(name, (tensor * factor).bfloat16()) for name, tensor in world().weights()]


def greedy(engine: OwnProcess) -> list[list[list[int]]]:
    return ids_of(
        engine.generate([prompt(n) for n in (3, 9, 40)], Sampling(max_new_tokens=16, temperature=0), [[0]] * 3)
    )


def gap_of_scores(engine: OwnProcess) -> float:
    """Mean distance, in nats, from the log-probs of the trainer's forward."""
    gaps = []
    sequences = [prompt(length).token_ids for length in (9, 30, 100)]
    for sequence, score in zip(sequences, engine.score(sequences)):
        with torch.no_grad():
            log_probs = world().model(sequence[None]).logits[0, :-1].log_softmax(-1)
        gaps.append(score - log_probs.gather(1, sequence[1:, None])[:, 0])
    return float(torch.cat(gaps).abs().mean())


@needs_sglang
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU has a contract of its own")
@pytest.mark.timeout(600)
class TestSGLangEngine(EngineContract):
    make = staticmethod(lambda: apart("float32"))


@pytest.mark.gpu
@needs_sglang
@pytest.mark.timeout(600)
class TestSGLangEngineOnTheGPU(EngineContract):
    """In float16, the narrowest rounding that SGLang's kernels for GPUs take."""

    device = DEVICE
    tolerance = 3e-2
    make = staticmethod(lambda: apart("float16"))


@pytest.fixture(scope="module")
def engine() -> Iterator[OwnProcess]:
    """In bfloat16, on a GPU with CUDA graphs, as runs use it; the weights are the world's, rounded."""
    engine = started("bfloat16", graphs=True)
    yield engine
    engine.close()


@needs_sglang
@pytest.mark.timeout(600)
class TestSGLangEngineAsRunsUseIt:
    def test_its_weights_are_those_pushed_in_its_dtype_from_either_kind_of_memory(self, engine):
        expected = {name: fingerprint(tensor.bfloat16()) for name, tensor in world().weights()}
        assert engine.fingerprint(list(expected)) == expected
        engine.update_weights([(name, tensor.to(DEVICE)) for name, tensor in world().weights()], 1)
        assert engine.fingerprint(list(expected)) == expected

    @pytest.mark.parametrize(
        "options", [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}], ids=str
    )
    def test_log_probs_are_near_those_of_its_own_scores(self, engine, options):
        sampling = Sampling(max_new_tokens=16, **options)
        asked = prompt(9)
        group = engine.generate([asked], sampling, [range(64)])[0]
        full = [torch.cat([asked.token_ids, response.token_ids]) for response in group]
        scores = [score[len(asked.token_ids) - 1 :] for score in engine.score(full)]
        differences = torch.cat([response.log_probs - score for response, score in zip(group, scores)])
        if options:
            assert differences.abs().mean() > 0.05  # another distribution
        else:
            assert differences.abs().mean() < 0.02

    def test_scores_are_near_those_of_the_trainers_forward(self, engine):
        assert gap_of_scores(engine) < 0.05

    def test_scores_are_steps_too_by_which_progress_is_seen(self, engine):
        (steps,) = Path(engine._process.folder).rglob(STEPS)
        before = steps.read_bytes()
        engine.score([prompt(40).token_ids])
        assert steps.read_bytes() != before

    def test_seeds_decide_whatever_the_batch(self, engine):
        sampling = Sampling(max_new_tokens=8, fire=FIRE())
        together = engine.generate([prompt(5), prompt(40)], sampling, [range(32), range(32)])
        alone = engine.generate([prompt(5)], sampling, [[3]])
        assert together[0][3].token_ids.tolist() == alone[0][0].token_ids.tolist()
        assert len({tuple(ids) for ids in ids_of(together)[0]}) > 16

    @pytest.mark.gpu
    @pytest.mark.parametrize("level", [1, 2])
    def test_sleep_gives_the_devices_memory_to_this_process(self, engine, level):
        awake = torch.cuda.mem_get_info(DEVICE)[0]
        engine.sleep(level)
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        assert torch.cuda.mem_get_info(DEVICE)[0] - awake > 0.15 * total
        engine.wake(("weights",))
        if level == 2:
            engine.update_weights(world().weights(), 2)
        engine.wake(("cache",))
        expected = {name: fingerprint(tensor.bfloat16()) for name, tensor in world().weights()}
        assert engine.fingerprint(list(expected)) == expected

    def test_a_scheduler_that_dies_is_an_error_of_the_engine(self, engine):
        leader = engine._process._process.pid
        session = subprocess.run(["ps", "-o", "pid=", "--sid", str(leader)], capture_output=True, text=True, check=True)
        for pid in map(int, session.stdout.split()):
            if pid != leader:
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineError):
            engine.generate([prompt(5)], Sampling(max_new_tokens=64), [range(8)])
        engine.start(world().config, world().tokenizer, DEVICE)


@pytest.mark.gpu
@needs_sglang
@pytest.mark.timeout(600)
class TestSGLangEngineInFloat8:
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Iterator[OwnProcess]:
        engine = started("bfloat16", graphs=True, quantization="fp8")
        yield engine
        engine.close()

    def test_it_keeps_linear_layers_in_8_bits_and_holds_what_the_trainer_expects_of_them(self, engine):
        linear = {f"{name}.weight" for name, one in world().model.named_modules() if isinstance(one, torch.nn.Linear)}
        assert engine.in_float8 == linear - {"lm_head.weight"}
        engine.update_weights(scaled_weights(1.0), 1)
        expected = stored(engine)
        assert len(expected) > len(dict(world().weights()))
        assert engine.fingerprint(list(expected)) == expected

    def test_every_push_measures_scales_anew_and_answers_are_those_of_a_fresh_engine(self, engine):
        for version, factor in enumerate((1.0, 3.0, 0.5)):
            engine.update_weights(scaled_weights(factor), version)
            expected = stored(engine, factor)
            assert engine.fingerprint(list(expected)) == expected
        answers = greedy(engine)
        engine.sleep()
        fresh = apart("bfloat16", graphs=True, quantization="fp8")
        fresh.start(world().config, world().tokenizer, DEVICE)
        fresh.update_weights(scaled_weights(0.5), 0)
        assert greedy(fresh) == answers
        fresh.close()
        engine.wake()

    @pytest.mark.parametrize("level", [1, 2])
    def test_after_sleep_it_holds_what_it_did(self, engine, level):
        engine.update_weights(scaled_weights(1.0), 4)
        answers, expected = greedy(engine), stored(engine)
        engine.sleep(level)
        engine.wake(("weights",))
        if level == 2:
            engine.update_weights(scaled_weights(1.0), 5)
        engine.wake(("cache",))
        assert engine.fingerprint(list(expected)) == expected
        assert greedy(engine) == answers

    def test_an_update_of_a_millionth_is_seen(self, engine):
        engine.update_weights(scaled_weights(1.0), 6)
        moved = [(name, (tensor + 1e-6 * tensor.sign()).float()) for name, tensor in world().weights()]
        later = {
            part: fingerprint(kept)
            for name, tensor in moved
            for part, kept in engine.stored(name, tensor.to(DEVICE, torch.bfloat16)).items()
        }
        held = engine.fingerprint(list(later))
        assert sum(held[name] != later[name] for name in later) > 0

    def test_its_scores_are_near_those_of_the_trainers_forward(self, engine):
        engine.update_weights(scaled_weights(1.0), 7)
        assert gap_of_scores(engine) < 0.15


@needs_sglang
@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two CUDA devices")
def test_split_over_two_it_holds_tied_weights_and_draws_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|0")  # on a CPU it wants to know whose cores are whose
    dtype, tolerance = (torch.float32, 2e-3) if DEVICE.type == "cpu" else (torch.float16, 3e-2)
    split, model = started(str(dtype).removeprefix("torch."), tied=True, tp_size=2), world(tied=True).model
    expected = {name: fingerprint(tensor.to(dtype)) for name, tensor in model.state_dict().items()}
    assert "lm_head.weight" in expected
    assert split.fingerprint(list(expected)) == expected
    sampling = Sampling(max_new_tokens=12, temperature=0.8)
    for response in split.generate([prompt(5)], sampling, [range(8)])[0]:
        assert_log_probs(response, drawn_from(model, prompt(5), response), sampling, tolerance)
    split.close()


@needs_sglang
@pytest.mark.timeout(600)
def test_a_response_that_its_cache_has_no_room_for_is_refused() -> None:
    small = started("bfloat16", max_total_tokens=64)
    with pytest.raises(EngineError, match="mem_fraction_static"):
        small.generate([prompt(20)], Sampling(max_new_tokens=100), [range(20)])
    small.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"quantization": "int4"}, "quantization"),
        ({"mem_fraction_static": 1.5}, "mem_fraction_static"),
        ({"options": {"quantization": "fp8"}}, "quantization"),
        ({"options": {"load_format": "auto"}}, "load_format"),
    ],
    ids=str,
)
def test_what_it_cannot_be_is_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        SGLangEngine(**arguments)


def test_another_device_is_refused():
    with pytest.raises(EngineError, match="CUDA"):
        SGLangEngine().start(world().config, world().tokenizer, torch.device("meta"))


def test_float32_on_a_gpu_is_refused_before_anything_starts():
    with pytest.raises(EngineError, match=r"float32.*dtype"):
        SGLangEngine("float32").start(world().config, world().tokenizer, torch.device("cuda"))


@pytest.mark.parametrize("capability", [None, (8, 0)], ids=str)
def test_8_bits_where_nothing_multiplies_them_are_refused_before_anything_starts(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    device = torch.device("cuda" if capability else "cpu")
    with pytest.raises(EngineError, match=r"8-bit.*quantization"):
        SGLangEngine("bfloat16", "fp8").start(world().config, world().tokenizer, device)


def test_responses_are_asked_for_in_batches_that_hold_so_much_of_media_at_once(monkeypatch):
    features = {"a": 30, "b": 0, "c": 25, "d": 60, "e": 10}
    engine, prompts = SGLangEngine(), [dataclasses.replace(prompt(3), uid=uid) for uid in features]

    def read(asked: Prompt, _: Sampling) -> tuple[list[int], Any]:
        feature = torch.zeros(features[asked.uid], dtype=torch.uint8)
        return [ord(asked.uid)], SimpleNamespace(mm_items=[SimpleNamespace(feature=feature)]) if len(feature) else None

    monkeypatch.setattr(engine, "_read", read)
    monkeypatch.setattr("lightrft.engines.sglang.engine._MEDIA_BYTES", 110)
    batches = list(engine._batches(prompts, Sampling(), [[1, 2], [3], [4, 5], [6, 7], []]))
    asked = [["".join(chr(ids[0]) for ids in ids_of_all), seeds] for ids_of_all, seeds, _ in batches]
    assert asked == [["aabcc", [1, 2, 3, 4, 5]], ["dd", [6, 7]]]  # d alone is too much, and is asked for
    assert [[one is not None for one in media] for *_, media in batches] == [
        [True, True, False, True, True],
        [True] * 2,
    ]


def test_a_step_is_a_mark_of_progress_while_responses_are_waited_for(monkeypatch):
    engine, before = SGLangEngine(), here.since
    engine._steps = memoryview(bytearray(8)).cast("Q")
    monkeypatch.setattr("lightrft.engines.sglang.engine._SECONDS_BETWEEN_LOOKS", 0.001)

    async def until_seen() -> str:
        while here.since == before:
            engine._steps[0] += 1
            await asyncio.sleep(0)
        return "responses"

    assert asyncio.run(engine._watched(until_seen())) == "responses"


def test_experts_in_8_bits_are_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    config = Qwen3MoeConfig(hidden_size=32, num_hidden_layers=1, num_experts=2, moe_intermediate_size=16, vocab_size=64)
    with pytest.raises(EngineError, match=r"experts.*VLLMEngine"):
        SGLangEngine("bfloat16", "fp8").start(config, world().tokenizer, torch.device("cuda"))


@pytest.mark.skipif(importlib.util.find_spec("sglang") is not None, reason="SGLang is here")
def test_without_sglang_it_names_the_extra_and_the_process_to_run_it_in():
    with pytest.raises(EngineError, match=r"OwnProcess.*extra sglang"):
        SGLangEngine().start(world().config, world().tokenizer, torch.device("cpu"))
