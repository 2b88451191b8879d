"""VLLMEngine holds the contract of engines, on the CPU and on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from lightrft.engines import EngineError, VLLMEngine
from lightrft.ops.fingerprint import fingerprint
from lightrft.samples import Sampling

from .contract import EngineContract, prompt, world

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
ON_CPU = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if ON_CPU else "cuda")


def make(**options: object) -> VLLMEngine:
    # A block of the prefix cache is to be shorter than the contract's prompts; on the CPU it has 32 tokens at least.
    options.setdefault("options", {"block_size": 32} if ON_CPU else {})
    return VLLMEngine(dtype="float32", enforce_eager=True, gpu_memory_utilization=0.2, **options)  # type: ignore[arg-type]


@pytest.mark.skipif(not ON_CPU, reason="vLLM is built for the GPU")
class TestVLLMEngine(EngineContract):
    tolerance = 3e-5
    one_stream = False
    make = staticmethod(make)

    def test_part_of_what_a_layer_holds_as_one_is_refused_and_named(self, engine):
        name = "model.layers.1.self_attn.q_proj.weight"
        with pytest.raises(EngineError, match=r"q_proj.*without.*k_proj"):
            engine.update_weights([(name, dict(world().weights())[name] * 2)], 1)
        assert engine.weight_version == -1
        engine.update_weights(world().weights(), 2)
        assert engine.fingerprint([name]) == {name: fingerprint(dict(world().weights())[name])}

    def test_prompts_of_more_tokens_than_a_step_takes_are_all_answered(self, engine):
        group = engine.generate([prompt(100)] * 60, Sampling(max_new_tokens=3), [[1]] * 60)
        assert len({tuple(response.token_ids.tolist()) for (response,) in group}) == 1

    def test_the_process_is_left_as_it_was(self, engine):
        before = (torch.get_num_threads(), torch.set_num_threads, dict(os.environ))
        engine.generate([prompt(3)], Sampling(max_new_tokens=2), [[1]])
        assert (torch.get_num_threads(), torch.set_num_threads, dict(os.environ)) == before


@pytest.mark.gpu
class TestVLLMEngineOnTheGPU(EngineContract):
    tolerance = 5e-3  # vLLM's attention kernel rounds to 19 bits
    one_stream = False
    device = torch.device("cuda")
    make = staticmethod(make)

    def test_closing_gives_the_memory_back(self, started):
        started(last=True).close()
        before = torch.cuda.mem_get_info()[0]
        engine = started(last=True)
        held = before - torch.cuda.mem_get_info()[0]
        engine.close()
        assert torch.cuda.mem_get_info()[0] - before > -0.02 * held


@pytest.fixture
def tied() -> Iterator[VLLMEngine]:
    engine = make()
    engine.start(world(tied=True).config, world(tied=True).tokenizer, DEVICE)
    yield engine
    engine.close()


def test_logits_that_are_not_finite_are_an_error_that_names_the_prompt_and_the_version(tied):
    weights = dict(world(tied=True).weights())
    norm = "model.norm.weight"
    tied.update_weights({**weights, norm: torch.full_like(weights[norm], torch.nan)}.items(), 41)
    with pytest.raises(EngineError, match=r"(?s)'p5-3'.*not finite.*41"):
        tied.generate([prompt(5)], Sampling(max_new_tokens=3), [[1, 2]])


def test_a_tied_head_follows_the_embedding_that_is_pushed_for_both(tied):
    weights = world(tied=True).weights()
    assert "lm_head.weight" not in dict(weights)
    for version, factor in enumerate((1, 1.5)):
        scaled = [(name, tensor * factor if "embed" in name else tensor) for name, tensor in weights]
        tied.update_weights(scaled, version)
        names = ["model.embed_tokens.weight", "lm_head.weight"]
        print_of = fingerprint(dict(scaled)["model.embed_tokens.weight"])
        assert tied.fingerprint(names) == dict.fromkeys(names, print_of)


def test_in_bfloat16_every_weight_is_found_as_it_was_pushed():
    """Biases too, which vLLM keeps in float32 on a CPU."""
    engine = VLLMEngine(dtype="bfloat16", enforce_eager=True, gpu_memory_utilization=0.2)
    engine.start(world().config, world().tokenizer, DEVICE)
    noise = torch.Generator().manual_seed(0)
    weights = [(name, torch.randn(w.shape, generator=noise).bfloat16().to(DEVICE)) for name, w in world().weights()]
    engine.update_weights(weights, 0)
    assert engine.fingerprint([name for name, _ in weights]) == {name: fingerprint(w) for name, w in weights}
    engine.close()


def test_options_that_the_engine_sets_itself_are_refused():
    with pytest.raises(ValueError, match="load_format"):
        make(options={"load_format": "auto"})


def test_what_vllm_cannot_serve_is_said_with_its_reason():
    with pytest.raises(EngineError, match=r"(?s)cannot serve Qwen2ForCausalLM.*max_model_len"):
        make(max_model_len=10**6).start(world().config, world().tokenizer, DEVICE)


@pytest.mark.parametrize(
    "options",
    [{"dtype": "int8"}, {"quantization": "int4"}, {"kv_cache_dtype": "int8"}, {"gpu_memory_utilization": 0.0}],
    ids=str,
)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        VLLMEngine(**options)
